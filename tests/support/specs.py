"""Specs that tests start from, and how to change one: minimal_spec(), full_spec(), changed().

Paths are written as the API writes them: dots, with list indices as numbers, such as outputs.destinations.0.uri.
"""

from copy import deepcopy
from typing import Any

Spec = dict[str, Any]

REMOVED = object()


def minimal_spec() -> Spec:
    """The smallest valid spec."""
    return {
        "model": {"source": "hf://acme/tiny"},
        "dataset": {"source": "s3://corpora/rows.jsonl"},
        "outputs": {"destinations": [{"uri": "s3://models/tiny"}]},
    }


def full_spec() -> Spec:
    """A valid spec that writes most fields, none with its default."""
    return {
        "model": {
            "source": "s3://models/base",
            "endpoint": "https://s3.example.com",
            "credentials": {"secretName": "s3-keys"},
            "dtype": "bfloat16",
        },
        "dataset": {
            "source": "hf://acme/rows@v2/train.jsonl",
            "credentials": {"secretName": "hub-token"},
            "format": "chat",
            "evaluation": {"source": "configmap://held-out/rows.jsonl"},
        },
        "lora": {"rank": 16, "alpha": 16, "targetModules": "q_proj,v_proj"},
        "quantization": {"scheme": "int4", "groupSize": 64, "qatPercent": 25},
        "training": {"epochs": 3, "batchSize": 8, "learningRate": "5e-5", "maxLength": 512, "seed": 7, "checkpointEvery": 10},
        "quality": {"maxLossIncreasePercent": "2.5", "onFailure": "Warn"},
        "outputs": {
            "artifacts": ["adapter", "quantized"],
            "destinations": [
                {"uri": "s3://models/full", "endpoint": "https://s3.example.com", "credentials": {"secretName": "s3-keys"}},
                {"uri": "hf://acme/full", "private": True, "credentials": {"secretName": "hub-token"}},
            ],
        },
        "resources": {"gpus": 0, "memory": "8Gi", "cpu": "500m"},
        "scheduling": {"nodeSelector": {"zone": "a"}, "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]},
        "pod": {"imagePullSecrets": ["registry"]},
        "storage": {"cache": {"persistentVolumeClaim": "models"}, "workspace": {"size": "10Gi", "storageClassName": "fast"}},
        "runPolicy": {"rerun": "again", "backoffLimit": 1, "activeDeadlineSeconds": 60, "ttlSecondsAfterFinished": 0},
    }


def changed(spec: Spec, path: str, value: Any) -> Spec:
    """A copy with another value at a path; objects on the way are made, REMOVED removes."""
    result = deepcopy(spec)
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    target: Any = result
    for key in parents:
        target = target[key] if isinstance(key, int) else target.setdefault(key, {})
    if value is REMOVED:
        del target[last]
    else:
        target[last] = deepcopy(value)
    return result


def job(spec: Any, name: str = "test") -> dict[str, Any]:
    """A whole FineTuneJob."""
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}

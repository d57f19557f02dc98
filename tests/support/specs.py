"""Specs that tests start from, and how to change one: minimal_spec(), full_spec(), changed(); and GOOD_SPECS at the edges of the rules.

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


def with_changes(changes: dict[str, Any]) -> Spec:
    """The smallest spec with other values at some paths."""
    spec = minimal_spec()
    for path, value in changes.items():
        spec = changed(spec, path, value)
    return spec


# For the offline verdicts and for the API server.
GOOD_SPECS: dict[str, Spec] = {
    "a toleration of every taint": with_changes({"scheduling.tolerations": [{"operator": "Exists"}]}),
    "a toleration of a key without a value": with_changes({"scheduling.tolerations": [{"key": "gpu"}]}),
    "a toleration of every value, with an empty one": with_changes(
        {"scheduling.tolerations": [{"key": "gpu", "operator": "Exists", "value": ""}]}
    ),
    "a toleration of a key and a value": with_changes({"scheduling.tolerations": [{"key": "gpu", "operator": "Equal", "value": "h100"}]}),
    "an endpoint for held-out data alone": with_changes(
        {
            "dataset.source": "hf://acme/rows/train.jsonl",
            "dataset.evaluation.source": "s3://corpora/held-out.jsonl",
            "dataset.endpoint": "https://s3.example.com",
        }
    ),
    "an @ in a key": with_changes(
        {
            "model.source": "s3://models/base@v2",
            "dataset.source": "s3://corpora/rows@v2.jsonl",
            "dataset.evaluation.source": "s3://corpora/2026/held-out@v2.jsonl",
            "outputs.destinations.0.uri": "s3://models/tiny@v2",
            "storage.checkpoints.uri": "s3://models/tiny@v2",
        }
    ),
    "buckets alone": with_changes({"outputs.destinations.0.uri": "s3://models", "storage.checkpoints.uri": "s3://models"}),
}


def job(spec: Any, name: str = "test") -> dict[str, Any]:
    """A whole FineTuneJob."""
    return {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": name}, "spec": spec}

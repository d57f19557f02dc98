"""Random specs near good ones: what the offline verdicts and the API server must judge alike. The same seed gives the same spec."""

from copy import deepcopy
from random import Random
from typing import Any

from finetune_api.fields import leaves
from finetune_api.spec import FineTuneJobSpec
from support.specs import REMOVED, Spec, changed, full_spec, minimal_spec

# One other good value for every field (good for its structure: a rule may still refuse it).
OTHER_VALUES: dict[str, Any] = {
    "model.source": "s3://models/other",
    "model.credentials.secretName": "other",
    "model.endpoint": "https://other.example.com",
    "model.dtype": "float32",
    "model.trustRemoteCode": True,
    "dataset.source": "s3://corpora/other.jsonl",
    "dataset.credentials.secretName": "other",
    "dataset.endpoint": "https://other.example.com",
    "dataset.format": "text",
    "dataset.evaluation.percent": 7,
    "dataset.evaluation.source": "s3://corpora/held-out.jsonl",
    "lora.rank": 4,
    "lora.alpha": 5,
    "lora.targetModules": "o_proj",
    "quantization.scheme": "fp8-int4",
    "quantization.groupSize": 128,
    "quantization.qatPercent": 10,
    "quantization.distill": False,
    "quantization.acceptInexact": True,
    "training.backend": "native",
    "training.epochs": 2,
    "training.batchSize": 2,
    "training.learningRate": "1e-3",
    "training.maxLength": 64,
    "training.seed": 0,
    "training.checkpointEvery": 1,
    "quality.maxLossIncreasePercent": "0.5",
    "quality.onFailure": "Warn",
    "outputs.artifacts": ["adapter"],
    "outputs.destinations.0.uri": "s3://models/elsewhere",
    "outputs.destinations.0.credentials.secretName": "other",
    "outputs.destinations.0.endpoint": "https://other.example.com",
    "outputs.destinations.0.private": True,
    "resources.gpus": 0,
    "resources.gpuType": "nvidia-h200",
    "resources.nodes": 2,
    "resources.memory": "4Gi",
    "resources.cpu": "1",
    "scheduling.nodeSelector": {"zone": "b"},
    "scheduling.tolerations.0.key": "other",
    "scheduling.tolerations.0.operator": "Exists",
    "scheduling.tolerations.0.value": "other",
    "scheduling.tolerations.0.effect": "NoExecute",
    "scheduling.priorityClassName": "low",
    "scheduling.runtimeClassName": "other",
    "scheduling.queueName": "other",
    "pod.image": "example.com/trainer:2",
    "pod.imagePullSecrets": ["other"],
    "pod.serviceAccountName": "other",
    "storage.cache.persistentVolumeClaim": "other",
    "storage.workspace.persistentVolumeClaim": "other",
    "storage.workspace.size": "1Gi",
    "storage.workspace.storageClassName": "slow",
    "storage.checkpoints.uri": "s3://models/checkpoints",
    "storage.checkpoints.credentials.secretName": "other",
    "storage.checkpoints.endpoint": "https://other.example.com",
    "runPolicy.suspend": True,
    "runPolicy.preflight": "Skip",
    "runPolicy.rerun": "other",
    "runPolicy.backoffLimit": 0,
    "runPolicy.activeDeadlineSeconds": 5,
    "runPolicy.ttlSecondsAfterFinished": 5,
}

# Values that are wrong nearly everywhere, and those at which a Python regular expression, a Rust one and a Go one differ.
ODD_VALUES: tuple[Any, ...] = (
    *("", "x", "0", "a\n", "a\u00a0b", "\u0663", "x" * 2000, "é" * 1024, "A_B", "true"),
    *(0, 1, -1, 2, 8.5, 129, 2**31, 2**63, 10**30, True, False),
    *([], {}, [{}], ["adapter", "adapter"], ["merged"], {"source": "x"}, {"a": 1}),
    *(
        "s3://bucket",
        "s3://bucket/",
        "s3://bucket/key",
        "s3://bucket/a\u00a0b",
        "s3://bucket/a\u2003b",
        "s3://bucket/a\nb",
        "s3://bucket/é",
        "s3://me:hush@bucket/key",
        "s3://bucket/key@v2",
    ),
    *("hf://a", "hf://a/b", "hf://a/b@c", "hf://a/b@c/d", "hf://a/b/c/d", "hf:///"),
    *("pvc://c", "pvc://c/p", "configmap://a", "configmap://a/b", "configmap://a/b/c", "file:///x", "file://x"),
    *("builtin://smollm2-135m", "builtin://python-docs", "builtin://x", "http://h", "https://h/p", "https://u:p@h"),
    *("1e-4", "0.0", "0.10", "1e400", "16Gi", "1.5", "32", "q_proj,", "none", "int8", "Warn", "Exists"),
)
_SNAKE = ("model.trust_remote_code", "lora.target_modules", "quantization.group_size", "runPolicy.backoff_limit")
_UNKNOWN = ("lora.zzz", "extra", "outputs.destinations.0.zzz", *_SNAKE)


def template_path(path: str) -> str:
    """The path of the field without list indices, as finetune_api.fields.leaves writes it."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def all_leaf_paths() -> set[str]:
    """Every field, without list indices."""
    return {".".join(path) for path, _, _ in leaves(FineTuneJobSpec)}


def put(spec: Spec, path: str, value: Any) -> Spec:
    """Like `support.specs.changed`; a list item that does not exist yet is added first, and removing what is not there changes nothing."""
    list_path, found, _ = path.partition(".0.")
    if found and not _at(spec, list_path):
        spec = changed(spec, list_path, [{}])
    try:
        return changed(spec, path, value)
    except (KeyError, IndexError, TypeError, AttributeError):
        return spec  # an earlier change put something else on the way


def _at(spec: Any, path: str) -> Any:
    for key in path.split("."):
        spec = spec.get(key) if isinstance(spec, dict) else None
    return spec


def mutated(seed: int) -> Spec:
    """A good spec with up to three changes; about every second one is still good."""
    random = Random(seed)  # noqa: S311 - the same specs in every run
    spec = deepcopy(random.choice((minimal_spec(), minimal_spec(), full_spec())))
    paths = sorted(OTHER_VALUES)
    for _ in range(random.randint(1, 3)):
        path, kind = random.choice(paths), random.random()
        if kind < 0.6:
            spec = put(spec, path, OTHER_VALUES[path])
        elif kind < 0.85:
            spec = put(spec, path, random.choice(ODD_VALUES))
        elif kind < 0.9:
            spec = put(spec, path.rpartition(".")[0], random.choice(ODD_VALUES))
        elif kind < 0.95:
            spec = put(spec, random.choice(_UNKNOWN), random.choice(ODD_VALUES))
        else:
            spec = put(spec, path, REMOVED)
    return spec

"""Specs that are wrong in one way each, with the field and a part of the sentence: one table for the offline verdicts and the API server."""

from dataclasses import dataclass
from typing import Any

from support.specs import REMOVED, Spec, with_changes


@dataclass(frozen=True)
class BadSpec:
    """The smallest spec with some values changed.

    Attributes:
        changes: path -> value, as `support.specs.changed` takes them.
        path: the field that the verdict names.
        sentence: a part of what the offline verdict says.
        said_by_server: whether the server says it in the same words (rules do, the structure does not).
    """

    changes: dict[str, Any]
    path: str
    sentence: str
    said_by_server: bool = False

    @property
    def spec(self) -> Spec:
        """The spec."""
        return with_changes(self.changes)


def _rule(changes: dict[str, Any], path: str, sentence: str) -> BadSpec:
    return BadSpec(changes, path, sentence, said_by_server=True)


URI = "outputs.destinations.0.uri"
_HELD_OUT = "dataset.evaluation.percent"
_GATE = "quality.maxLossIncreasePercent"
_S3 = "s3://models/base"
_TOLERATIONS = "scheduling.tolerations"

STRUCTURE: dict[str, BadSpec] = {
    "a number below its bound": BadSpec({"lora.rank": 0}, "spec.lora.rank", "found 0, but 1 or more is expected"),
    "a number above its bound": BadSpec({"lora.rank": 513}, "spec.lora.rank", "512 or less is expected"),
    "a number in quotes": BadSpec({"lora.rank": "8"}, "spec.lora.rank", "a whole number is expected; write one without quotes"),
    "a fraction": BadSpec({"lora.rank": 8.5}, "spec.lora.rank", "found 8.5, but a whole number is expected"),
    "a learning rate without quotes": BadSpec(
        {"training.learningRate": 0.0002}, "spec.training.learningRate", "a string is expected; put it in quotes"
    ),
    "a learning rate of nothing": BadSpec({"training.learningRate": "0.0"}, "spec.training.learningRate", 'found "0.0", but the form'),
    "a negative learning rate": BadSpec({"training.learningRate": "-1e-4"}, "spec.training.learningRate", "the form"),
    "a scheme that does not exist": BadSpec({"quantization.scheme": "int3"}, "spec.quantization.scheme", "one of 'none', 'int8',"),
    "a group size between": BadSpec({"quantization.groupSize": 48}, "spec.quantization.groupSize", "one of 32, 64 or 128 is expected"),
    "a percentage above 100": BadSpec({"quantization.qatPercent": 101}, "spec.quantization.qatPercent", "100 or less is expected"),
    "a word for a truth": BadSpec(
        {"model.trustRemoteCode": "yes"}, "spec.model.trustRemoteCode", "true or false is expected; write one of the two without quotes"
    ),
    "a misspelt field": BadSpec({"lora.rnak": 8}, "spec.lora.rnak", "unknown field; rename it to rank"),
    "a field in snake case": BadSpec(
        {"model.trust_remote_code": False}, "spec.model.trust_remote_code", "unknown field; rename it to trustRemoteCode"
    ),
    "a field that resembles none": BadSpec(
        {"lora.zzz": 8}, "spec.lora.zzz", "unknown field; the fields here are rank, alpha, targetModules; remove it"
    ),
    "a misspelt field in a list": BadSpec(
        {"outputs.destinations.0.privat": True}, "spec.outputs.destinations[0].privat", "rename it to private"
    ),
    "a section that is a list": BadSpec({"lora": []}, "spec.lora", "found [], but an object is expected"),
    "no model": BadSpec({"model": REMOVED}, "spec.model", "found nothing, but this field has no default; add it"),
    "no source": BadSpec({"dataset.source": REMOVED}, "spec.dataset.source", "this field has no default; add it"),
    "no destination": BadSpec({"outputs.destinations": []}, "spec.outputs.destinations", "at least 1 item is expected; add one"),
    "too many destinations": BadSpec(
        {"outputs.destinations": [{"uri": f"s3://models/{index}"} for index in range(9)]},
        "spec.outputs.destinations",
        "at most 8 items are allowed; remove some",
    ),
    "an unknown scheme of a source": BadSpec({"model.source": "gs://models/base"}, "spec.model.source", "the form"),
    "a source with a space": BadSpec({"model.source": "s3://models/my base"}, "spec.model.source", "the form"),
    "a secret's impossible name": BadSpec(
        {"model.credentials.secretName": "My_Keys"}, "spec.model.credentials.secretName", 'found "My_Keys", but the form'
    ),
    "an endpoint with a password": BadSpec(
        {"model.source": _S3, "model.endpoint": "https://me:hush@s3.example.com"}, "spec.model.endpoint", "the form"
    ),
    "a quantity with a space": BadSpec({"resources.memory": "16 Gi"}, "spec.resources.memory", "the form"),
    "a word that is too long": BadSpec(
        {"runPolicy.rerun": "x" * 65}, "spec.runPolicy.rerun", "at most 64 characters are allowed; shorten it"
    ),
    "a label that is too long": BadSpec(
        {"scheduling.nodeSelector": {"zone": "x" * 64}}, "spec.scheduling.nodeSelector.zone", "at most 63 characters are allowed"
    ),
    "an unknown taint effect": BadSpec(
        {"scheduling.tolerations": [{"effect": "Never"}]}, "spec.scheduling.tolerations[0].effect", "one of '', 'NoSchedule'"
    ),
}

# What would reach out of the job's namespace, onto the node or past the operator's own pod.
CONFINEMENT: dict[str, BadSpec] = {
    "a Secret of another namespace": BadSpec(
        {"model.credentials.secretName": "other/s3-keys"}, "spec.model.credentials.secretName", 'found "other/s3-keys", but the form'
    ),
    "a namespace beside a Secret": BadSpec(
        {"model.credentials.namespace": "other"}, "spec.model.credentials.namespace", "unknown field; the fields here are secretName"
    ),
    "a claim of another namespace": BadSpec(
        {"storage.cache.persistentVolumeClaim": "other/models"}, "spec.storage.cache.persistentVolumeClaim", "the form"
    ),
    "a service account of another namespace": BadSpec(
        {"pod.serviceAccountName": "system:serviceaccount:other:admin"}, "spec.pod.serviceAccountName", "the form"
    ),
    "a pull secret of another namespace": BadSpec({"pod.imagePullSecrets": ["other/pull"]}, "spec.pod.imagePullSecrets[0]", "the form"),
    "a namespace of its own": BadSpec({"namespace": "other"}, "spec.namespace", "unknown field"),
    "a host path": BadSpec({"storage.workspace.hostPath": "/etc"}, "spec.storage.workspace.hostPath", "unknown field"),
    "volumes": BadSpec({"pod.volumes": [{"hostPath": {"path": "/"}}]}, "spec.pod.volumes", "unknown field"),
    "an environment": BadSpec({"pod.env": [{"name": "LD_PRELOAD", "value": "x"}]}, "spec.pod.env", "unknown field"),
    "the host's network": BadSpec({"pod.hostNetwork": True}, "spec.pod.hostNetwork", "unknown field"),
    "a security context": BadSpec({"pod.securityContext": {"runAsUser": 0}}, "spec.pod.securityContext", "unknown field"),
}

RULES: dict[str, BadSpec] = {
    "a model's bucket without a name": _rule({"model.source": "s3:///base"}, "spec.model.source", "a model in S3 is s3://bucket/prefix"),
    "a Hub model without an owner": _rule({"model.source": "hf://tiny"}, "spec.model.source", "hf://owner/name[@revision]"),
    "a claim without a path": _rule({"model.source": "pvc://claim"}, "spec.model.source", "pvc://claim/path"),
    "another builtin model": _rule({"model.source": "builtin://gpt"}, "spec.model.source", "builtin://smollm2-135m"),
    "a dataset that is a bucket": _rule({"dataset.source": "s3://corpora"}, "spec.dataset.source", "an S3 object is s3://bucket/key"),
    "a dataset that is a whole repository": _rule(
        {"dataset.source": "hf://acme/rows"}, "spec.dataset.source", "hf://owner/name[@revision]/file"
    ),
    "a key of a ConfigMap with a slash": _rule({"dataset.source": "configmap://a/b/c"}, "spec.dataset.source", "configmap://name/key"),
    "held-out data that is a bucket": _rule(
        {"dataset.evaluation.source": "s3://corpora"}, "spec.dataset.evaluation.source", "s3://bucket/key"
    ),
    "an endpoint beside a Hub model": _rule(
        {"model.endpoint": "https://s3.example.com"}, "spec.model.endpoint", "an endpoint belongs to s3:// only"
    ),
    "an endpoint beside a claim": _rule(
        {"dataset.source": "pvc://claim/rows", "dataset.endpoint": "https://s3.example.com"},
        "spec.dataset.endpoint",
        "an endpoint belongs to s3:// only",
    ),
    "an endpoint without a bucket among the data": _rule(
        {
            "dataset.source": "pvc://claim/rows",
            "dataset.evaluation.source": "pvc://claim/held-out",
            "dataset.endpoint": "https://s3.example.com",
        },
        "spec.dataset.endpoint",
        "remove it or correct dataset.source or dataset.evaluation.source",
    ),
    "a model's bucket with a password": _rule(
        {"model.source": "s3://me:hush@models/base"}, "spec.model.source", "remove them and use model.credentials.secretName"
    ),
    "a model's bucket with a user, without a prefix": _rule(
        {"model.source": "s3://me@models"}, "spec.model.source", "an S3 address holds no user and no secret"
    ),
    "a dataset's bucket with a password": _rule(
        {"dataset.source": "s3://me:hush@corpora/rows.jsonl"}, "spec.dataset.source", "use dataset.credentials.secretName"
    ),
    "a held-out bucket with a password": _rule(
        {"dataset.evaluation.source": "s3://me:hush@corpora/held-out.jsonl"},
        "spec.dataset.evaluation.source",
        "use dataset.credentials.secretName",
    ),
    "a destination's bucket with a password": _rule(
        {URI: "s3://me:hush@models/tiny"}, "spec.outputs.destinations", "use the destination's credentials.secretName"
    ),
    "a checkpoint bucket with a password": _rule(
        {"storage.checkpoints.uri": "s3://me:hush@models/tiny"},
        "spec.storage.checkpoints.uri",
        "use storage.checkpoints.credentials.secretName",
    ),
    "a toleration of all keys": _rule(
        {_TOLERATIONS: [{"effect": "NoSchedule"}]}, f"spec.{_TOLERATIONS}", "without a key needs operator Exists; add one of the two"
    ),
    "a toleration of an empty key": _rule(
        {_TOLERATIONS: [{"key": "gpu"}, {"key": "", "operator": "Equal", "value": "h100"}]},
        f"spec.{_TOLERATIONS}",
        "without a key needs operator Exists",
    ),
    "a toleration of every value with a value": _rule(
        {_TOLERATIONS: [{"key": "gpu", "operator": "Exists", "value": "h100"}]},
        f"spec.{_TOLERATIONS}",
        "operator Exists takes no value; remove it, or use Equal",
    ),
    "a group size for one scale a channel": _rule(
        {"quantization": {"scheme": "int8", "groupSize": 32}}, "spec.quantization.groupSize", "a group size fits int8-int4 and int4"
    ),
    "a group size that fp8 has not": _rule(
        {"quantization": {"scheme": "fp8-int4", "groupSize": 64}}, "spec.quantization.groupSize", "fp8-int4 (128)"
    ),
    "a quantized model without a scheme": _rule(
        {"quantization.scheme": "none", "outputs.artifacts": ["quantized"]}, "spec.outputs.artifacts", "needs a quantization scheme"
    ),
    "an artifact twice": _rule({"outputs.artifacts": ["adapter", "adapter"]}, "spec.outputs.artifacts", "an artifact is named once"),
    "a destination twice": _rule(
        {"outputs.destinations": [{"uri": _S3}, {"uri": _S3, "endpoint": "https://s3.example.com"}]},
        "spec.outputs.destinations",
        "a uri is named once",
    ),
    "a destination with a revision": _rule({URI: "hf://acme/tiny@main"}, "spec.outputs.destinations", "without a revision"),
    "a private bucket": _rule({"outputs.destinations.0.private": True}, "spec.outputs.destinations", "private belongs to hf:// only"),
    "an endpoint beside a Hub destination": _rule(
        {"outputs.destinations.0": {"uri": "hf://acme/tiny", "endpoint": "https://s3.example.com"}},
        "spec.outputs.destinations",
        "endpoint belongs to s3:// only",
    ),
    "a gate without a scheme": _rule({"quantization.scheme": "none", _GATE: "1"}, f"spec.{_GATE}", "it needs a scheme"),
    "a gate without a tuned model": _rule({"quantization.qatPercent": 100, _GATE: "1"}, f"spec.{_GATE}", "qatPercent below 100"),
    "a gate without held-out data": _rule({_HELD_OUT: 0, _GATE: "1"}, f"spec.{_GATE}", "held-out data"),
    "a claim and a storage class": _rule(
        {"storage.workspace": {"persistentVolumeClaim": "work", "storageClassName": "fast"}},
        "spec.storage.workspace.storageClassName",
        "remove one of the two",
    ),
}

# What no code serves yet, by the field's path.
NOT_YET: dict[str, BadSpec] = {
    path: _rule({path: value}, f"spec.{path}", sentence)
    for path, value, sentence in (
        ("outputs.artifacts", ["adapter", "merged"], "merged 16-bit models are not served yet"),
        ("resources.gpus", 2, "more than one GPU is not served yet"),
        ("resources.nodes", 2, "more than one node is not served yet"),
        ("scheduling.queueName", "research", "Kueue is not served yet"),
    )
}

# The offline verdict is stricter than the server, which takes null for the default and 8.0 for 8.
STRICTER_OFFLINE: dict[str, BadSpec] = {
    "null": BadSpec({"lora.rank": None}, "spec.lora.rank", "found null, but a value is expected; remove the field to have its default"),
    "a section of null": BadSpec({"training": None}, "spec.training", "found null"),
    "null in a map": BadSpec({"scheduling.nodeSelector": {"zone": None}}, "spec.scheduling.nodeSelector.zone", "found null"),
    "a whole number with a point": BadSpec({"lora.rank": 8.0}, "spec.lora.rank", "found 8.0, but a whole number is expected"),
}

# Good on a laptop, refused by the server.
LAPTOP_ONLY: dict[str, BadSpec] = {
    path: _rule({path: "file:///tmp/x"}, named, "file:// works only on a laptop")
    for path, named in (
        ("model.source", "spec.model.source"),
        ("dataset.source", "spec.dataset.source"),
        ("dataset.evaluation.source", "spec.dataset.evaluation.source"),
        (URI, "spec.outputs.destinations"),
    )
} | {
    "unsloth without a GPU": _rule(
        {"training.backend": "unsloth", "resources.gpus": 0}, "spec.training.backend", "in a cluster, unsloth needs a GPU"
    ),
}

# Refused by the server, and on a laptop too.
BAD_SPECS: dict[str, BadSpec] = {
    **STRUCTURE,
    **CONFINEMENT,
    **RULES,
    **{f"not yet: {path}": bad for path, bad in NOT_YET.items()},
}

"""The table of validation rules: what the structure of the spec alone can't express.

A row is said twice, as CEL for the API server and as Python for `finetune validate`; a differential property test holds the two together.
Each stands at the field that it is about, or at the object that holds all it speaks of: there it costs the API server nothing where that is not written,
and every write of an object, each status included, is checked against all of them.
Rows for fields that no code serves yet are made from the fields' own marks.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

from finetune_api.fields import leaves, marks_of
from finetune_api.spec import FineTuneJobSpec, QuantizationSpec, Scheme

Spec = dict[str, Any]

# As spec.py has them: they are written nowhere else.
_DEFAULTS = {".".join(path): info.get_default(call_default_factory=True, validated_data={}) for path, info, _ in leaves(FineTuneJobSpec)}


@dataclass(frozen=True)
class Rule:
    """One rule over a spec as written.

    Attributes:
        field: path of the field that the message names, below `spec`.
        cel: holds when the spec is good; `self` is what stands at `at`.
        holds: the same in Python, on the spec's JSON values; only called when the structure is right.
        message: what is expected, and the mend.
        at: path below `spec` of what the rule is checked on, where that is written; `[]` is each item of a list, empty the spec itself.
    """

    field: str
    cel: str
    holds: Callable[[Spec], bool]
    message: str
    at: str = ""


def value_at(spec: Spec, path: str, default: Any = None) -> Any:
    """The value at a dotted path of a spec as written; `default` when it is not written."""
    value: Any = spec
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return default
        value = value[key]
    return value


def _value(spec: Spec, field: str) -> Any:
    """The value of a field of a spec as written, or the field's default."""
    return value_at(spec, field, _DEFAULTS[field])


def written(path: str) -> str:
    """CEL: whether a dotted path below `self` is written."""
    keys = path.split(".")
    return " && ".join(f"has(self.{'.'.join(keys[: end + 1])})" for end in range(len(keys)))


def _cel_value(field: str, at: str = "") -> str:
    """CEL: the value of a field, or its default, where `self` is what stands at `at`."""
    path = field.removeprefix(at).removeprefix(".")
    return f"({written(path)} ? self.{path} : {_literal(_DEFAULTS[field])})"


def _literal(value: str | int) -> str:
    """CEL: a constant."""
    return f"'{value}'" if isinstance(value, str) else str(value)


def _not_yet_rules() -> Iterator[Rule]:
    for path, info, _ in leaves(FineTuneJobSpec):
        marks = marks_of(info)
        if "notYet" not in marks:
            continue
        field = ".".join(path)
        served = marks["served"] or [_DEFAULTS[field]]
        listed = json.dumps(served)
        if "artifacts" in path:
            cel, holds = f"self.all(item, item in {listed})", _items_in(field, served)
        else:
            cel, holds = f"self in {listed}", _value_in(field, served)
        yield Rule(field, cel, holds, str(marks["notYet"]), at=field)


def _value_in(field: str, served: list[Any]) -> Callable[[Spec], bool]:
    return lambda spec: value_at(spec, field, served[0]) in served


def _items_in(field: str, served: list[Any]) -> Callable[[Spec], bool]:
    return lambda spec: all(item in served for item in value_at(spec, field, []))


def _matching(field: str, scheme: str, pattern: str, message: str) -> Rule:
    """A source of one scheme has one form."""
    cel = f"!self.startsWith('{scheme}://') || self.matches('{pattern}')"

    def holds(spec: Spec) -> bool:
        uri = value_at(spec, field, "")
        return not uri.startswith(f"{scheme}://") or re.search(pattern, uri) is not None

    return Rule(field, cel, holds, message, at=field)


def _only_scheme(section: str, scheme: str, *uris: str) -> Rule:
    """A section's endpoint belongs to one scheme: one of the URIs that it opens has it."""
    one_has = " || ".join(f"({written(uri)} && self.{uri}.startsWith('{scheme}://'))" for uri in uris)
    paths = [f"{section}.{uri}" for uri in uris]
    return Rule(
        f"{section}.endpoint",
        f"!has(self.endpoint) || self.endpoint == '' || {one_has}",
        lambda spec: (
            not value_at(spec, f"{section}.endpoint", "") or any(value_at(spec, path, "").startswith(f"{scheme}://") for path in paths)
        ),
        f"an endpoint belongs to {scheme}:// only; remove it or correct {' or '.join(paths)}",
        at=section,
    )


def _each(field: str, cel: str, holds: Callable[[Spec], bool], message: str) -> Rule:
    """A rule that each item of a list fulfils by itself."""

    def all_hold(spec: Spec) -> bool:
        return all(holds(item) for item in value_at(spec, field, []))

    return Rule(field, cel, all_hold, message, at=f"{field}[]")


def _destinations(cel: str, holds: Callable[[Spec], bool], message: str) -> Rule:
    """A rule that each destination fulfils by itself."""
    return _each("outputs.destinations", cel, holds, message)


def _tolerations(cel: str, holds: Callable[[Spec], bool], message: str) -> Rule:
    """A rule that each toleration fulfils by itself, as Kubernetes asks of a pod's."""
    return _each("scheduling.tolerations", cel, holds, message)


_USER = "^s3://[^/]*@"  # would be taken for a part of the bucket's name, and be read in every `kubectl get -o yaml`


def _no_secret(field: str, secret: str) -> Rule:
    """Credentials come from a Secret, never from an address."""
    return Rule(
        field,
        f"!self.matches('{_USER}')",
        lambda spec: re.search(_USER, value_at(spec, field, "")) is None,
        f"{_KEYLESS}{secret}",
        at=field,
    )


def _scheme(spec: Spec) -> str:
    return str(_value(spec, "quantization.scheme"))


_VOLUME_OR_CLAIM = ("storage.workspace.storageClassName", "storage.workspace.persistentVolumeClaim")
_KEYLESS = "an S3 address holds no user and no secret; remove them and use "
_SCHEME = _cel_value("quantization.scheme")
# Every size that the field takes.
_ANY_SIZE: tuple[int, ...] = get_args(get_args(QuantizationSpec.model_fields["group_size"].annotation)[0])
GROUP_SIZES: dict[str, tuple[int, ...]] = {Scheme.INT8_INT4: _ANY_SIZE, Scheme.INT4: _ANY_SIZE, Scheme.FP8_INT4: (128,)}
_FORMS = {
    "s3": (r"^s3://[^/]+/.+$", "an S3 object is s3://bucket/key"),
    "hf": (r"^hf://[^/]+/[^/]+/.+$", "a file on the Hub is hf://owner/name[@revision]/file"),
    "pvc": (r"^pvc://[^/]+/.+$", "a file in a claim is pvc://claim/path"),
    "configmap": (r"^configmap://[^/]+/[^/]+$", "a key of a ConfigMap is configmap://name/key"),
    "builtin": (r"^builtin://python-docs$", "use builtin://python-docs, the only builtin dataset"),
}


def _gate_has_reference(spec: Spec) -> bool:
    measured = _value(spec, "dataset.evaluation.percent") > 0 or _value(spec, "dataset.evaluation.source") != ""
    return _scheme(spec) != "none" and _value(spec, "quantization.qatPercent") < 100 and measured


def _group_size_fits() -> Rule:
    any_size = [str(scheme) for scheme, sizes in GROUP_SIZES.items() if sizes == _ANY_SIZE]
    some_sizes = {scheme: sizes for scheme, sizes in GROUP_SIZES.items() if sizes != _ANY_SIZE}
    fitting = {" and ".join(any_size): _ANY_SIZE, **some_sizes}
    listed = " and ".join(f"{schemes} ({', '.join(map(str, sizes))})" for schemes, sizes in fitting.items())
    pairs = [f"(self.scheme == '{scheme}' && self.groupSize == {size})" for scheme, sizes in some_sizes.items() for size in sizes]
    # The default scheme takes any size, so that the scheme need not be written.
    cel = " || ".join(["!has(self.groupSize)", "!has(self.scheme)", f"self.scheme in {any_size}", *pairs])

    def holds(spec: Spec) -> bool:
        size = value_at(spec, "quantization.groupSize")
        return size is None or size in GROUP_SIZES.get(_scheme(spec), ())

    message = f"a group size fits {listed}; the other schemes have one scale for each output channel: remove it"
    return Rule("quantization.groupSize", cel, holds, message, at="quantization")


def _unique(items: list[Any]) -> bool:
    return len(items) == len(set(items))


_TABLE: tuple[Rule, ...] = (
    _matching("model.source", "s3", r"^s3://[^/]+(/.*)?$", "a model in S3 is s3://bucket/prefix"),
    _matching("model.source", "hf", r"^hf://[^/]+/[^/]+$", "a model on the Hub is hf://owner/name[@revision]"),
    _matching("model.source", "pvc", r"^pvc://[^/]+/.+$", "a model in a claim is pvc://claim/path"),
    _matching("model.source", "builtin", r"^builtin://smollm2-135m$", "use builtin://smollm2-135m, the only builtin model"),
    *(_matching(field, scheme, *form) for field in ("dataset.source", "dataset.evaluation.source") for scheme, form in _FORMS.items()),
    _only_scheme("model", "s3", "source"),
    _only_scheme("dataset", "s3", "source", "evaluation.source"),
    _no_secret("model.source", "model.credentials.secretName"),
    _no_secret("dataset.source", "dataset.credentials.secretName"),
    _no_secret("dataset.evaluation.source", "dataset.credentials.secretName"),
    _no_secret("storage.checkpoints.uri", "storage.checkpoints.credentials.secretName"),
    _group_size_fits(),
    Rule(
        "outputs.artifacts",
        f"!({written('outputs.artifacts')}) || !('quantized' in self.outputs.artifacts) || {_SCHEME} != 'none'",
        lambda spec: "quantized" not in value_at(spec, "outputs.artifacts", []) or _scheme(spec) != "none",
        "a quantized model needs a quantization scheme; choose one other than none, or remove quantized",
    ),
    Rule(
        "outputs.artifacts",
        "self.all(a, self.exists_one(b, a == b))",
        lambda spec: _unique(value_at(spec, "outputs.artifacts", [])),
        "an artifact is named once; remove the second one",
        at="outputs.artifacts",
    ),
    Rule(
        "outputs.destinations",
        "self.all(d, self.exists_one(e, d.uri == e.uri))",
        lambda spec: _unique([item["uri"] for item in value_at(spec, "outputs.destinations", [])]),
        "a uri is named once; remove the second one",
        at="outputs.destinations",
    ),
    _destinations(
        "!self.uri.startsWith('hf://') || self.uri.matches('^hf://[^/@]+/[^/@]+$')",
        lambda item: not item["uri"].startswith("hf://") or re.search(r"^hf://[^/@]+/[^/@]+$", item["uri"]) is not None,
        "a uri on the Hub is hf://owner/name, without a revision",
    ),
    _destinations(
        "!has(self.private) || !self.private || self.uri.startsWith('hf://')",
        lambda item: not item.get("private") or item["uri"].startswith("hf://"),
        "private belongs to hf:// only; remove it",
    ),
    _destinations(
        "!has(self.endpoint) || self.endpoint == '' || self.uri.startsWith('s3://')",
        lambda item: not item.get("endpoint") or item["uri"].startswith("s3://"),
        "endpoint belongs to s3:// only; remove it",
    ),
    _destinations(
        f"!self.uri.matches('{_USER}')",
        lambda item: re.search(_USER, item["uri"]) is None,
        f"{_KEYLESS}the destination's credentials.secretName",
    ),
    _tolerations(
        "(has(self.key) && self.key != '') || (has(self.operator) && self.operator == 'Exists')",
        lambda item: item.get("key", "") != "" or item.get("operator") == "Exists",
        "a toleration without a key needs operator Exists; add one of the two",
    ),
    _tolerations(
        "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
        lambda item: item.get("operator") != "Exists" or item.get("value", "") == "",
        "a toleration with operator Exists takes no value; remove it, or use Equal",
    ),
    Rule(
        "quality.maxLossIncreasePercent",
        f"!({written('quality.maxLossIncreasePercent')}) || ({_SCHEME} != 'none' && {_cel_value('quantization.qatPercent')} < 100"
        f" && ({_cel_value('dataset.evaluation.percent')} > 0 || {_cel_value('dataset.evaluation.source')} != ''))",
        lambda spec: value_at(spec, "quality.maxLossIncreasePercent") is None or _gate_has_reference(spec),
        "the gate compares with the tuned model's held-out loss: it needs a scheme, qatPercent below 100 and held-out data; change these or remove it",
    ),
    Rule(
        "storage.workspace.storageClassName",
        " || ".join(f"{_cel_value(field, 'storage.workspace')} == ''" for field in _VOLUME_OR_CLAIM),
        lambda spec: any(not _value(spec, field) for field in _VOLUME_OR_CLAIM),
        "a workspace is a claim or a volume of a storage class; remove one of the two",
        at="storage.workspace",
    ),
)


def _placed(field: str, schemes: tuple[str, ...], message: str) -> Rule:
    """Sources that only exist on one kind of machine."""
    starts = " || ".join(f"self.startsWith('{scheme}://')" for scheme in schemes)
    return Rule(
        field,
        f"!({starts})",
        lambda spec: not any(value_at(spec, field, "").startswith(f"{scheme}://") for scheme in schemes),
        message,
        at=field,
    )


_SOURCES = ("model.source", "dataset.source", "dataset.evaluation.source")
_NO_FILE = "file:// works only on a laptop (finetune run); use s3://, hf://, pvc:// or builtin://"
_NO_VOLUME = "pvc:// and configmap:// work only in a cluster; use file:// here"

ALWAYS: tuple[Rule, ...] = (*_not_yet_rules(), *_TABLE)
SERVER_ONLY: tuple[Rule, ...] = (
    *(_placed(field, ("file",), _NO_FILE) for field in _SOURCES),
    _destinations(
        "!self.uri.startsWith('file://')",
        lambda item: not item["uri"].startswith("file://"),
        "file:// works only on a laptop; use s3:// or hf://",
    ),
    Rule(
        "training.backend",
        f"!({written('training.backend')}) || self.training.backend != 'unsloth' || {_cel_value('resources.gpus')} > 0",
        lambda spec: value_at(spec, "training.backend") != "unsloth" or _value(spec, "resources.gpus") > 0,
        "in a cluster, unsloth needs a GPU; set resources.gpus to 1, or use auto or native",
    ),
)
LOCAL_ONLY: tuple[Rule, ...] = tuple(_placed(field, ("pvc", "configmap"), _NO_VOLUME) for field in _SOURCES)

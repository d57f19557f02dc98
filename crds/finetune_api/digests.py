"""The two digests of a spec: what trains the same weights, and what is the same run.

Canonical JSON of the values that differ from their defaults, behind a version prefix, so that a new field or a new operator never
re-trains a fleet. Golden values are tests.
"""

import hashlib
import json
from typing import Any

from finetune_api.fields import FieldClass, leaves
from finetune_api.spec import FineTuneJobSpec

DIGEST_VERSION = "v1"


def train_digest(spec: FineTuneJobSpec) -> str:
    """64 hex digits over the fields of class `train`."""
    return _digest(spec, _TRAIN)


def run_digest(spec: FineTuneJobSpec) -> str:
    """64 hex digits over the fields of the classes `train` and `run`."""
    return _digest(spec, _RUN)


def _paths(*classes: FieldClass) -> frozenset[tuple[str, ...]]:
    """Of the fields of these classes."""
    return frozenset(path for path, _, field_class in leaves(FineTuneJobSpec) if field_class in classes)


# Once and for all: to walk the models takes three times as long as the rest of a small spec's digest, and the operator takes four for each new job.
_TRAIN = _paths(FieldClass.TRAIN)
_RUN = _paths(FieldClass.TRAIN, FieldClass.RUN)


def _digest(spec: FineTuneJobSpec, kept: frozenset[tuple[str, ...]]) -> str:
    canonical = json.dumps(_keep(spec.wire(), kept, ()), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(f"{DIGEST_VERSION}:{canonical}".encode()).hexdigest()


def _keep(value: Any, kept: frozenset[tuple[str, ...]], path: tuple[str, ...]) -> Any:
    """The part of a wire value whose leaves are in `kept`; objects left empty are dropped."""
    if path in kept:
        return value
    if isinstance(value, dict):
        parts = {key: _keep(item, kept, (*path, key)) for key, item in value.items()}
        return {key: part for key, part in parts.items() if part not in (None, {}, [])}
    if isinstance(value, list) and any(kept_path[: len(path)] == path for kept_path in kept):  # else its length would be in the digest
        return [_keep(item, kept, path) for item in value]
    return None

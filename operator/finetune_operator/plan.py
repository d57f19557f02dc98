"""What a decision is made of: actions as data, in their order. decide.py makes plans, execution.py executes them. Pure."""

from dataclasses import dataclass

from finetune_operator.subject import Json


@dataclass(frozen=True)
class CreateJob:
    """Create a Job. One that exists already is success when it is this very one."""

    manifest: Json


@dataclass(frozen=True)
class DeleteJob:
    """Delete a Job in the foreground: its pods first, so that no GPU is held by an orphan."""

    name: str
    uid: str


@dataclass(frozen=True)
class PatchJob:
    """Merge-patch a Job."""

    name: str
    patch: Json


@dataclass(frozen=True)
class WriteStatus:
    """Merge-patch the FineTuneJob's status; it carries the resourceVersion that it was computed from."""

    patch: Json


@dataclass(frozen=True)
class EmitEvent:
    """Create an Event; a failure is ignored."""

    event: Json


Action = CreateJob | DeleteJob | PatchJob | WriteStatus | EmitEvent


@dataclass(frozen=True)
class Plan:
    """Actions in order, and when to look again without an event (None: only at the resync)."""

    actions: tuple[Action, ...] = ()
    again_seconds: float | None = None


def merge_patch(before: Json, after: Json) -> Json:
    """The merge patch (RFC 7386) that makes `after` of `before`; lists are replaced whole."""
    patch: Json = dict.fromkeys(before.keys() - after.keys())
    for key, value in after.items():
        old = before.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            nested = merge_patch(old, value)
            patch |= {key: nested} if nested else {}
        elif old != value or key not in before:
            patch[key] = value
    return patch

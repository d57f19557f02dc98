"""Conditions by the Kubernetes and kstatus conventions. Pure.

Ready always exists; Reconciling and Stalled exist only while they are true, and never together with Ready. A transition time changes only
with the status of its condition.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_api.status import Condition, ConditionType

_MESSAGE_LIMIT = 1024


@dataclass(frozen=True)
class Verdict:
    """What a condition says now, before its times are known."""

    type: ConditionType
    is_true: bool
    reason: str
    message: str = ""


def succeeded(reason: str, message: str) -> tuple[Verdict, ...]:
    """kstatus: Current."""
    return (Verdict(ConditionType.READY, True, reason, message),)


def in_progress(reason: str, message: str) -> tuple[Verdict, ...]:
    """kstatus: InProgress."""
    return (Verdict(ConditionType.READY, False, reason, message), Verdict(ConditionType.RECONCILING, True, reason, message))


def stalled(reason: str, message: str) -> tuple[Verdict, ...]:
    """kstatus: Failed; a person must act."""
    return (Verdict(ConditionType.READY, False, reason, message), Verdict(ConditionType.STALLED, True, reason, message))


def resting(reason: str, message: str) -> tuple[Verdict, ...]:
    """Suspended: not ready, and nothing is under way."""
    return (Verdict(ConditionType.READY, False, reason, message),)


def stamp(verdicts: Iterable[Verdict], before: Iterable[Condition], generation: int, now: str) -> tuple[Condition, ...]:
    """The conditions with their times, sorted by type.

    Args:
        verdicts: what holds now; a type that is absent goes away.
        before: the stored conditions.
        generation: of the spec that this speaks of.
        now: RFC 3339, UTC.
    """
    known = {condition.type: condition for condition in before}
    return tuple(
        _stamp(verdict, known.get(verdict.type), generation, now) for verdict in sorted(verdicts, key=lambda item: item.type.value)
    )


def _stamp(verdict: Verdict, before: Condition | None, generation: int, now: str) -> Condition:
    status = "True" if verdict.is_true else "False"
    unchanged = before is not None and before.status == status
    return Condition(
        type=verdict.type,
        status="True" if verdict.is_true else "False",
        reason=verdict.reason,
        message=verdict.message[:_MESSAGE_LIMIT],
        observed_generation=generation,
        last_transition_time=before.last_transition_time if before is not None and unchanged else now,
    )

"""The conditions of a FineTuneJob by the kstatus convention, computed anew on every pass; transition times survive. Pure."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

from finetune_api.status import Condition, ConditionType, Phase

_Truth = Literal["True", "False", "Unknown"]


class Standing(Enum):
    """What kstatus makes of the object."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    IDLE = "Idle"  # suspended: neither current, nor working, nor failed


@dataclass(frozen=True)
class Verdict:
    """Where the job stands, in one sentence."""

    phase: Phase
    standing: Standing
    reason: str
    message: str


def build_conditions(
    verdict: Verdict, facts: dict[ConditionType, tuple[_Truth, str, str]], before: tuple[Condition, ...], generation: int, now: str
) -> tuple[Condition, ...]:
    """All conditions.

    Args:
        facts: (status, reason, message) of Trained, Verified, QualityPassed and Published, as far as they are known.
        before: the stored conditions, whose transition times are kept while the status stays.
    """
    ready: _Truth = "True" if verdict.standing is Standing.READY else "False"
    wanted = {ConditionType.READY: (ready, verdict.reason, verdict.message)}
    if verdict.standing is Standing.RECONCILING:
        wanted[ConditionType.RECONCILING] = ("True", verdict.reason, verdict.message)
    if verdict.standing is Standing.STALLED:
        wanted[ConditionType.STALLED] = ("True", verdict.reason, verdict.message)
    times = {(item.type, item.status): item.last_transition_time for item in before}
    return tuple(
        Condition(
            type=kind,
            status=status,
            reason=reason,
            message=message,
            observed_generation=generation,
            last_transition_time=times.get((kind, status), now),
        )
        for kind, (status, reason, message) in (wanted | facts).items()
    )

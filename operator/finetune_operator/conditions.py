"""The conditions of a FineTuneJob by the kstatus convention, computed anew on every pass; transition times survive. Pure."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from finetune_api.status import Condition, ConditionType, Phase


class ConditionValue(NamedTuple):
    """What a condition says, apart from its type and times."""

    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str


Facts = dict[ConditionType, ConditionValue]


class Standing(Enum):
    """How kstatus reads the object."""

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


def build_conditions(verdict: Verdict, facts: Facts, before: tuple[Condition, ...], generation: int, now: str) -> tuple[Condition, ...]:
    """Builds all conditions of a FineTuneJob.

    Args:
        facts: what Trained, Verified, QualityPassed and Published say, as far as they are known.
        before: the stored conditions, whose transition times are kept while the status stays.
    """
    holds = ConditionValue("True", verdict.reason, verdict.message)
    wanted = {ConditionType.READY: holds if verdict.standing is Standing.READY else holds._replace(status="False")}
    if verdict.standing is Standing.RECONCILING:
        wanted[ConditionType.RECONCILING] = holds
    if verdict.standing is Standing.STALLED:
        wanted[ConditionType.STALLED] = holds
    times = {(item.type, item.status): item.last_transition_time for item in before}
    return tuple(
        Condition(
            type=kind,
            status=value.status,
            reason=value.reason,
            message=value.message,
            observed_generation=generation,
            last_transition_time=times.get((kind, value.status), now),
        )
        for kind, value in (wanted | facts).items()
    )

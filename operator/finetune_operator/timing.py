"""When the state of a run is worth a status of its own, and when it is looked at again. Pure; used by decide.py, reads.py and observation.py."""

from datetime import UTC, datetime
from math import inf

from finetune_api.states import Reason
from finetune_api.status import ConditionType, Phase

from finetune_operator.diagnosis import container_state, is_starting
from finetune_operator.subject import World, carried_status, condition_of, is_being_deleted, is_ended, is_finished

SETTLING_SECONDS = 3.0  # a state that is over sooner gets no status of its own: fewer writes a job
ENDING_SECONDS = 15.0  # likewise for a trainer that has ended well: until its Job says so, nothing that a user reads has changed
NEW_POD_SECONDS = 5.0  # a pod that takes longer to start has its events read
_PASSING = (Reason.JOB_CREATED, Reason.RUNNING, Reason.RETRYING)


def is_settling(world: World, now: datetime) -> bool:
    """Whether the state of the run is about to change, and the stored status is true enough until then.

    A pod is about to run, or its Job is about to say what becomes of a pod that has ended: a state that is over in a moment is not worth a write.
    """
    stored, job, active = carried_status(world.subject), world.attended, world.active_pods
    if job is None or is_finished(job) or condition_of(job, "FailureTarget") or world.subject.spec.run_policy.suspend:
        return False
    if active and is_being_deleted(active[-1]) and is_starting(active[-1]):
        return stored.phase is Phase.PENDING  # what it waited for will explain how its Job ends
    if world.warnings or (active and (is_being_deleted(active[-1]) or not is_starting(active[-1]))):
        return False
    goes_on = stored.observed_generation == world.subject.generation and any(
        item.type is ConditionType.RECONCILING and item.reason in _PASSING for item in stored.conditions
    )
    return goes_on and age_seconds(world, now) < _settling_seconds(world)


def again_seconds(world: World, now: datetime) -> float | None:
    """Seconds until the run is looked at again without an event; None where the watches show every change.

    A pod that starts is looked at when it should have started, and then less and less often, since the events about it are not watched.
    """
    active = world.active_pods
    if (active and not is_starting(active[-1])) or world.subject.spec.run_policy.suspend:
        return None
    age, settled = age_seconds(world, now), _settling_seconds(world)
    if age < settled:
        return settled - age
    return max(NEW_POD_SECONDS + 1 - age, min(60.0, age / 2), 1.0)


def _settling_seconds(world: World) -> float:
    """How long the state of a run may last without a status of its own."""
    pods = world.attended_pods
    has_ended_well = any(pod["status"].get("phase") == "Succeeded" for pod in pods) and all(is_ended(pod) for pod in pods)
    return ENDING_SECONDS if has_ended_well else SETTLING_SECONDS


def age_seconds(world: World, now: datetime) -> float:
    """How long the state of a run has lasted; endless where the clock that wrote its begin is so far ahead of this one that the difference says nothing.

    As a young state it would explain itself only once this clock has caught up.
    """
    seconds = (now - changed_at(world)).total_seconds()
    return seconds if seconds > -SETTLING_SECONDS else inf


def changed_at(world: World) -> datetime:
    """When the attended Job last got or lost a pod: its own creation or that of its newest active pod, or the end of its last one."""
    made = (item["metadata"].get("creationTimestamp") for item in (world.attended, *world.active_pods) if item)
    ends = ((container_state(pod, "terminated") or {}).get("finishedAt") for pod in world.attended_pods)
    moments = (datetime.fromisoformat(str(moment)) for moment in (*made, *ends) if moment)
    return max(moments, default=datetime.min.replace(tzinfo=UTC))

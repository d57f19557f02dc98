"""Where a decision needs a second look: what must be read from the API server, whose events, which trainer to ask, and when to come back. Pure."""

from datetime import datetime

from finetune_api.states import Reason

from finetune_operator.diagnosis import container_state, is_starting, waiting_sentence
from finetune_operator.plan import Plan, WriteStatus
from finetune_operator.subject import FINAL, Json, Trainer, World, condition_of, is_being_deleted, is_finished
from finetune_operator.verdict import changed_at, settling_seconds

NEW_POD_SECONDS = 5.0  # a pod that takes longer to start has its events read
_NEVER_MADE = (Reason.JOB_REFUSED, Reason.NOT_ALLOWED, Reason.INVALID_SPEC)


def must_be_read(world: World) -> bool:
    """Whether what the watches have shown is too little to decide on.

    What a run waits for may be gone already, since a deletion is what a watch can fail to tell. A run that was begun has a Job, so that a missing one is
    deleted or hidden. And a Job that says it has ended may be heard of before its last pod, whose words the status must have before the end is latched.
    """
    subject, job = world.subject, world.attended
    if subject.spec is None:
        return False
    if subject.is_latched:  # nothing is kept of its Jobs, and an edit may be of their TTL
        return is_unfinished(subject.raw)
    if world.current is None and (world.leftovers or any(item is not job for item in world.jobs)):
        return True
    if job is None:
        stored = subject.stored
        refused = stored.phase not in FINAL and any(item.reason in _NEVER_MADE for item in stored.conditions)
        return stored.run is not None and not refused
    has_its_last_words = condition_of(job, "Complete") and any(pod["status"].get("phase") == "Succeeded" for pod in world.attended_pods)
    return is_finished(job) and not has_its_last_words


def unexplained(world: World, now: datetime) -> str | None:
    """UID of the object whose events may say why no pod runs: a Job without a pod, or a pod that takes long to start."""
    job, active = world.attended, world.active_pods
    if job is None or is_finished(job) or is_being_deleted(job) or (now - changed_at(world)).total_seconds() < NEW_POD_SECONDS:
        return None
    if not active:
        return None if job["spec"].get("suspend") else str(job["metadata"]["uid"])
    is_silent = is_starting(active[-1]) and waiting_sentence(active[-1], ())[0] == Reason.CONTAINER_CREATING
    return str(active[-1]["metadata"]["uid"]) if is_silent else None


def again_seconds(world: World, now: datetime) -> float | None:
    """A pod that starts is looked at when it should have started, and then ever more seldom, since its events bring no event to us."""
    active = world.active_pods
    if (active and not is_starting(active[-1])) or (world.subject.spec and world.subject.spec.run_policy.suspend):
        return None
    age_seconds, settled_seconds = (now - changed_at(world)).total_seconds(), settling_seconds(world)
    if age_seconds < settled_seconds:
        return settled_seconds - age_seconds
    return max(NEW_POD_SECONDS + 1 - age_seconds, min(60.0, age_seconds / 2), 1.0)


def trainer_of(world: World) -> Trainer | None:
    """The trainer that can be asked how far it is; None when none runs."""
    running = [pod for pod in world.active_pods if container_state(pod, "running") is not None]
    if world.current is None or not running or not running[-1]["status"].get("podIP"):
        return None
    started = (container_state(running[-1], "running") or {}).get("startedAt")
    seconds = datetime.fromisoformat(str(started)).timestamp() if started else 0.0
    return Trainer(str(running[-1]["metadata"]["uid"]), str(running[-1]["status"]["podIP"]), seconds)


def is_unfinished(raw: Json) -> bool:
    """Whether the periodic re-list puts this FineTuneJob back on the queue."""
    status = raw.get("status") or {}
    return status.get("phase") not in FINAL or status.get("observedGeneration") != raw["metadata"].get("generation")


def is_new(raw: Json) -> bool:
    """Whether nothing was done yet for this FineTuneJob: its Job comes before news of others."""
    return not raw.get("status")


def ends(world: World, plan: Plan) -> bool:
    """Whether nothing is left to do for the job once the plan is executed, until someone edits it."""
    subject = world.subject
    if not is_unfinished(subject.raw) or (subject.spec is not None and subject.is_latched):
        return True
    return any(isinstance(action, WriteStatus) and action.patch.get("phase") in FINAL for action in plan.actions)

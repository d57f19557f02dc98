"""What a look at the world must read beyond the cache: everything from the API server, or the events that explain a missing pod. Pure; used by observation.py."""

from datetime import datetime

from finetune_api.states import Reason

from finetune_operator.diagnosis import is_starting, waiting_sentence
from finetune_operator.subject import FINAL, World, condition_of, is_being_deleted, is_finished, is_unfinished
from finetune_operator.timing import NEW_POD_SECONDS, age_seconds

_NEVER_MADE = (Reason.JOB_REFUSED, Reason.NOT_ALLOWED, Reason.INVALID_SPEC)


def must_be_read(world: World) -> bool:
    """Whether what the watches have shown is too little to decide on.

    What a run waits for may be gone already, since a watch can miss a deletion. A run that was begun has a Job, so that a missing one is deleted or
    hidden. And the end of a Job may be seen before that of its last pod, whose words must be in the status before the end is latched.
    """
    subject, job = world.subject, world.attended
    if subject.is_latched:  # nothing is kept of its Jobs, whose TTL may be what was edited
        return is_unfinished(subject.raw)
    if world.current is None and (world.orphaned_pods or any(item is not job for item in world.jobs)):
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
    if job is None or is_finished(job) or is_being_deleted(job) or age_seconds(world, now) < NEW_POD_SECONDS:
        return None
    if not active:
        return None if job["spec"].get("suspend") else str(job["metadata"]["uid"])
    is_silent = is_starting(active[-1]) and waiting_sentence(active[-1], ())[0] == Reason.CONTAINER_CREATING
    return str(active[-1]["metadata"]["uid"]) if is_silent else None

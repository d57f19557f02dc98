"""The pods of a run as a bounded list, and the GPU time they took. Pure; used by observed.py."""

from datetime import datetime

from finetune_api.spec import FineTuneJobSpec
from finetune_api.states import Reason
from finetune_api.status import Attempt

from finetune_operator.diagnosis import NEVER, container_state, ending_of
from finetune_operator.subject import Json, is_ended

KEPT = 10


def merge_attempts(stored: tuple[Attempt, ...], pods: tuple[Json, ...], spec: FineTuneJobSpec) -> tuple[Attempt, ...]:
    """The last 10 pods that started, oldest first. A pod that is gone keeps what is known of it."""
    merged = {attempt.pod_uid: attempt for attempt in stored}
    for pod in pods:
        known = merged.get(str(pod["metadata"]["uid"]))
        attempt = None if _is_over(known) else _attempt(pod, spec, known)
        if attempt:
            merged[attempt.pod_uid] = attempt
    ordered = sorted(merged.values(), key=lambda attempt: (attempt.start or attempt.end or "", attempt.pod_uid))
    return tuple(ordered[-KEPT:])


def added_gpu_seconds(stored: tuple[Attempt, ...], merged: tuple[Attempt, ...], gpus: int) -> int:
    """The GPU seconds of the attempts that have ended since those were stored. A pod that nobody saw end is not counted."""
    counted = {attempt.pod_uid for attempt in stored if _is_over(attempt)}
    return gpus * sum(_seconds(attempt) for attempt in merged if _is_over(attempt) and attempt.pod_uid not in counted)


def _is_over(attempt: Attempt | None) -> bool:
    return attempt is not None and attempt.end is not None


def _attempt(pod: Json, spec: FineTuneJobSpec, known: Attempt | None) -> Attempt | None:
    """The attempt that a pod makes; None when the pod has not started, or was disrupted before it did."""
    running, terminated = container_state(pod, "running"), container_state(pod, "terminated")
    uid = str(pod["metadata"]["uid"])
    started = (running or terminated or {}).get("startedAt")
    started = (known.start if known else None) if started in (None, NEVER) else started
    if not is_ended(pod) or not (terminated or started):
        return Attempt(pod_uid=uid, start=started) if started else None
    ending = ending_of(pod, spec)
    if ending.reason == Reason.DISRUPTED and not started:
        return None
    # The kubelet may report the end of an evicted pod before that of its container.
    end = (terminated or {}).get("finishedAt") or (started if terminated else None)
    return Attempt(pod_uid=uid, start=started, end=end, exit_code=ending.exit_code, reason=ending.reason)


def _seconds(attempt: Attempt) -> int:
    if attempt.start is None or attempt.end is None:
        return 0
    return max(0, int((datetime.fromisoformat(attempt.end) - datetime.fromisoformat(attempt.start)).total_seconds()))

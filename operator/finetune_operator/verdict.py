"""Job and pods in, verdict out: where a run stands, and the sentence that says so. Pure; observed.py makes a status of it."""

from finetune_api.exits import OOM_KILLED, REASONS, ExitCode
from finetune_api.spec import Artifact, FineTuneJobSpec
from finetune_api.states import Reason
from finetune_api.status import FineTuneJobStatus, Phase

from finetune_operator.conditions import Standing, Verdict
from finetune_operator.diagnosis import (
    DELETED,
    Ending,
    container_state,
    ended_sentence,
    ending_of,
    is_node_lost,
    node_lost_sentence,
    waiting_sentence,
)
from finetune_operator.redaction import clean
from finetune_operator.subject import Json, World, condition_of, is_being_deleted


def verdict_of(world: World, job: Json, base: FineTuneJobStatus, last: Ending | None) -> Verdict:
    """Where a run stands by its attended Job and that Job's pods."""
    spec = world.subject.spec
    if condition_of(job, "Complete"):
        return Verdict(Phase.SUCCEEDED, Standing.READY, REASONS[ExitCode.SUCCEEDED], success_sentence(spec, last))
    failed = condition_of(job, "Failed")
    if failed:
        reason, sentence = _failure(failed, spec, base, last)
        return Verdict(Phase.FAILED, Standing.STALLED, reason, sentence)
    doomed = condition_of(job, "FailureTarget")
    if doomed:  # it has failed, and says so once its pods have ended
        _, sentence = _failure(doomed, spec, base, last)
        return Verdict(Phase.RUNNING if _has_started(base) else Phase.PENDING, Standing.RECONCILING, Reason.STOPPING, sentence)
    active = world.active_pods
    if spec.run_policy.suspend:
        return _suspended(active)
    return _active(active[-1], world.warnings) if active else _podless(world.warnings, last)


def last_ending(world: World) -> Ending | None:
    """How the last pod of the attended Job ended; None when none has."""
    ended = sorted(world.ended_pods, key=_finished_at)
    return ending_of(ended[-1], world.subject.spec) if ended else None


def success_sentence(spec: FineTuneJobSpec, last: Ending | None = None) -> str:
    """The message about a run that has succeeded, with what the trainer has to say about a slow one."""
    proven = ", verified" if Artifact.QUANTIZED in spec.wanted_artifacts else ""
    places = ", ".join(item.uri for item in spec.outputs.destinations)
    hints = f" {last.said.message}" if last and last.said and last.exit_code == ExitCode.SUCCEEDED else ""
    return clean(f"Trained{proven} and published to {places}.{hints}")


def _failure(failed: Json, spec: FineTuneJobSpec, base: FineTuneJobStatus, last: Ending | None) -> tuple[str, str]:
    given = str(failed.get("reason") or "")
    if given == Reason.DEADLINE_EXCEEDED:
        return Reason.DEADLINE_EXCEEDED, _deadline_sentence(spec, base)
    if last is None or last.exit_code == ExitCode.SUCCEEDED:
        return _failure_without_pod(str(failed.get("message") or given or "no reason given"), base)
    if given == "BackoffLimitExceeded" and spec.run_policy.backoff_limit:
        return last.reason, clean(f"{last.sentence} (Given up after {spec.run_policy.backoff_limit} retries.)")
    return last.reason, last.sentence


def _failure_without_pod(message: str, base: FineTuneJobStatus) -> tuple[str, str]:
    """A pod that ends by itself stays as long as its Job: one that is gone, and was not seen to end, was deleted."""
    was_deleted = any(attempt.end is None or attempt.reason == Reason.POD_DELETED for attempt in base.attempts[-1:])
    if was_deleted and f"exit code {OOM_KILLED} " in message:
        return Reason.POD_DELETED, DELETED
    return Reason.JOB_FAILED, clean(f"The Job failed: {message}")


def _deadline_sentence(spec: FineTuneJobSpec, base: FineTuneJobStatus) -> str:
    """What the run waited for at its deadline is known only as long as its pod is there: once it is in the message, it stays there."""
    over = f"The run was stopped after its deadline of {spec.run_policy.active_deadline_seconds} s"
    if base.message.startswith(over):
        return base.message
    where = ""
    if not base.start_time and _has_started(base):
        where = ", during preflight"
    elif not _has_started(base) and base.message:
        where = f", before its pod had started ({clean(base.message, 700).rstrip('.')})"
    return clean(f"{over}{where}; raise runPolicy.activeDeadlineSeconds and set runPolicy.rerun.")


def _has_started(base: FineTuneJobStatus) -> bool:
    """Whether a pod of the stored status has run; a run's startTime is its training's, so preflight has none."""
    return base.start_time is not None or base.phase is Phase.RUNNING


def _suspended(active: tuple[Json, ...]) -> Verdict:
    if active:
        return Verdict(
            Phase.RUNNING,
            Standing.RECONCILING,
            Reason.SUSPENDING,
            "The trainer saves its last step and stops, because runPolicy.suspend is true.",
        )
    return Verdict(Phase.SUSPENDED, Standing.IDLE, Reason.SUSPENDED, "Suspended; set runPolicy.suspend to false to go on.")


def _active(pod: Json, warnings: tuple[str, ...]) -> Verdict:
    if is_node_lost(pod):
        return Verdict(Phase.RUNNING, Standing.RECONCILING, Reason.NODE_LOST, node_lost_sentence(pod))
    if is_being_deleted(pod):
        return Verdict(
            Phase.RUNNING,
            Standing.RECONCILING,
            Reason.STOPPING,
            "The pod is being stopped; the run continues from its last checkpoint in a new one.",
        )
    if container_state(pod, "terminated") is not None:
        return Verdict(Phase.RUNNING, Standing.RECONCILING, *ended_sentence(pod))
    if container_state(pod, "running") is not None:
        return Verdict(Phase.RUNNING, Standing.RECONCILING, Reason.RUNNING, "The trainer is at work.")
    return Verdict(Phase.PENDING, Standing.RECONCILING, *waiting_sentence(pod, warnings))


def _podless(warnings: tuple[str, ...], last: Ending | None) -> Verdict:
    if warnings:
        return Verdict(Phase.PENDING, Standing.RECONCILING, Reason.POD_NOT_CREATED, clean(f"The Job can't make its pod: {warnings[0]}"))
    if last and last.exit_code == ExitCode.SUCCEEDED:
        return Verdict(Phase.RUNNING, Standing.RECONCILING, Reason.RUNNING, "The trainer has ended well; waiting for its Job to say so.")
    if last:
        return Verdict(Phase.PENDING, Standing.RECONCILING, Reason.RETRYING, clean(f"Waiting to try again, after: {last.sentence}"))
    return Verdict(Phase.PENDING, Standing.RECONCILING, Reason.JOB_CREATED, "Waiting for the Job to make its pod.")


def _finished_at(pod: Json) -> str:
    terminated = container_state(pod, "terminated") or {}
    return str(terminated.get("finishedAt") or pod["metadata"].get("creationTimestamp") or "")

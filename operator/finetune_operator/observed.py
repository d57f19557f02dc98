"""Job, pods and progress in, status out: what a user reads in `kubectl describe ftj`. Pure; called by decide.py.

It carries over what the stored status knows of the same run, since pods come and go.
"""

from datetime import UTC, datetime, timedelta
from typing import Literal, TypeVar

from finetune_api.exits import OOM_KILLED, REASONS, ExitCode
from finetune_api.fields import ApiModel
from finetune_api.spec import Artifact, FineTuneJobSpec
from finetune_api.states import Reason
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase, Preflight, Progress, Stage
from finetune_api.termination import TerminationMessage

from finetune_operator.attempts import added_gpu_seconds, merge_attempts
from finetune_operator.conditions import Standing, Verdict, build_conditions
from finetune_operator.diagnosis import (
    DELETED,
    Ending,
    container_state,
    ending_of,
    is_ended,
    is_node_lost,
    is_starting,
    node_lost_sentence,
    waiting_sentence,
)
from finetune_operator.redaction import clean
from finetune_operator.subject import Json, Subject, World, condition_of, is_being_deleted, is_finished

Said = TypeVar("Said", bound=ApiModel)
Facts = dict[ConditionType, tuple[Literal["True", "False", "Unknown"], str, str]]
_AFTER_TRAINING = (Stage.EVALUATING, Stage.CONVERTING, Stage.VERIFYING, Stage.PUBLISHING)
PROGRESS_WRITE_SECONDS = 10
SETTLING_SECONDS = 2.0  # a state that is over sooner gets no status of its own: fewer writes a job
_PASSING = (Reason.JOB_CREATED, Reason.RUNNING, Reason.RETRYING)


def timestamp(now: datetime) -> str:
    """A point in time as the API writes it."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def carried_status(subject: Subject) -> FineTuneJobStatus:
    """What the stored status knows of the run that the spec asks for; blank for a new run."""
    stored = subject.stored
    if stored.run and stored.run.run_digest == subject.run.run_digest:
        return stored
    return FineTuneJobStatus(run=subject.run, conditions=stored.conditions)


def status_of(subject: Subject, base: FineTuneJobStatus, verdict: Verdict, now: datetime, facts: Facts | None = None) -> FineTuneJobStatus:
    """The base with a verdict: phase, message and conditions for the current generation."""
    known: Facts = facts if facts is not None else _known_facts(base)
    conditions = build_conditions(verdict, known, subject.stored.conditions, subject.generation, timestamp(now))
    return base.model_copy(
        update={
            "observed_generation": subject.generation,
            "phase": verdict.phase,
            "message": verdict.message,
            "conditions": conditions,
        }
    )


def observed_status(world: World, now: datetime, stuck_after: timedelta) -> FineTuneJobStatus:
    """The status of a run whose Job exists.

    Args:
        stuck_after: a training that makes no step for so long is said to make no progress.
    """
    subject, spec, job, pods = world.subject, world.subject.spec, world.current, world.attended_pods
    assert spec is not None  # noqa: S101 decide.py's earlier policies end without them
    assert job is not None  # noqa: S101
    base = carried_status(subject)
    last = _last_ending(world, spec)
    attempts = merge_attempts(base.attempts, pods, spec)
    base = base.model_copy(
        update={
            "attempts": attempts,
            "gpu_seconds": base.gpu_seconds + added_gpu_seconds(base.attempts, attempts, spec.resources.gpus),
            "start_time": base.start_time or next((item.start for item in attempts if item.start), None),
        }
    )
    verdict = _verdict(world, job, base, last)
    if verdict.phase in (Phase.SUCCEEDED, Phase.FAILED):
        base = base.model_copy(update={"completion_time": _completion_time(job)})
    base = _with_live(base, world, verdict, now)
    if verdict.reason == Reason.RUNNING:
        verdict = _moving(world, base, verdict, now - stuck_after)
    if last and last.said:
        base = _with_words(base, last.said, final=verdict.phase in (Phase.SUCCEEDED, Phase.FAILED))
    return status_of(subject, base, verdict, now, _facts(spec, base, verdict, last))


def preflight_status(world: World, job: Json, now: datetime) -> FineTuneJobStatus:
    """The status of a run whose preflight Job exists and whose training Job does not: with the latch once it has passed."""
    subject, spec = world.subject, world.subject.spec
    assert spec is not None  # noqa: S101 decide.py's earlier policies end without them
    base = carried_status(subject).model_copy(update={"stage": Stage.PREFLIGHT})
    last = _last_ending(world, spec)
    verdict = _verdict(world, job, base, last)
    if verdict.phase is Phase.SUCCEEDED:
        said = _cleaned(last.said) if last and last.said else None
        passed = Preflight(passed_at=_completion_time(job) or timestamp(now), message=said.message if said else "")
        base = base.model_copy(update={"preflight": passed})
        verdict = Verdict(Phase.PENDING, Standing.RECONCILING, Reason.JOB_CREATED, "Waiting for the Job to make its pod.")
    elif verdict.phase is Phase.FAILED:
        base = base.model_copy(update={"completion_time": _completion_time(job)})
    elif verdict.reason == Reason.RUNNING:
        verdict = Verdict(
            verdict.phase, verdict.standing, verdict.reason, "Preflight checks spec, data and access before a GPU is asked for."
        )
    return status_of(subject, base, verdict, now)


def _last_ending(world: World, spec: FineTuneJobSpec) -> Ending | None:
    ended = sorted((pod for pod in world.attended_pods if is_ended(pod)), key=_finished_at)
    return ending_of(ended[-1], spec) if ended else None


def _verdict(world: World, job: Json, base: FineTuneJobStatus, last: Ending | None) -> Verdict:
    spec = world.subject.spec
    assert spec is not None  # noqa: S101 as in observed_status
    if condition_of(job, "Complete"):
        return Verdict(Phase.SUCCEEDED, Standing.READY, REASONS[ExitCode.SUCCEEDED], _success_sentence(spec))
    failed = condition_of(job, "Failed")
    if failed:
        reason, sentence = _failure(failed, spec, base, last)
        return Verdict(Phase.FAILED, Standing.STALLED, reason, sentence)
    doomed = condition_of(job, "FailureTarget")
    if doomed:  # it has failed, and says so once its pods have ended
        _, sentence = _failure(doomed, spec, base, last)
        return Verdict(Phase.RUNNING if base.start_time else Phase.PENDING, Standing.RECONCILING, Reason.STOPPING, sentence)
    active = [pod for pod in world.attended_pods if not is_ended(pod)]
    if spec.run_policy.suspend:
        return _suspended(active)
    return _active(active[-1], world.warnings) if active else _podless(world.warnings, last)


def _success_sentence(spec: FineTuneJobSpec) -> str:
    proven = ", verified" if Artifact.QUANTIZED in spec.wanted_artifacts else ""
    places = ", ".join(item.uri for item in spec.outputs.destinations)
    return clean(f"Trained{proven} and published to {places}.")


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
    """What the run waited for at its deadline is known only as long as its pod is there: once said, it stays said."""
    over = f"The run was stopped after its deadline of {spec.run_policy.active_deadline_seconds} s"
    if base.message.startswith(over):
        return base.message
    waited = f", before its pod had started ({clean(base.message, 700).rstrip('.')})" if base.start_time is None and base.message else ""
    return clean(f"{over}{waited}; raise runPolicy.activeDeadlineSeconds and set runPolicy.rerun.")


def _suspended(active: list[Json]) -> Verdict:
    if active:
        return Verdict(
            Phase.RUNNING,
            Standing.RECONCILING,
            Reason.SUSPENDING,
            "The trainer saves its last step and stops, because runPolicy.suspend is true.",
        )
    return Verdict(Phase.SUSPENDED, Standing.IDLE, Reason.SUSPENDED, "Suspended; set runPolicy.suspend to false to go on.")


def is_settling(world: World, now: datetime) -> bool:
    """Whether the next moment says more than this one, and what is stored is true enough until then.

    A pod is about to run, or its Job to say what becomes of the pod that has ended: a state that is over in a moment is not worth a write.
    """
    stored, job, spec = carried_status(world.subject), world.attended, world.subject.spec
    active = [pod for pod in world.attended_pods if not is_ended(pod)]
    if job is None or spec is None or is_finished(job) or spec.run_policy.suspend or world.warnings:
        return False
    if active and (is_being_deleted(active[-1]) or not is_starting(active[-1])):
        return False
    goes_on = stored.observed_generation == world.subject.generation and any(
        item.type is ConditionType.RECONCILING and item.reason in _PASSING for item in stored.conditions
    )
    return goes_on and (now - changed_at(world)).total_seconds() < SETTLING_SECONDS


def changed_at(world: World) -> datetime:
    """When the attended Job was last given or left without a pod: its own creation or that of its newest pod, or the end of its last one."""
    active = [pod for pod in world.attended_pods if not is_ended(pod)]
    made = (item["metadata"].get("creationTimestamp") for item in (world.attended, *active) if item)
    ends = ((container_state(pod, "terminated") or {}).get("finishedAt") for pod in world.attended_pods)
    moments = (datetime.fromisoformat(str(moment)) for moment in (*made, *ends) if moment)
    return max(moments, default=datetime.min.replace(tzinfo=UTC))


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
    if container_state(pod, "running") is not None or container_state(pod, "terminated") is not None:
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


def _with_live(base: FineTuneJobStatus, world: World, verdict: Verdict, now: datetime) -> FineTuneJobStatus:
    """Takes what the endpoint says: a new stage or the first step at once, later steps every 10 s at most."""
    report = world.progress
    if report is None or verdict.phase is not Phase.RUNNING or report.train_digest != world.subject.run.train_digest:
        return base
    # Its own clock is not trusted: the time of this reading stands in updatedAt, and throttles the next.
    fresh = report.progress.model_copy(update={"updated_at": timestamp(now)}) if report.progress else None
    if fresh and base.stage == report.stage and not _is_due(base.progress, fresh, now):
        return base
    return base.model_copy(update={"stage": report.stage, "progress": _cleaned(fresh) if fresh else base.progress})


def _moving(world: World, base: FineTuneJobStatus, verdict: Verdict, since: datetime) -> Verdict:
    """The verdict, unless the last step and the start of the pod that trains are both older than `since`. Nothing is stopped for it."""
    running = [state for pod in world.attended_pods if (state := container_state(pod, "running"))]
    if base.stage is not Stage.TRAINING or base.progress is None or not base.progress.updated_at or not running:
        return verdict
    last = max(base.progress.updated_at, str(running[-1].get("startedAt") or ""))
    if datetime.fromisoformat(last) > since:
        return verdict
    sentence = f"No optimizer step was done since {last}; look at the pod's log and node. Deleting the pod makes another one that resumes."
    return Verdict(verdict.phase, verdict.standing, Reason.NO_PROGRESS, sentence)


def _is_due(stored: Progress | None, fresh: Progress, now: datetime) -> bool:
    if stored is None or stored.step == 0 or stored.updated_at is None:
        return stored is None or stored.step != fresh.step
    if stored.model_copy(update={"updated_at": None}) == fresh.model_copy(update={"updated_at": None}):
        return False
    age_seconds = (now - datetime.fromisoformat(stored.updated_at)).total_seconds()
    return age_seconds >= PROGRESS_WRITE_SECONDS or age_seconds < 0


def _cleaned(item: Said) -> Said:
    """A part of what a container said, each of its texts cleaned and no longer than it was."""
    texts = {name: value for name, value in item if isinstance(value, str)}
    return item.model_copy(update={name: clean(text, len(text)) for name, text in texts.items()})


def _with_words(base: FineTuneJobStatus, said: TerminationMessage, *, final: bool) -> FineTuneJobStatus:
    """Takes the trainer's last words of an ended pod. A later pod's endpoint is newer in stage and progress, unless the run is over."""
    changes: dict[str, object] = {}
    if final:
        changes["stage"] = said.stage
    if final and said.total_steps:
        before = base.progress or Progress()
        changes["progress"] = before.model_copy(
            update={"step": said.step, "total_steps": said.total_steps, "summary": f"{said.step}/{said.total_steps}", "eta_seconds": 0}
        )
    changes |= {name: _cleaned(value) for name, value in (("quality", said.quality), ("qat", said.qat)) if value}
    if said.artifacts:
        changes["artifacts"] = tuple(_cleaned(item) for item in said.artifacts)
    if base.run and (said.model or said.dataset):
        resolved = {"model": clean(said.model) or base.run.model, "dataset": clean(said.dataset) or base.run.dataset}
        changes["run"] = base.run.model_copy(update=resolved)
    return base.model_copy(update=changes)


def _facts(spec: FineTuneJobSpec, base: FineTuneJobStatus, verdict: Verdict, last: Ending | None) -> Facts:
    """What is known of the four milestones; a milestone once reached in a run stays reached."""
    facts = _known_facts(base)
    succeeded = verdict.phase is Phase.SUCCEEDED
    reached = last.said.stage if last and last.said else base.stage
    if succeeded or reached in _AFTER_TRAINING:
        facts[ConditionType.TRAINED] = ("True", Reason.TRAINED, "The adapter is trained.")
    if base.quality and base.quality.shipped_matches_trained is not None:
        facts[ConditionType.VERIFIED] = _proof_fact(base.quality.shipped_matches_trained)
    if last and last.exit_code == ExitCode.PROOF:
        facts[ConditionType.VERIFIED] = ("False", REASONS[ExitCode.PROOF], last.sentence)
    gate = _gate_fact(spec, base, last, passed=succeeded and spec.quality.on_failure == "Fail")
    if gate:
        facts[ConditionType.QUALITY_PASSED] = gate
    if succeeded:
        facts[ConditionType.PUBLISHED] = ("True", Reason.PUBLISHED, _success_sentence(spec))
    elif last and last.exit_code == ExitCode.NOT_PUBLISHED:
        facts[ConditionType.PUBLISHED] = ("False", REASONS[ExitCode.NOT_PUBLISHED], last.sentence)
    return facts


def _proof_fact(holds: bool) -> tuple[Literal["True", "False", "Unknown"], str, str]:
    if holds:
        return "True", Reason.SHIPPED_MATCHES_TRAINED, "The exported model computes what the trained one does."
    return "False", REASONS[ExitCode.PROOF], "The exported model is not the trained one."


def _gate_fact(
    spec: FineTuneJobSpec, base: FineTuneJobStatus, last: Ending | None, *, passed: bool
) -> tuple[Literal["True", "False", "Unknown"], str, str] | None:
    if last and last.exit_code == ExitCode.QUALITY:
        return "False", REASONS[ExitCode.QUALITY], last.sentence
    limit, quality = spec.quality.max_loss_increase_percent, base.quality
    if limit is None or quality is None or not quality.tuned_loss or not quality.quantized_loss:
        return None
    try:
        tuned, quantized = float(quality.tuned_loss), float(quality.quantized_loss)
        increase = (quantized - tuned) / tuned * 100
    except (ValueError, ZeroDivisionError):
        return None
    sentence = f"Held-out loss: quantized {quality.quantized_loss}, tuned {quality.tuned_loss}, {increase:+.2f} %; the limit is {limit} %."
    # The trainer decides on unrounded losses: where it published under onFailure Fail, the gate was passed.
    return ("True", Reason.WITHIN_LIMIT, sentence) if passed or increase <= float(limit) else ("False", Reason.ABOVE_LIMIT, sentence)


def _known_facts(base: FineTuneJobStatus) -> Facts:
    milestones = (ConditionType.TRAINED, ConditionType.VERIFIED, ConditionType.QUALITY_PASSED, ConditionType.PUBLISHED)
    has_run = base.phase is not None
    return {item.type: (item.status, item.reason, item.message) for item in base.conditions if has_run and item.type in milestones}


def _finished_at(pod: Json) -> str:
    terminated = container_state(pod, "terminated") or {}
    return str(terminated.get("finishedAt") or pod["metadata"].get("creationTimestamp") or "")


def _completion_time(job: Json) -> str | None:
    ended = condition_of(job, "Complete") or condition_of(job, "Failed") or {}
    value = (job.get("status") or {}).get("completionTime") or ended.get("lastTransitionTime")
    return str(value) if value else None

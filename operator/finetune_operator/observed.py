"""Job, pods and progress in, status out: what a user reads in `kubectl describe ftj`. Pure; called by decide.py.

It carries over what the stored status knows of the same run, since pods come and go.
"""

from datetime import UTC, datetime, timedelta
from typing import TypeVar

from finetune_api.exits import REASONS, ExitCode
from finetune_api.fields import ApiModel
from finetune_api.spec import FineTuneJobSpec
from finetune_api.states import Reason
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase, Preflight, Progress, Quality, Stage, VerifiedBy
from finetune_api.termination import TerminationMessage

from finetune_operator.attempts import added_gpu_seconds, merge_attempts
from finetune_operator.conditions import ConditionValue, Facts, Standing, Verdict, build_conditions
from finetune_operator.diagnosis import Ending, container_state
from finetune_operator.redaction import clean
from finetune_operator.subject import FINAL, FineTuneJob, Json, World, carried_status, condition_of
from finetune_operator.verdict import last_ending, success_sentence, verdict_of

Said = TypeVar("Said", bound=ApiModel)
_AFTER_TRAINING = (Stage.EVALUATING, Stage.CONVERTING, Stage.VERIFYING, Stage.PUBLISHING)
PROGRESS_WRITE_SECONDS = 10


def timestamp(now: datetime) -> str:
    """A point in time as the API writes it."""
    return now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status_of(
    subject: FineTuneJob, base: FineTuneJobStatus, verdict: Verdict, now: datetime, facts: Facts | None = None
) -> FineTuneJobStatus:
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


def observed_status(world: World, job: Json, now: datetime, stuck_after: timedelta) -> FineTuneJobStatus:
    """The status of a run whose Job exists.

    Args:
        job: the training Job.
        stuck_after: a training that makes no step for so long is said to make no progress.
    """
    subject, spec = world.subject, world.subject.spec
    base = carried_status(subject)
    last = last_ending(world)
    attempts = merge_attempts(base.attempts, world.attended_pods, spec)
    base = base.model_copy(
        update={
            "attempts": attempts,
            "gpu_seconds": base.gpu_seconds + added_gpu_seconds(base.attempts, attempts, spec.resources.gpus),
            "start_time": base.start_time or next((item.start for item in attempts if item.start), None),
        }
    )
    verdict = verdict_of(world, job, base, last)
    if verdict.phase in FINAL:
        base = base.model_copy(update={"completion_time": _completion_time(job)})
    base = _with_live(base, world, verdict, now)
    if verdict.reason == Reason.RUNNING:
        verdict = _moving(world, base, verdict, now - stuck_after)
    if last and last.said:
        base = _with_words(base, last.said, final=verdict.phase in FINAL)
    return status_of(subject, base, verdict, now, _facts(spec, base, verdict, last))


def preflight_status(world: World, job: Json, now: datetime) -> FineTuneJobStatus:
    """The status of a run whose preflight Job exists and whose training Job does not: with the latch once it has passed."""
    base = carried_status(world.subject).model_copy(update={"stage": Stage.PREFLIGHT})
    last = last_ending(world)
    verdict = verdict_of(world, job, base, last)
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
    return status_of(world.subject, base, verdict, now)


def _with_live(base: FineTuneJobStatus, world: World, verdict: Verdict, now: datetime) -> FineTuneJobStatus:
    """Takes what the endpoint says: a new stage or the first step at once, later steps every 10 s at most."""
    report = world.progress
    if report is None or verdict.phase is not Phase.RUNNING or report.train_digest != world.subject.run.train_digest:
        return base
    # The trainer's clock is not trusted: updatedAt is the time of this reading, and throttles the next write.
    fresh = report.progress.model_copy(update={"updated_at": timestamp(now)}) if report.progress else None
    if fresh and base.stage == report.stage and not _is_due(base.progress, fresh, now):
        return base
    return base.model_copy(update={"stage": report.stage, "progress": _cleaned(fresh) if fresh else base.progress})


def _moving(world: World, base: FineTuneJobStatus, verdict: Verdict, since: datetime) -> Verdict:
    """The verdict, or NoProgress when the last step and the start of the pod that trains are both older than `since`. Nothing is stopped for it."""
    running = [state for pod in world.attended_pods if (state := container_state(pod, "running"))]
    if base.stage is not Stage.TRAINING or base.progress is None or not base.progress.updated_at or not running:
        return verdict
    stood = any(item.reason == Reason.NO_PROGRESS for item in world.subject.stored.conditions)
    if not stood and (world.progress is None or world.progress.train_digest != world.subject.run.train_digest):
        return verdict  # no answer, or none yet, is no standstill; one that was seen lasts until a step is seen
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
        facts[ConditionType.TRAINED] = ConditionValue("True", Reason.TRAINED, "The adapter is trained.")
    if base.quality and base.quality.shipped_matches_trained is not None:
        facts[ConditionType.VERIFIED] = _proof_fact(base.quality)
    if last and last.exit_code == ExitCode.PROOF:
        facts[ConditionType.VERIFIED] = ConditionValue("False", REASONS[ExitCode.PROOF], last.sentence)
    gate = _gate_fact(base, last)
    if gate:
        facts[ConditionType.QUALITY_PASSED] = gate
    if succeeded:
        facts[ConditionType.PUBLISHED] = ConditionValue("True", Reason.PUBLISHED, success_sentence(spec))
    elif last and last.exit_code == ExitCode.NOT_PUBLISHED:
        facts[ConditionType.PUBLISHED] = ConditionValue("False", REASONS[ExitCode.NOT_PUBLISHED], last.sentence)
    return facts


def _proof_fact(quality: Quality) -> ConditionValue:
    if quality.shipped_matches_trained and quality.verified_by == VerifiedBy.WEIGHTS:
        sentence = "The exported weights are the trained ones; no kernel of the scheme ran on this node."
        return ConditionValue("True", Reason.SHIPPED_MATCHES_TRAINED, sentence)
    if quality.shipped_matches_trained:
        return ConditionValue("True", Reason.SHIPPED_MATCHES_TRAINED, "The exported model computes what the trained one does.")
    return ConditionValue("False", REASONS[ExitCode.PROOF], "The exported model is not the trained one.")


def _gate_fact(base: FineTuneJobStatus, last: Ending | None) -> ConditionValue | None:
    """The trainer has decided, on losses that are not rounded. This only reports it."""
    if last and last.exit_code == ExitCode.QUALITY:
        return ConditionValue("False", REASONS[ExitCode.QUALITY], last.sentence)
    quality = base.quality
    if quality is None or quality.shortfall is None:
        return None
    if quality.shortfall:
        return ConditionValue("False", Reason.ABOVE_LIMIT, quality.shortfall)
    losses = {"base": quality.base_loss, "tuned": quality.tuned_loss, "PTQ": quality.ptq_loss, "quantized": quality.quantized_loss}
    told = ", ".join(f"{name} {loss}" for name, loss in losses.items() if loss)
    return ConditionValue("True", Reason.WITHIN_LIMIT, f"Held-out loss: {told}.")


def _known_facts(base: FineTuneJobStatus) -> Facts:
    milestones = (ConditionType.TRAINED, ConditionType.VERIFIED, ConditionType.QUALITY_PASSED, ConditionType.PUBLISHED)
    has_run = base.phase is not None
    return {
        item.type: ConditionValue(item.status, item.reason, item.message) for item in base.conditions if has_run and item.type in milestones
    }


def _completion_time(job: Json) -> str | None:
    ended = condition_of(job, "Complete") or condition_of(job, "Failed") or {}
    value = (job.get("status") or {}).get("completionTime") or ended.get("lastTransitionTime")
    return str(value) if value else None

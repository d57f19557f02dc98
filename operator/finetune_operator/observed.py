"""Observed state: FineTuneJob, Job, pods and progress in, the status they amount to out. Pure; reads nothing and decides nothing.

What pods say (termination messages, progress) is untrusted: it is parsed strictly and only ever shown.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api import names, termination
from finetune_api.exits import OOM_KILLED, REASONS, ExitCode
from finetune_api.progress import ProgressReport
from finetune_api.status import Attempt, Condition, ConditionType, FineTuneJobStatus, Phase, Progress, Quality, Run, Stage
from finetune_api.termination import TerminationMessage
from pydantic import ValidationError

from finetune_operator import conditions
from finetune_operator.conditions import Verdict

Manifest = dict[str, Any]

TERMINAL = (Phase.SUCCEEDED, Phase.FAILED)
_KEPT_ATTEMPTS = 10
_LOG_LIMIT = 400


@dataclass(frozen=True)
class World:
    """Everything that one reconcile read.

    Attributes:
        job: the FineTuneJob.
        owned: Jobs that this FineTuneJob controls (by UID).
        namesake: a Job that has the wanted name and is not ours.
        pods: pods of the wanted Job (by UID of their owner).
        progress: what the running trainer last said.
    """

    job: Manifest
    owned: tuple[Manifest, ...] = ()
    namesake: Manifest | None = None
    pods: tuple[Manifest, ...] = ()
    progress: ProgressReport | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run amounts to at this moment."""

    phase: Phase
    reason: str
    message: str
    stage: Stage | None = None
    last_words: TerminationMessage | None = field(default=None)


def stored_status(job: Manifest) -> FineTuneJobStatus:
    """The status as stored; an unreadable one (edited by hand, of another version) counts as none."""
    try:
        return FineTuneJobStatus.model_validate(job.get("status") or {})
    except ValidationError:
        return FineTuneJobStatus()


def is_latched(status: FineTuneJobStatus, run_digest: str) -> bool:
    """Whether this run has reached its end: nothing is ever started for it again."""
    return status.phase in TERMINAL and status.run is not None and status.run.run_digest == run_digest


def owner_uid(manifest: Manifest) -> str:
    """UID of an object's controller; empty without one."""
    owners = manifest["metadata"].get("ownerReferences") or []
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def job_ending(job: Manifest) -> Manifest | None:
    """The condition that ended a batch/v1 Job; None while it may still run."""
    listed = (job.get("status") or {}).get("conditions") or []
    return next((item for item in listed if item["type"] in ("Complete", "Failed") and item["status"] == "True"), None)


def read_outcome(world: World, job: Manifest) -> Outcome:
    """What the Job and its pods amount to."""
    ending = job_ending(job)
    last = _latest(world.pods)
    if ending is not None:
        return _succeeded(last) if ending["type"] == "Complete" else _failed(world, ending, last)
    if job["spec"].get("suspend"):
        return Outcome(Phase.SUSPENDED, "Suspended", "Suspended by runPolicy.suspend; set it to false to go on.")
    if last is None:
        return Outcome(Phase.PENDING, "WaitingForPod", "The Job is made and waits for its pod.")
    if _container_state(last).get("running"):
        return _running(world)
    return Outcome(Phase.PENDING, *_why_waiting(last))


def _running(world: World) -> Outcome:
    report = world.progress
    stage = report.stage if report else stored_status(world.job).stage
    shown = f"{stage.value}." if stage else "The trainer is starting."
    if report and stage is Stage.TRAINING and report.progress:
        shown = f"Training, step {report.progress.summary}."
    return Outcome(Phase.RUNNING, "Running", shown, stage)


def _succeeded(pod: Manifest | None) -> Outcome:
    said = _last_words(pod)
    places = ", ".join(dict.fromkeys(item.uri for item in said.artifacts)) if said else ""
    return Outcome(Phase.SUCCEEDED, "Succeeded", f"Published to {places}." if places else "The run is complete.", None, said)


def _failed(world: World, ending: Manifest, pod: Manifest | None) -> Outcome:
    said = _last_words(pod)
    stage = said.stage if said else None
    if ending.get("reason") == "DeadlineExceeded":
        return Outcome(Phase.FAILED, "DeadlineExceeded", "The run took longer than runPolicy.activeDeadlineSeconds; raise it.", stage, said)
    code = _exit_code(pod)
    if code == OOM_KILLED:
        return Outcome(Phase.FAILED, "OOMKilled", _out_of_memory(world, stage), stage, said)
    if said is not None and said.message:
        return Outcome(Phase.FAILED, said.reason or "Failed", said.message, stage, said)
    return Outcome(Phase.FAILED, _reason(code, ending), _what_is_left(pod, code, ending), stage, said)


def _out_of_memory(world: World, stage: Stage | None) -> str:
    memory = ((world.job.get("spec") or {}).get("resources") or {}).get("memory", "16Gi")
    where = f" while {stage.value}" if stage else ""
    return (
        f"The pod needed more memory than its limit of {memory}{where}; raise resources.memory, or lower training.maxLength or lora.rank."
    )


def _reason(code: int | None, ending: Manifest) -> str:
    known = REASONS.get(ExitCode(code)) if code in list(ExitCode) else None
    return known or str(ending.get("reason") or "Failed")


def _what_is_left(pod: Manifest | None, code: int | None, ending: Manifest) -> str:
    """Where the trainer left no sentence: the end of its log (the kubelet's fallback), else what Kubernetes says."""
    log = str((_container_state(pod).get("terminated") or {}).get("message") or "").strip() if pod else ""
    if log:
        return f"The trainer exited with {code}; its log ends: {log[-_LOG_LIMIT:]}"
    if pod is not None and pod["status"].get("message"):
        return f"{pod['status'].get('reason', 'Failed')}: {pod['status']['message']}"
    return str(ending.get("message") or "The Job failed.")


def _why_waiting(pod: Manifest) -> tuple[str, str]:
    """(reason, sentence) of a pod that does not run."""
    waiting = _container_state(pod).get("waiting") or {}
    if waiting.get("reason") in (
        "ErrImagePull",
        "ImagePullBackOff",
        "InvalidImageName",
        "CreateContainerConfigError",
        "CreateContainerError",
    ):
        image = pod["spec"]["containers"][0]["image"]
        return str(
            waiting["reason"]
        ), f"The container of image {image} can't start ({waiting.get('message') or waiting['reason']}); mend the image or its pull secret."
    for condition in pod["status"].get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return str(
                condition.get("reason") or "Unschedulable"
            ), f"No node takes the pod: {condition.get('message') or 'waiting for the scheduler'}"
    if _container_state(pod).get("terminated"):
        return "Restarting", "The last attempt ended; the next one is about to start."
    return "Starting", "The pod is starting."


def next_status(world: World, job: Manifest, run: Run, outcome: Outcome, now: str) -> FineTuneJobStatus:
    """The whole status of a run that has a Job."""
    before = _same_run(stored_status(world.job), run)
    said = outcome.last_words
    attempts = merge_attempts(before.attempts, (read_attempt(pod) for pod in _by_start(world.pods)))
    done = outcome.phase in TERMINAL
    if said is not None:
        run = run.model_copy(update={"model": said.model or run.model, "dataset": said.dataset or run.dataset})
    return FineTuneJobStatus(
        observed_generation=_generation(world.job),
        phase=outcome.phase,
        stage=outcome.stage if outcome.phase is not Phase.SUCCEEDED else None,
        message=outcome.message[:1024],
        conditions=conditions.stamp(_verdicts(outcome), before.conditions, _generation(world.job), now),
        progress=_progress(world, before, outcome, said),
        attempts=attempts,
        gpu_seconds=_gpu_seconds(attempts, world.job, before.gpu_seconds),
        quality=said.quality if said else before.quality,
        qat=said.qat if said else before.qat,
        artifacts=said.artifacts if said else before.artifacts,
        run=run.model_copy(update={"job_name": job["metadata"]["name"]}),
        start_time=before.start_time or next((attempt.start for attempt in attempts if attempt.start), None),
        completion_time=(before.completion_time or now) if done else None,
    )


def waiting_status(world: World, run: Run, verdicts: tuple[Verdict, ...], phase: Phase, now: str) -> FineTuneJobStatus:
    """The status of a run without a Job: it waits for one, or a person must act."""
    before = _same_run(stored_status(world.job), run)
    return before.model_copy(
        update={
            "observed_generation": _generation(world.job),
            "phase": phase,
            "message": verdicts[0].message[:1024],
            "conditions": conditions.stamp(verdicts, before.conditions, _generation(world.job), now),
            "run": before.run or run,
        }
    )


def read_attempt(pod: Manifest) -> Attempt:
    """One pod as an attempt."""
    state = _container_state(pod)
    ended = state.get("terminated") or {}
    started = ended.get("startedAt") or (state.get("running") or {}).get("startedAt")
    code = ended.get("exitCode")
    reason = REASONS[ExitCode(code)] if code in list(ExitCode) else str(ended.get("reason") or pod["status"].get("reason") or "")
    return Attempt(pod_uid=pod["metadata"]["uid"], start=started, end=ended.get("finishedAt"), exit_code=code, reason=reason[:256])


def merge_attempts(before: Iterable[Attempt], now: Iterable[Attempt]) -> tuple[Attempt, ...]:
    """The last attempts, one for each pod; a pod that is gone keeps what was known of it."""
    known = {attempt.pod_uid: attempt for attempt in before}
    for attempt in now:
        known[attempt.pod_uid] = attempt
    return tuple(list(known.values())[-_KEPT_ATTEMPTS:])


def _verdicts(outcome: Outcome) -> tuple[Verdict, ...]:
    if outcome.phase is Phase.SUCCEEDED:
        return (*conditions.succeeded(outcome.reason, outcome.message), *_milestones(outcome))
    if outcome.phase is Phase.FAILED:
        return (*conditions.stalled(outcome.reason, outcome.message), *_milestones(outcome))
    if outcome.phase is Phase.SUSPENDED:
        return conditions.resting(outcome.reason, outcome.message)
    return conditions.in_progress(outcome.reason, outcome.message)


def _milestones(outcome: Outcome) -> tuple[Verdict, ...]:
    """What the trainer's last words prove; nothing is claimed without them."""
    said = outcome.last_words
    if said is None:
        return ()
    published = outcome.phase is Phase.SUCCEEDED
    found = [Verdict(ConditionType.PUBLISHED, published, "Published" if published else outcome.reason, outcome.message)]
    if published or said.stage in (Stage.EVALUATING, Stage.CONVERTING, Stage.VERIFYING, Stage.PUBLISHING) or said.quality is not None:
        found.append(Verdict(ConditionType.TRAINED, True, "Trained", "Every optimizer step is done."))
    quality = said.quality or Quality()
    if quality.shipped_matches_trained is not None or said.exit_code == ExitCode.PROOF:
        held = bool(quality.shipped_matches_trained)
        found.append(
            Verdict(
                ConditionType.VERIFIED,
                held,
                "ShippedMatchesTrained" if held else "ProofFailed",
                "What is shipped is what was trained." if held else outcome.message,
            )
        )
    if said.exit_code == ExitCode.QUALITY:
        found.append(Verdict(ConditionType.QUALITY_PASSED, False, "QualityGateFailed", outcome.message))
    elif published and quality.quantized_loss is not None:
        found.append(Verdict(ConditionType.QUALITY_PASSED, True, "WithinLimits", "The quantized model is within quality's limits."))
    return tuple(found)


def _progress(world: World, before: FineTuneJobStatus, outcome: Outcome, said: TerminationMessage | None) -> Progress | None:
    if world.progress and world.progress.progress:
        return world.progress.progress
    known = before.progress
    if said and said.total_steps and (known is None or known.step < said.step):
        summary = f"{said.step}/{said.total_steps}"
        return (known or Progress()).model_copy(
            update={"summary": summary, "step": said.step, "total_steps": said.total_steps, "eta_seconds": 0}
        )
    return known.model_copy(update={"eta_seconds": 0}) if known and outcome.phase in TERMINAL else known


def _gpu_seconds(attempts: tuple[Attempt, ...], job: Manifest, before: int) -> int:
    """A lower bound: pods that ended, times the GPUs of the spec."""
    gpus = int(((job.get("spec") or {}).get("resources") or {}).get("gpus", 1))
    seconds = sum((_parse_time(item.end) - _parse_time(item.start)).total_seconds() for item in attempts if item.start and item.end)
    return max(before, round(seconds * gpus))


def _parse_time(stamp: str) -> datetime:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00"))


def _same_run(status: FineTuneJobStatus, run: Run) -> FineTuneJobStatus:
    """What a status knows of this run; of an earlier run, only its conditions' times are kept."""
    if status.run is not None and status.run.run_digest == run.run_digest:
        return status
    kept: tuple[Condition, ...] = tuple(item for item in status.conditions if item.type in (ConditionType.READY, ConditionType.RECONCILING))
    return FineTuneJobStatus(conditions=kept)


def _generation(job: Manifest) -> int:
    return int(job["metadata"].get("generation", 0))


def _by_start(pods: tuple[Manifest, ...]) -> list[Manifest]:
    return sorted(pods, key=lambda pod: (pod["metadata"].get("creationTimestamp", ""), pod["metadata"]["name"]))


def _latest(pods: tuple[Manifest, ...]) -> Manifest | None:
    """The newest pod; one that succeeded wins over those that failed."""
    ordered = _by_start(pods)
    done = [pod for pod in ordered if (pod.get("status") or {}).get("phase") == "Succeeded"]
    return (done or ordered or [None])[-1]  # type: ignore[list-item]


def _container_state(pod: Manifest | None) -> Manifest:
    statuses = ((pod or {}).get("status") or {}).get("containerStatuses") or []
    return next((dict(item.get("state") or {}) for item in statuses if item["name"] == names.CONTAINER), {})


def _exit_code(pod: Manifest | None) -> int | None:
    code = (_container_state(pod).get("terminated") or {}).get("exitCode")
    return int(code) if code is not None else None


def _last_words(pod: Manifest | None) -> TerminationMessage | None:
    return termination.parse(str((_container_state(pod).get("terminated") or {}).get("message") or ""))

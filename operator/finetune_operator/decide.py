"""What to do about one FineTuneJob: an ordered list of small policies, of which the first that answers makes the plan. Pure and total.

The list is the specification; only an object whose spec can't be read is handled before it. A plan is data; execution.py executes its actions
in order and stops at the first that fails, so that "status first, then the TTL" is said by the order alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from finetune_api.exits import ExitCode
from finetune_api.states import Reason
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase

from finetune_operator.conditions import Standing, Verdict
from finetune_operator.desired import build_job, build_live_fields, build_preflight_job
from finetune_operator.diagnosis import container_state, ending_of, has_filled_its_disk, has_seen_a_full_disk
from finetune_operator.job_events import CREATED, JobEvent, build_event, new_events
from finetune_operator.observed import observed_status, preflight_status, status_of, timestamp
from finetune_operator.plan import Action, CreateJob, DeleteJob, EmitEvent, PatchJob, Plan, WriteStatus, merge_patch
from finetune_operator.redaction import clean
from finetune_operator.settings import Settings
from finetune_operator.subject import (
    FINAL,
    FineTuneJob,
    Json,
    Unreadable,
    World,
    carried_status,
    condition_of,
    is_being_deleted,
    is_finished,
    is_unfinished,
)
from finetune_operator.timing import NEW_POD_SECONDS, again_seconds, is_settling

CHECKPOINTED_LIMIT = 20  # endings "checkpointed" that nothing disrupted: Kubernetes ignores them without end, we do not
FIRST_LOOK_SECONDS = NEW_POD_SECONDS + 1  # until a new Job is looked at: its own event, the echo of our request, is no news
EVICTED_LIMIT = 3  # evictions for the pod's own use of its disk
FULL_DISK_LIMIT = 8  # evictions because the node's disk was full


@dataclass(frozen=True)
class Situation:
    """What a policy may look at."""

    world: World
    now: datetime
    settings: Settings


def decide(seen: World | Unreadable, now: datetime, settings: Settings) -> Plan:
    """The plan for one FineTuneJob."""
    if isinstance(seen, Unreadable):
        return stall_on_an_unreadable_spec(seen, now)
    situation = Situation(seen, now, settings)
    return next(plan for policy in POLICIES if (plan := policy(situation)) is not None)


def stall_on_an_unreadable_spec(subject: Unreadable, now: datetime) -> Plan:
    """The spec was stored under another schema. Nothing is started or stopped for it."""
    if is_being_deleted(subject.raw) or not is_unfinished(subject.raw):
        return Plan()  # it goes, or it ended before this version came: what stands there stays true
    verdict = Verdict(subject.stored.phase or Phase.PENDING, Standing.STALLED, Reason.INVALID_SPEC, clean(subject.problem))
    return Plan(_write_status(subject, status_of(subject, subject.stored, verdict, now)))


def leave_what_is_being_deleted(situation: Situation) -> Plan | None:
    """Kubernetes cleans up by the owner references."""
    return Plan() if is_being_deleted(situation.world.subject.raw) else None


def keep_what_has_ended(situation: Situation) -> Plan | None:
    """This is the latch: a run whose end is stored starts nothing, even when its Job is gone. Only now does the Job get its TTL."""
    subject = situation.world.subject
    if not subject.is_latched:
        return None
    # The patch is made on the raw status: what a newer operator wrote and this one can't read must not be lost, least of all the digest of the latch.
    seen = {"observedGeneration": subject.generation}
    raw: Json = subject.raw["status"]
    patch = merge_patch(raw, raw | seen | {"conditions": [item | seen for item in raw.get("conditions", ())]})
    unfinished = [job for job in situation.world.jobs if not is_finished(job)]
    write = (WriteStatus(patch),) if patch else ()
    return Plan((*_fenced(write, _delete(unfinished)), *_ttl(situation)))


def stall_on_what_is_not_allowed(situation: Situation) -> Plan | None:
    """A spec that is not allowed is refused before anything is started. What an earlier spec started is stopped; a Job of this very spec is left alone."""
    world = situation.world
    problem = _refusal(situation)
    if not problem or world.current is not None:
        return None
    reason = Reason.INVALID_SPEC if world.subject.problem else Reason.NOT_ALLOWED
    return Plan(_fenced(_pending(situation, Standing.STALLED, reason, problem), _delete(list(world.jobs))))


def wait_until_other_jobs_are_gone(situation: Situation) -> Plan | None:
    """One object never has two training Jobs: the Job of an earlier spec goes, with its pods, before this run's Job comes."""
    world = situation.world
    # A preflight Job that its own TTL removes is in nobody's way once the training has begun.
    is_training = world.current is not None and not is_being_deleted(world.current)
    staying = [job for job in (world.current, world.preflight) if job and (is_training or not is_being_deleted(job))]
    in_the_way = [job for job in world.jobs if job not in staying]
    if not in_the_way:
        return None
    name = in_the_way[0]["metadata"]["name"]
    sentence = f"Waiting until Job {name} and its pods are gone."
    return Plan(_fenced(_pending(situation, Standing.RECONCILING, Reason.REPLACING, sentence), _delete(in_the_way)), NEW_POD_SECONDS)


def stall_on_a_namesake(situation: Situation) -> Plan | None:
    """A Job of this run's name that someone else made is never touched."""
    world = situation.world
    if world.namesake is None or world.current is not None:
        return None
    name = world.namesake["metadata"]["name"]
    sentence = f"A Job named {name} exists and does not belong to this FineTuneJob; delete it, or set runPolicy.rerun to get another name."
    return Plan(_pending(situation, Standing.STALLED, Reason.NAME_TAKEN, sentence))


def wait_until_orphaned_pods_are_gone(situation: Situation) -> Plan | None:
    """A Job that was deleted by hand may leave its trainer at work for its grace period. One object never has two trainers."""
    world = situation.world
    if not world.orphaned_pods or world.current is not None:
        return None
    name = world.orphaned_pods[0]["metadata"]["name"]
    sentence = f"Waiting until pod {name} of a deleted Job has ended."
    return Plan(_pending(situation, Standing.RECONCILING, Reason.REPLACING, sentence), NEW_POD_SECONDS)


def stop_what_only_checkpoints(situation: Situation) -> Plan | None:
    """A trainer that ends as "checkpointed" again and again, with nothing that disrupts it, would restart without end."""
    job = situation.world.attended
    if job is None or is_finished(job):
        return None
    undisturbed = [pod for pod in situation.world.ended_pods if not condition_of(pod, "DisruptionTarget")]
    endings = [container_state(pod, "terminated") or {} for pod in undisturbed]
    if sum(ending.get("exitCode") == ExitCode.CHECKPOINTED for ending in endings) < CHECKPOINTED_LIMIT:
        return None
    sentence = (
        f"The trainer stopped {CHECKPOINTED_LIMIT} times by itself after saving a checkpoint; see the pods' logs, then set runPolicy.rerun."
    )
    return _stop(situation, job, Reason.CHECKPOINTED_TOO_OFTEN, sentence)


def stop_what_fills_its_disk(situation: Situation) -> Plan | None:
    """Kubernetes takes an eviction for a disruption and never counts it. After one for a full disk, the next pod would write as much again."""
    job = situation.world.attended
    if job is None or is_finished(job):
        return None
    for is_so, limit in ((has_filled_its_disk, EVICTED_LIMIT), (has_seen_a_full_disk, FULL_DISK_LIMIT)):
        evicted = [pod for pod in situation.world.ended_pods if is_so(pod)]
        if len(evicted) >= limit:
            sentence = f"{ending_of(evicted[-1], situation.world.subject.spec).sentence} (Given up after {limit} evictions.)"
            return _stop(situation, job, Reason.EVICTED, sentence)
    return None


def check_before_a_gpu_is_asked_for(situation: Situation) -> Plan | None:
    """The preflight Job comes first. That it has passed is stored before the training Job is made, and it is not run again."""
    world, base = situation.world, carried_status(situation.world.subject)
    if world.current is not None or base.preflight or base.attempts or not _wants_preflight(world):
        return None
    job = world.preflight
    if job is None:
        return _creation(situation, build_preflight_job(world.subject, situation.settings))
    if is_settling(world, situation.now):
        return Plan(_live(situation), again_seconds(world, situation.now))
    status = preflight_status(world, job, situation.now)
    if status.preflight:
        create = CreateJob(build_job(world.subject, situation.settings))
        return Plan(_fenced(_write(situation, status), (create,)), FIRST_LOOK_SECONDS)
    if status.phase is Phase.FAILED:
        return Plan(_write(situation, status))
    return Plan(_going_on(situation, status), again_seconds(world, situation.now))


def create_what_is_missing(situation: Situation) -> Plan | None:
    """The run has no Job yet, or lost it before its end."""
    world = situation.world
    return _creation(situation, build_job(world.subject, situation.settings)) if world.current is None else None


def report_what_is_seen(situation: Situation) -> Plan | None:
    """The Job exists: live fields follow the spec, the status follows the pods."""
    world, job = situation.world, situation.world.current
    if job is None:
        return None
    if is_settling(world, situation.now):
        return Plan(_live(situation), again_seconds(world, situation.now))
    status = observed_status(world, job, situation.now, situation.settings.stuck_after)
    if status.phase in FINAL:
        return Plan((*_write(situation, status), *_ttl(situation)))
    return Plan(_going_on(situation, status), again_seconds(world, situation.now))


Policy = Callable[[Situation], Plan | None]
POLICIES: tuple[Policy, ...] = (
    leave_what_is_being_deleted,
    keep_what_has_ended,
    stall_on_what_is_not_allowed,
    wait_until_other_jobs_are_gone,
    stall_on_a_namesake,
    wait_until_orphaned_pods_are_gone,
    stop_what_only_checkpoints,
    stop_what_fills_its_disk,
    check_before_a_gpu_is_asked_for,
    create_what_is_missing,
    report_what_is_seen,
)


def report_a_refused_job(situation: Situation, refusal: str, *, needs_edit: bool) -> Plan:
    """The API server takes no such Job: a quota is used up, an admission policy says no, or the pod is not valid. It is tried again.

    Args:
        refusal: what the API server said.
        needs_edit: whether only an edit can mend it.
    """
    standing = Standing.STALLED if needs_edit else Standing.RECONCILING
    sentence = f"The API server refuses the Job: {clean(refusal, 800).rstrip('.')}; correct the spec, the quota or the policy."
    return Plan(_pending(situation, standing, Reason.JOB_REFUSED, sentence))


def report_a_refused_change(situation: Situation, refusal: str, *, needs_edit: bool) -> Plan:
    """The API server does not let the Job be changed as runPolicy asks. The run goes on as it was, and the change is tried again.

    Args:
        refusal: what the API server said.
        needs_edit: whether only an edit can mend it.
    """
    subject = situation.world.subject
    base = carried_status(subject)
    if base.phase in FINAL:  # it was the TTL: an end that is stored keeps its words
        return Plan()
    sentence = f"The API server refuses to change the Job as runPolicy asks: {clean(refusal, 800).rstrip('.')}; take the edit back, or correct the policy."
    standing = Standing.STALLED if needs_edit else Standing.RECONCILING
    verdict = Verdict(base.phase or Phase.PENDING, standing, Reason.CHANGE_REFUSED, clean(sentence))
    return Plan(_write(situation, status_of(subject, base, verdict, situation.now)))


def report_a_refused_status(subject: FineTuneJob, refusal: str, now: datetime) -> Plan:
    """The API server may refuse every status of an object whose spec is older than the CRD's rules. Only an event can say so."""
    event = JobEvent(Reason.INVALID_SPEC, clean(f"The API server takes no status for this object: {refusal}", 900))
    return Plan((EmitEvent(build_event(subject, event, now)),))


def _stop(situation: Situation, job: Json, reason: Reason, sentence: str) -> Plan:
    """Ends a run, or its preflight, that Kubernetes would let go on."""
    world, now = situation.world, situation.now
    verdict = Verdict(Phase.FAILED, Standing.STALLED, reason, clean(sentence))
    seen = observed_status(world, job, now, situation.settings.stuck_after) if world.current else preflight_status(world, job, now)
    status = status_of(world.subject, seen.model_copy(update={"completion_time": timestamp(now)}), verdict, now)
    return Plan(_fenced(_write(situation, status), _delete([job])))


def _write(situation: Situation, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """Writes the status where it differs, and then the events about what has changed."""
    subject = situation.world.subject
    write = _write_status(subject, status)
    events = new_events(carried_status(subject), status) if write else ()
    return (*write, *(EmitEvent(build_event(subject, event, situation.now)) for event in events))


def _going_on(situation: Situation, status: FineTuneJobStatus) -> tuple[Action, ...]:
    """What is seen of a run that has not ended, and then the live fields: a refused change must not keep the status from being written."""
    live = _live(situation)
    return (*_write(situation, _with_refusal(situation, status) if live else status), *live)


def _with_refusal(situation: Situation, status: FineTuneJobStatus) -> FineTuneJobStatus:
    """The status with the refusal of a change that is still wanted: it stands until the change is let, and is not written anew at each attempt."""
    subject = situation.world.subject
    refusals = {item.type: item for item in carried_status(subject).conditions if item.reason == Reason.CHANGE_REFUSED}
    if not refusals or status.phase is None:
        return status
    standing = Standing.STALLED if ConditionType.STALLED in refusals else Standing.RECONCILING
    verdict = Verdict(status.phase, standing, Reason.CHANGE_REFUSED, refusals[ConditionType.READY].message)
    return status_of(subject, status, verdict, situation.now)


def _write_status(subject: FineTuneJob, status: FineTuneJobStatus) -> tuple[Action, ...]:
    patch = merge_patch(subject.raw.get("status") or {}, status.wire())
    return (WriteStatus(patch),) if patch else ()


def _fenced(write: tuple[Action, ...], actions: tuple[Action, ...]) -> tuple[Action, ...]:
    """Puts the status first, even as an empty patch: its resourceVersion stops an operator that decided before an edit or an end was stored."""
    return (*(write or ((WriteStatus({}),) if actions else ())), *actions)


def _delete(jobs: list[Json]) -> tuple[Action, ...]:
    return tuple(DeleteJob(job["metadata"]["name"], job["metadata"]["uid"]) for job in jobs if not is_being_deleted(job))


def _ttl(situation: Situation) -> tuple[Action, ...]:
    job = situation.world.current
    if job is None or is_being_deleted(job) or not is_finished(job):
        return ()
    wanted = situation.world.subject.spec.run_policy.ttl_seconds_after_finished
    if job["spec"].get("ttlSecondsAfterFinished") == wanted:
        return ()
    return (PatchJob(job["metadata"]["name"], {"spec": {"ttlSecondsAfterFinished": wanted}}),)


def _live(situation: Situation) -> tuple[Action, ...]:
    job = situation.world.attended
    if job is None:
        return ()
    wanted = build_live_fields(situation.world.subject.spec)
    stored = {name: job["spec"][name] for name in ("suspend", "backoffLimit", "activeDeadlineSeconds") if name in job["spec"]}
    patch = merge_patch({"suspend": False, **stored}, wanted)
    return (PatchJob(job["metadata"]["name"], {"spec": patch}),) if patch else ()


def _refusal(situation: Situation) -> str:
    subject, settings = situation.world.subject, situation.settings
    if subject.problem:
        return subject.problem
    pod = subject.spec.pod
    if not settings.allows_image(pod.image):
        return f"spec.pod.image: {pod.image} is not an image that the administrator allows; remove it, or ask for it to be put on allowedImages."
    if not settings.allows_service_account(pod.service_account_name):
        name = pod.service_account_name
        return f"spec.pod.serviceAccountName: {name} is not one that the administrator allows; remove it, or ask for it to be put on allowedServiceAccounts."
    return ""


def _wants_preflight(world: World) -> bool:
    spec = world.subject.spec
    return spec.resources.gpus > 0 and spec.run_policy.preflight == "Auto"


def _creation(situation: Situation, manifest: Json) -> Plan:
    """Makes the Job, between a status and an event that say so. A refusal of an earlier attempt stays in the status until one succeeds."""
    subject = situation.world.subject
    created = JobEvent(CREATED, f"The Job {manifest['metadata']['name']} was made.")
    create = (CreateJob(manifest), EmitEvent(build_event(subject, created, situation.now)))
    base = carried_status(subject)
    if base.phase is not None and any(item.reason == Reason.JOB_REFUSED for item in base.conditions):
        return Plan(_fenced((), create), FIRST_LOOK_SECONDS)
    said = _pending(situation, Standing.RECONCILING, Reason.JOB_CREATED, "Waiting for the Job to make its pod.")
    return Plan(_fenced(said, create), FIRST_LOOK_SECONDS)


def _pending(situation: Situation, standing: Standing, reason: Reason, sentence: str) -> tuple[Action, ...]:
    """Says why a run has no pod at work."""
    subject = situation.world.subject
    verdict = Verdict(Phase.PENDING, standing, reason, clean(sentence))
    return _write(situation, status_of(subject, carried_status(subject), verdict, situation.now))

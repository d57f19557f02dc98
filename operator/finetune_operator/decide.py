"""Decides: the world in, a plan out. Pure and total; the ordered list of policies below is the specification.

A plan is data: first the actions on children, then the status, each safe to repeat. reconcile.py executes it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from finetune_api import names
from finetune_api.digests import run_digest, train_digest
from finetune_api.exits import ExitCode
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus, Phase, Run
from finetune_api.validation import parse_spec, spec_problems

from finetune_operator import conditions
from finetune_operator.desired import build_job, live_patch
from finetune_operator.observed import (
    Outcome,
    World,
    is_latched,
    job_ending,
    next_status,
    owner_uid,
    read_attempt,
    read_outcome,
    stored_status,
    waiting_status,
)
from finetune_operator.settings import Settings

Manifest = dict[str, Any]

MOST_CHECKPOINTED_RESTARTS = 20


@dataclass(frozen=True)
class CreateJob:
    """Make this Job; one that exists and is ours counts as made."""

    manifest: Manifest


@dataclass(frozen=True)
class PatchJob:
    """Merge-patch a Job of ours."""

    name: str
    patch: Manifest


@dataclass(frozen=True)
class DeleteJob:
    """Delete exactly this Job in the foreground: a plain delete would orphan its pods, and they would keep their GPUs."""

    name: str
    uid: str


Action = CreateJob | PatchJob | DeleteJob


@dataclass(frozen=True)
class Plan:
    """What is to be done now.

    Attributes:
        actions: on Jobs, in order.
        status: the status to store where it differs; None leaves it.
    """

    actions: tuple[Action, ...] = ()
    status: FineTuneJobStatus | None = None


@dataclass(frozen=True)
class Case:
    """The world, with what every policy asks for worked out."""

    world: World
    spec: FineTuneJobSpec
    run: Run
    settings: Settings
    now: str

    @property
    def wanted_name(self) -> str:
        """Name of this run's Job."""
        metadata = self.world.job["metadata"]
        return names.training_job_name(metadata["name"], metadata["uid"], self.run.run_digest)

    @property
    def current(self) -> Manifest | None:
        """This run's Job."""
        return next((job for job in self.world.owned if job["metadata"]["name"] == self.wanted_name), None)

    def stall(self, reason: str, message: str) -> Plan:
        """A person must act; nothing is started."""
        return Plan(status=waiting_status(self.world, self.run, conditions.stalled(reason, message), Phase.PENDING, self.now))

    def wait(self, reason: str, message: str) -> FineTuneJobStatus:
        """The status while something is under way and no Job stands for it."""
        return waiting_status(self.world, self.run, conditions.in_progress(reason, message), Phase.PENDING, self.now)


def decide(world: World, settings: Settings, now: str) -> Plan:
    """The plan for one FineTuneJob.

    Args:
        world: what was read.
        settings: the administrator's.
        now: RFC 3339, UTC.
    """
    if world.job["metadata"].get("deletionTimestamp"):
        return Plan()  # owner references clean up
    problems = spec_problems(world.job.get("spec"), local=False)
    if problems:
        return _invalid(world, str(problems[0]), now)
    spec = parse_spec(world.job["spec"])
    run = Run(train_digest=train_digest(spec), run_digest=run_digest(spec))
    case = Case(world, spec, run, settings, now)
    return next(plan for policy in POLICIES if (plan := policy(case)) is not None)


def keep_latched(case: Case) -> Plan | None:
    """A run that reached its end stays so; only its Job's clean-up time is still to be set, now that the end is stored."""
    status = stored_status(case.world.job)
    if not is_latched(status, case.run.run_digest):
        return None
    generation = int(case.world.job["metadata"].get("generation", 0))
    seen = status.model_copy(
        update={
            "observed_generation": generation,
            "conditions": tuple(item.model_copy(update={"observed_generation": generation}) for item in status.conditions),
        }
    )
    job, ttl = case.current, case.spec.run_policy.ttl_seconds_after_finished
    stale = job is not None and job_ending(job) is not None and job["spec"].get("ttlSecondsAfterFinished") != ttl
    patch = (PatchJob(job["metadata"]["name"], {"spec": {"ttlSecondsAfterFinished": ttl}}),) if job is not None and stale else ()
    return Plan(patch, seen)


def refuse_image(case: Case) -> Plan | None:
    """Only images that the administrator allows."""
    image = case.spec.pod.image
    if not image or _allowed(image, case.settings.allowed_images):
        return None
    return case.stall(
        "ImageNotAllowed",
        f"spec.pod.image is {image!r}, which the operator's allowedImages does not name; remove it or ask the administrator.",
    )


def refuse_service_account(case: Case) -> Plan | None:
    """Only service accounts that the administrator allows."""
    account = case.spec.pod.service_account_name
    if not account or _allowed(account, case.settings.allowed_service_accounts):
        return None
    return case.stall(
        "ServiceAccountNotAllowed",
        f"spec.pod.serviceAccountName is {account!r}, which the operator's allowedServiceAccounts does not name; remove it or ask the administrator.",
    )


def stop_older_runs(case: Case) -> Plan | None:
    """Never two training Jobs of one object: Jobs of other runs go first, and are gone before the next one is made."""
    older = [job for job in case.world.owned if job["metadata"]["name"] != case.wanted_name]
    if not older:
        return None
    going = tuple(
        DeleteJob(job["metadata"]["name"], job["metadata"]["uid"]) for job in older if not job["metadata"].get("deletionTimestamp")
    )
    return Plan(going, case.wait("Replacing", "The spec has changed; the Job of the earlier run is being stopped."))


def respect_namesake(case: Case) -> Plan | None:
    """A Job of the wanted name that is not ours is never touched."""
    if case.world.namesake is None:
        return None
    owner = owner_uid(case.world.namesake) or "nobody"
    return case.stall("NameTaken", f"Job {case.wanted_name} exists and belongs to {owner}, not to this FineTuneJob; delete or rename it.")


def make_job(case: Case) -> Plan | None:
    """No Job stands for this run: make it. One that was deleted by hand is made again, and resumes."""
    if case.current is not None:
        return None
    manifest = build_job(case.world.job["metadata"], case.spec, case.settings)
    return Plan((CreateJob(manifest),), case.wait("Creating", "The training Job is being made."))


def await_deletion(case: Case) -> Plan | None:
    """The run's Job is going away, by someone's hand: wait until it is gone."""
    job = case.current
    if job is None or not job["metadata"].get("deletionTimestamp"):
        return None
    return Plan(status=case.wait("Replacing", "The training Job was deleted; another one is made as soon as it is gone."))


def end_restarts(case: Case) -> Plan | None:
    """Restarts after SIGTERM are free, but not without end."""
    job = case.current
    attempts = [read_attempt(pod) for pod in case.world.pods]
    saved = sum(attempt.exit_code == ExitCode.CHECKPOINTED for attempt in attempts)
    if job is None or job_ending(job) is not None or saved <= MOST_CHECKPOINTED_RESTARTS:
        return None
    sentence = f"The pod was stopped {saved} times; look for what evicts it, then set runPolicy.rerun to a new string."
    status = next_status(case.world, job, case.run, Outcome(Phase.FAILED, "StoppedTooOften", sentence), case.now)
    return Plan((DeleteJob(job["metadata"]["name"], job["metadata"]["uid"]),), status)


def follow_job(case: Case) -> Plan:
    """The run's Job stands: live fields go to it, and what it says goes to the status."""
    job = case.current
    if job is None:
        raise AssertionError("make_job comes before follow_job")
    patch = live_patch(job, case.spec) if job_ending(job) is None else {}
    actions = (PatchJob(job["metadata"]["name"], patch),) if patch else ()
    return Plan(actions, next_status(case.world, job, case.run, read_outcome(case.world, job), case.now))


POLICIES: tuple[Callable[[Case], Plan | None], ...] = (
    keep_latched,
    refuse_image,
    refuse_service_account,
    stop_older_runs,
    respect_namesake,
    make_job,
    await_deletion,
    end_restarts,
    follow_job,
)


def _invalid(world: World, problem: str, now: str) -> Plan:
    """A spec that was stored before the schema changed: say so, and touch nothing."""
    run = stored_status(world.job).run or Run()
    return Plan(status=waiting_status(world, run, conditions.stalled("InvalidSpec", problem), Phase.PENDING, now))


def _allowed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)

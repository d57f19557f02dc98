"""The FineTuneJob as decisions see it, and the world around it: frozen facts, as read from the API in one pass. Pure."""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from finetune_api import names
from finetune_api.digests import run_digest, train_digest
from finetune_api.progress import ProgressReport
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus, Phase, Run
from finetune_api.validation import parse_spec, spec_problems
from pydantic import ValidationError

Json = dict[str, Any]

FINAL = (Phase.SUCCEEDED, Phase.FAILED)


@dataclass(frozen=True, order=True)
class Key:
    """The name of one FineTuneJob. The work queue holds such keys."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class FineTuneJob:
    """One FineTuneJob as read, whatever its spec.

    Attributes:
        raw: the object as JSON values.
        problem: the first thing that is wrong with the spec, as a sentence; empty when all is well.
    """

    raw: Json
    problem: str

    @property
    def metadata(self) -> Json:
        """The object's metadata."""
        return dict(self.raw["metadata"])

    @property
    def key(self) -> Key:
        """Namespace and name."""
        return Key(self.metadata["namespace"], self.metadata["name"])

    @property
    def uid(self) -> str:
        """The object's UID."""
        return str(self.metadata["uid"])

    @property
    def generation(self) -> int:
        """The API server's count of the edits of the spec."""
        return int(self.metadata.get("generation", 0))

    @property
    def stored(self) -> FineTuneJobStatus:
        """The status as stored; fields that this version can't read are left out."""
        return read_status(self.raw.get("status") or {})


@dataclass(frozen=True)
class Unreadable(FineTuneJob):
    """A FineTuneJob whose spec does not have the structure that this version knows."""


@dataclass(frozen=True)
class Subject(FineTuneJob):
    """A FineTuneJob whose spec can be read, so that it can be acted on.

    Attributes:
        digests: trainDigest and runDigest of the spec.
    """

    spec: FineTuneJobSpec
    digests: tuple[str, str]

    @cached_property
    def run(self) -> Run:
        """The run that the spec asks for."""
        job_name = names.training_job_name(self.key.name, self.uid, self.digests[1])
        return Run(train_digest=self.digests[0], run_digest=self.digests[1], job_name=job_name)

    @property
    def is_latched(self) -> bool:
        """Whether the run that the spec asks for has ended. Read from the raw status, so that no other field can hide it."""
        status = self.raw.get("status") or {}
        return status.get("phase") in FINAL and (status.get("run") or {}).get("runDigest") == self.run.run_digest


@dataclass(frozen=True)
class World:
    """Everything that a decision may look at.

    Attributes:
        subject: the FineTuneJob.
        jobs: the batch Jobs that it owns.
        namesake: a Job that has the name of this run's but another owner.
        pods: the pods of the owned Jobs.
        orphaned_pods: pods at work that carry this object's label and belong to none of its Jobs.
        warnings: texts of warning events, newest first; only read where nothing else says why a pod is not there.
        progress: what the trainer's endpoint says; None when it was not asked or did not answer.
    """

    subject: Subject
    jobs: tuple[Json, ...] = ()
    namesake: Json | None = None
    pods: tuple[Json, ...] = ()
    orphaned_pods: tuple[Json, ...] = ()
    warnings: tuple[str, ...] = ()
    progress: ProgressReport | None = None

    @property
    def current(self) -> Json | None:
        """The owned Job of the run that the spec asks for."""
        return self._job(self.subject.run.job_name)

    @property
    def preflight(self) -> Json | None:
        """The owned Job that goes before the current one."""
        return self._job(names.preflight_job_name(self.subject.run.job_name))

    @property
    def attended(self) -> Json | None:
        """The Job whose pods say what happens: the current one, or before it the preflight's."""
        return self.current or self.preflight

    @property
    def attended_pods(self) -> tuple[Json, ...]:
        """The pods of the attended Job, oldest first."""
        attended = self.attended
        own = [pod for pod in self.pods if attended is not None and is_controlled_by(pod, attended["metadata"]["uid"])]
        return tuple(sorted(own, key=lambda pod: str(pod["metadata"].get("creationTimestamp", ""))))

    @property
    def active_pods(self) -> tuple[Json, ...]:
        """The pods of the attended Job that have not ended, oldest first."""
        return tuple(pod for pod in self.attended_pods if not is_ended(pod))

    @property
    def ended_pods(self) -> tuple[Json, ...]:
        """The pods of the attended Job that have ended, oldest first."""
        return tuple(pod for pod in self.attended_pods if is_ended(pod))

    def _job(self, name: str) -> Json | None:
        return next((job for job in self.jobs if job["metadata"]["name"] == name), None)


def carried_status(subject: Subject) -> FineTuneJobStatus:
    """The stored status where it is about the run that the spec asks for; blank for a new run."""
    stored = subject.stored
    if stored.run and stored.run.run_digest == subject.run.run_digest:
        return stored
    return FineTuneJobStatus(run=subject.run, conditions=stored.conditions)


def read_subject(raw: Json) -> Subject | Unreadable:
    """The stored object as one of the two. No object makes this raise."""
    problem, readable = _read_spec(json.dumps(raw.get("spec")))
    return Subject(raw, problem, *readable) if readable else Unreadable(raw, problem)


@lru_cache(maxsize=256)  # a job is looked at several times within seconds, and parsing its spec is the most expensive part of a look
def _read_spec(text: str) -> tuple[str, tuple[FineTuneJobSpec, tuple[str, str]] | None]:
    """(problem, (spec, digests)); the second is None where the spec does not have the structure that this version knows."""
    found = json.loads(text)
    spec = found if isinstance(found, dict) else {}
    problems = spec_problems(spec, local=False)
    problem = str(problems[0]) if problems else ""
    try:
        parsed = parse_spec(spec)
    except ValidationError:
        return problem or "spec: not readable by this version of the operator.", None
    return problem, (parsed, (train_digest(parsed), run_digest(parsed)))


def read_status(raw: Json) -> FineTuneJobStatus:
    """The stored status without the fields that this version can't read. No status makes this raise."""
    while True:
        try:
            return FineTuneJobStatus.model_validate(raw)
        except ValidationError as error:
            broken = {str(item["loc"][0]) for item in error.errors()}
            raw = {key: value for key, value in raw.items() if key not in broken}


def is_controlled_by(child: Json, uid: str) -> bool:
    """Whether the controller of an object has this UID."""
    owners = child["metadata"].get("ownerReferences") or ()
    return any(owner.get("controller") and owner.get("uid") == uid for owner in owners)


def condition_of(resource: Json, kind: str) -> Json | None:
    """The condition of a Job or pod when it is True."""
    conditions = (resource.get("status") or {}).get("conditions") or ()
    return next((item for item in conditions if item.get("type") == kind and item.get("status") == "True"), None)


def is_finished(job: Json) -> bool:
    """Whether a Job has ended, pods included."""
    return bool(condition_of(job, "Complete") or condition_of(job, "Failed"))


def is_ended(pod: Json) -> bool:
    """Whether the pod will run no more."""
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def is_being_deleted(resource: Json) -> bool:
    """Whether the API server has accepted its deletion."""
    return bool(resource["metadata"].get("deletionTimestamp"))


def is_unfinished(raw: Json) -> bool:
    """Whether the periodic re-list puts this FineTuneJob back on the queue."""
    status = raw.get("status") or {}
    return status.get("phase") not in FINAL or status.get("observedGeneration") != raw["metadata"].get("generation")


def is_new(raw: Json) -> bool:
    """Whether nothing was done yet for this FineTuneJob. Such ones are worked on before the others."""
    return not raw.get("status")

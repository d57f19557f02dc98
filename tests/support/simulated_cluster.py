"""A cluster in memory for tests of the operator: one FineTuneJob, its Jobs and pods as JSON values, and what Kubernetes does with them.

It stands in for finetune_operator.cluster.Cluster. Every request pauses first, so a test may let it happen late, lose its answer, or kill the operator there.
Every change is an event too, which each operator process hears of when the test lets it.
"""

from collections.abc import AsyncIterator, Coroutine, Generator
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from finetune_api import names
from finetune_api.spec import API_VERSION, KIND
from finetune_api.states import STATES
from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import ApiError, Cluster, Listing
from finetune_operator.main import build_reconciler
from finetune_operator.progress import ProgressPoller
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.subject import Json, Key, condition_of, is_being_deleted, is_controlled_by, is_finished

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
SPEC: Json = {
    "model": {"source": "builtin://smollm2-135m"},
    "dataset": {"source": "builtin://python-docs"},
    "outputs": {"destinations": [{"uri": "s3://models/tiny"}]},
    "runPolicy": {"preflight": "Skip"},
}
SETTINGS = Settings(trainer_image="registry.example.com/trainer:1")


def merged(base: Json, changes: Json) -> Json:
    """A merge patch (RFC 7386) applied: None removes a key."""
    result = deepcopy(base)
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            old = result.get(key)
            result[key] = merged(old if isinstance(old, dict) else {}, value)
        else:
            result[key] = deepcopy(value)
    return result


def written(moment: datetime) -> str:
    """A point in time as the API writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def build_finetunejob(changes: Json | None = None, *, status: Json | None = None, generation: int = 1, name: str = "tiny") -> Json:
    """A FineTuneJob as the API server gives it; `changes` are merged into the smallest spec."""
    metadata = {"name": name, "namespace": "ml", "uid": "uid-1", "generation": generation, "resourceVersion": "1"}
    raw: Json = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": merged(SPEC, changes or {})}
    return raw | ({"status": status} if status else {})


def build_stored_job(manifest: Json, uid: str = "job-uid", *, condition: Json | None = None, now: datetime = NOW) -> Json:
    """A Job as the API server stores a manifest; with a condition it has ended."""
    job = deepcopy(manifest)
    job["metadata"] |= {"uid": uid, "creationTimestamp": written(now)}
    job["kind"] = "Job"
    job["status"] = {"conditions": [{"status": "True", "lastTransitionTime": written(now), **condition}]} if condition else {}
    return job


def build_pod(
    job: Json,
    *,
    name: str = "pod-1",
    phase: str = "Pending",
    state: Json | None = None,
    conditions: tuple[Json, ...] = (),
    now: datetime = NOW,
    **status: Any,
) -> Json:
    """A pod of a Job; `state` is its container's."""
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"], "controller": True}
    containers = [{"name": names.CONTAINER, "state": state}] if state is not None else []
    return {
        "metadata": {
            "name": name,
            "namespace": job["metadata"]["namespace"],
            "uid": f"{name}-uid",
            "labels": job["spec"]["template"]["metadata"]["labels"],
            "ownerReferences": [owner],
            "creationTimestamp": written(now),
        },
        "spec": job["spec"]["template"]["spec"],
        "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": containers, "podIP": "192.0.2.1", **status},
    }


def build_ended_state(code: int, message: str = "", reason: str = "", now: datetime = NOW) -> Json:
    """The state of a container that ran for a minute."""
    times = {"startedAt": written(now - timedelta(minutes=1)), "finishedAt": written(now)}
    return {"terminated": {"exitCode": code, "reason": reason or ("Completed" if code == 0 else "Error"), "message": message, **times}}


def broken_status_rules(status: Json, generation: int) -> list[str]:
    """The rules of kstatus and of the API conventions that a status breaks."""
    conditions = {item["type"]: item for item in status.get("conditions", [])}
    progressing = [kind for kind in ("Reconciling", "Stalled") if kind in conditions]
    rules = {
        "each condition stands once": len(conditions) == len(status.get("conditions", [])),
        "Ready exists": "Ready" in conditions,
        "never Reconciling and Stalled together": len(progressing) < 2,
        "Reconciling and Stalled are absent when not true": all(conditions[kind]["status"] == "True" for kind in progressing),
        "not Ready while Reconciling or Stalled": not progressing or conditions["Ready"]["status"] == "False",
        "observedGeneration is at most the generation": status.get("observedGeneration", 0) <= generation,
        "a condition's observedGeneration too": all(item.get("observedGeneration", 0) <= generation for item in conditions.values()),
        "reasons are documented": all(item["reason"] in STATES for item in conditions.values()),
        "messages are 1 to 1024 characters": all(1 <= len(item.get("message", "")) <= 1024 for item in conditions.values()),
        "the message is 1 to 1024 characters": 1 <= len(status.get("message", "")) <= 1024,
    }  # fmt: skip
    return [rule for rule, holds in rules.items() if not holds]


class _Pause:
    """Stands before a request; says whether the request would write."""

    def __init__(self, *, writes: bool) -> None:
        self._writes = writes

    def __await__(self) -> Generator[bool]:
        yield self._writes


@dataclass
class Operator:
    """One pass of a reconcile that stands before its next request.

    Attributes:
        writes_next: whether that request would write.
        began_writing: whether a request that writes was made, so that its plan is under way.
        wrote: whether a request has changed anything.
        ended: done, refused or killed.
    """

    pass_: Coroutine[Any, Any, float | None]
    writes_next: bool = False
    began_writing: bool = False
    wrote: bool = False
    ended: bool = False

    def step(self) -> None:
        """Lets the pending request happen, and runs to the next one; a refused request ends the pass."""
        self.began_writing |= self.writes_next
        try:
            self.writes_next = self.pass_.send(None)
        except (StopIteration, ApiError, TimeoutError):
            self.ended = True

    def kill(self) -> None:
        """The process ends; the pending request never happens."""
        self.pass_.close()
        self.ended = True


@dataclass
class Process:
    """One operator process: what it remembers between its passes, and how much of the watches it has heard.

    Attributes:
        waits: whether something has happened that it has not looked at.
    """

    reconciler: Reconciler
    cache: Cache
    heard: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(Kind, 0))
    waits: bool = True


@dataclass
class SimulatedCluster:
    """The API server, the Job controller, the kubelet and the garbage collector, with one FineTuneJob.

    Attributes:
        refusal: what creating a Job is answered with, such as a quota's; None lets it be made.
        change_refusal: what a patch of a Job is answered with, such as a policy's; None lets it be made.
        loses_answer: the next request that writes does what it should, and nobody hears of it.
    """

    finetunejob: Json | None = None
    jobs: dict[str, Json] = field(default_factory=dict)
    pods: dict[str, Json] = field(default_factory=dict)
    events: dict[str, Json] = field(default_factory=dict)
    now: datetime = NOW
    is_writing: bool = False
    refusal: ApiError | None = None
    change_refusal: ApiError | None = None
    loses_answer: bool = False
    created: list[tuple[str, Json]] = field(default_factory=list)
    log: dict[Kind, list[tuple[str, Json]]] = field(default_factory=lambda: {kind: [] for kind in Kind})
    _logged: dict[Kind, dict[str, Json]] = field(default_factory=lambda: {kind: {} for kind in Kind})
    _counter: int = 0

    # What a user does.

    def apply(self, changes: Json) -> None:
        """Makes the FineTuneJob, or merges changes into its spec."""
        if self.finetunejob is None:
            self.finetunejob = build_finetunejob(changes)
            self.finetunejob["metadata"] |= {"uid": self._next("uid"), "resourceVersion": self._next("")}
            return
        spec = merged(self.finetunejob["spec"], changes)
        if spec != self.finetunejob["spec"]:
            self.finetunejob["spec"] = spec
            self.finetunejob["metadata"]["generation"] += 1
            self.finetunejob["metadata"]["resourceVersion"] = self._next("")

    def delete_finetunejob(self) -> None:
        """Gone at once: it has no finalizers. The garbage collector comes later."""
        self.finetunejob = None

    def delete_job_by_hand(self, name: str) -> None:
        """As kubectl delete does: the Job at once, its pods with it."""
        self._remove(name)

    # What Kubernetes does.

    def start_pod(self, job: Json) -> None:
        """The Job controller makes a pod."""
        name = self._next("pod-")
        self.pods[name] = build_pod(job, name=name, now=self.now)

    def run_pod(self, name: str) -> None:
        """The kubelet starts the container."""
        self.pods[name]["status"] |= {
            "phase": "Running",
            "containerStatuses": [{"name": names.CONTAINER, "state": {"running": {"startedAt": written(self.now)}}}],
        }

    def end_pod(self, name: str, code: int, *, disrupted: bool = False) -> None:
        """The container ends; the Job controller judges it by the Job's own podFailurePolicy."""
        pod, job = self.pods[name], self._job_of(self.pods[name])
        condition = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
        pod["status"] |= {
            "phase": "Failed" if code or disrupted else "Succeeded",
            "conditions": [condition] if disrupted else [],
            "containerStatuses": [{"name": names.CONTAINER, "state": build_ended_state(code, now=self.now)}],
        }
        if job is not None and not is_finished(job):
            self._judge(job, pod)

    def settle(self) -> None:
        """Controllers catch up: suspensions stop pods, deletions finish, orphans are collected."""
        for name, job in list(self.jobs.items()):
            owner = self.finetunejob["metadata"]["uid"] if self.finetunejob else ""
            if is_being_deleted(job) or not is_controlled_by(job, owner):
                self._remove(name)
            elif job["spec"]["suspend"]:
                for pod in self.active_pods(job):
                    del self.pods[pod["metadata"]["name"]]

    def collect_ended(self, name: str) -> None:
        """The TTL controller removes a finished Job that has a TTL."""
        if "ttlSecondsAfterFinished" in self.jobs[name]["spec"]:
            self._remove(name)

    def pods_of(self, job: Json) -> list[Json]:
        """Its pods, oldest first."""
        return [pod for pod in self.pods.values() if is_controlled_by(pod, job["metadata"]["uid"])]

    def active_pods(self, job: Json) -> list[Json]:
        """Its pods that have not ended."""
        return [pod for pod in self.pods_of(job) if pod["status"]["phase"] in ("Pending", "Running")]

    def startable_jobs(self) -> list[Json]:
        """Jobs for which the controller would make a pod now."""
        return [
            job
            for job in self.jobs.values()
            if not (is_finished(job) or is_being_deleted(job) or job["spec"]["suspend"] or self.active_pods(job))
        ]

    # What the operator does.

    def start_process(self, settings: Settings = SETTINGS) -> Process:
        """An operator that has just begun, and has listed everything."""
        cache = Cache()
        poller = ProgressPoller(lambda _: None, lambda: 0.0)
        reconciler = build_reconciler(cast("Cluster", self), cache, poller, settings, lambda _: process.waits, now=lambda: self.now)
        process = Process(reconciler, cache)
        self.resync(process)
        return process

    def resync(self, process: Process) -> None:
        """The process lists everything."""
        self.record()
        for kind in Kind:
            present = list(self._present(kind).values())
            for item in present:
                process.cache.update(kind, deepcopy(item))
            process.cache.delete_unlisted(kind, [item["metadata"]["uid"] for item in present], self._counter)
        process.cache.prune_tombstones()
        process.waits = True

    def tell(self, process: Process, kind: Kind, events: int, *, again: int = 0) -> None:
        """The process hears the next events of one watch, after it has heard the last `again` of them a second time."""
        self.record()
        begin = max(0, process.heard[kind] - again)
        process.heard[kind] = min(len(self.log[kind]), process.heard[kind] + events)
        for type_, item in self.log[kind][begin : process.heard[kind]]:
            key = process.cache.delete(kind, deepcopy(item)) if type_ == "DELETED" else process.cache.update(kind, deepcopy(item))
            process.waits |= key is not None

    def tell_all(self, process: Process) -> None:
        """The process hears everything."""
        for kind in Kind:
            self.tell(process, kind, len(self.log[kind]) + 1000)

    def start_operator(self, process: Process | None = None) -> Operator:
        """A pass that stands before its first request, or has ended without any; of a new process unless one is given."""
        process = process or self.start_process()
        process.waits = False
        operator = Operator(process.reconciler.reconcile(Key("ml", "tiny")))
        operator.step()
        return operator

    def step(self, operator: Operator) -> None:
        """One request of the operator; `wrote` says whether it has begun to write."""
        self.is_writing = False
        operator.step()
        self.record()
        operator.wrote |= self.is_writing

    def reconcile(self, process: Process | None = None) -> bool:
        """A whole pass without a fault, of a process that has heard everything; whether it wrote anything."""
        if process:
            self.tell_all(process)
        operator = self.start_operator(process)
        while not operator.ended:
            self.step(operator)
        return operator.wrote

    # What the watches show.

    def record(self) -> None:
        """What has changed since the last time becomes events."""
        for kind in Kind:
            before, present = self._logged[kind], self._present(kind)
            for uid in before.keys() - present.keys():
                self.log[kind].append(("DELETED", merged(before[uid], {"metadata": {"resourceVersion": self._next("")}})))
            for uid, item in present.items():
                if before.get(uid) != item:
                    if kind is not Kind.FINETUNEJOB:
                        item["metadata"]["resourceVersion"] = self._next("")
                    self.log[kind].append(("MODIFIED" if uid in before else "ADDED", deepcopy(item)))
            self._logged[kind] = {uid: deepcopy(item) for uid, item in present.items()}

    def _present(self, kind: Kind) -> dict[str, Json]:
        found = {
            Kind.FINETUNEJOB: [self.finetunejob] if self.finetunejob else [],
            Kind.JOB: self.jobs.values(),
            Kind.POD: self.pods.values(),
        }
        return {item["metadata"]["uid"]: item for item in found[kind]}

    # Cluster's requests.

    async def read_finetunejob(self, key: Key) -> Json | None:
        """As Cluster."""
        await _Pause(writes=False)
        return deepcopy(self.finetunejob)

    async def patch_status(self, key: Key, resource_version: str, patch: Json) -> Json:
        """As Cluster."""
        await _Pause(writes=True)
        if self.finetunejob is None:
            raise ApiError(404, "NotFound", "")
        if self.finetunejob["metadata"]["resourceVersion"] != resource_version:
            raise ApiError(409, "Conflict", "")
        status = merged(self.finetunejob.get("status") or {}, patch)
        if status != self.finetunejob.get("status"):
            self.is_writing = True
            self.finetunejob["status"] = status
            self.finetunejob["metadata"]["resourceVersion"] = self._next("")
        return self._answer(self.finetunejob)

    async def list_pages(self, kind: Kind, namespace: str, selector: str = "") -> AsyncIterator[Listing]:
        """As Cluster."""
        await _Pause(writes=False)
        self.record()
        yield Listing([deepcopy(item) for item in self._present(kind).values() if _selects(selector, item)], self._counter)

    async def read_job(self, namespace: str, name: str) -> Json | None:
        """As Cluster."""
        await _Pause(writes=False)
        self.record()
        return deepcopy(self.jobs.get(name))

    async def create_job(self, manifest: Json) -> Json:
        """As Cluster."""
        await _Pause(writes=True)
        name = manifest["metadata"]["name"]
        if self.refusal:
            raise self.refusal
        if name in self.jobs:
            raise ApiError(409, "AlreadyExists", "")
        self.is_writing = True
        self.jobs[name] = build_stored_job(manifest, self._next("job-"), now=self.now)
        self.created.append((name, deepcopy((self.finetunejob or {}).get("status") or {})))
        return self._answer(self.jobs[name])

    async def patch_job(self, namespace: str, name: str, patch: Json) -> Json:
        """As Cluster."""
        await _Pause(writes=True)
        if name not in self.jobs:
            raise ApiError(404, "NotFound", "")
        if self.change_refusal:
            raise self.change_refusal
        self.is_writing = True
        self.jobs[name] = merged(self.jobs[name], patch)
        return self._answer(self.jobs[name])

    async def delete_job(self, namespace: str, name: str, uid: str) -> Json:
        """As Cluster: in the foreground."""
        await _Pause(writes=True)
        if name not in self.jobs:
            raise ApiError(404, "NotFound", "")
        if self.jobs[name]["metadata"]["uid"] != uid:
            raise ApiError(409, "Conflict", "")
        self.is_writing = True
        self.jobs[name]["metadata"]["deletionTimestamp"] = written(self.now)
        return self._answer(self.jobs[name])

    async def list_warnings(self, namespace: str) -> AsyncIterator[list[Json]]:
        """As Cluster."""
        await _Pause(writes=False)
        yield []

    async def create_event(self, event: Json) -> None:
        """As Cluster."""
        await _Pause(writes=True)
        if event["metadata"]["name"] in self.events:
            raise ApiError(409, "AlreadyExists", "")
        self.events[event["metadata"]["name"]] = deepcopy(event)

    def _next(self, prefix: str) -> str:
        self._counter += 1
        return f"{prefix}{self._counter:04}"

    def _answer(self, stored: Json) -> Json:
        self.record()
        if self.loses_answer:
            self.loses_answer = False
            raise TimeoutError
        return deepcopy(stored)

    def _job_of(self, pod: Json) -> Json | None:
        return next((job for job in self.jobs.values() if is_controlled_by(pod, job["metadata"]["uid"])), None)

    def _remove(self, name: str) -> None:
        for pod in self.pods_of(self.jobs[name]):
            del self.pods[pod["metadata"]["name"]]
        del self.jobs[name]

    def _judge(self, job: Json, pod: Json) -> None:
        if pod["status"]["phase"] == "Succeeded":
            job["status"]["succeeded"] = 1
            return self._finish(job, "Complete", "CompletionsReached")
        action = next((rule["action"] for rule in job["spec"]["podFailurePolicy"]["rules"] if matches_rule(rule, pod)), "Count")
        if action != "Ignore":
            job["status"]["failed"] = job["status"].get("failed", 0) + 1
        if action == "FailJob":
            return self._finish(job, "Failed", "PodFailurePolicy")
        if action == "Count" and job["status"]["failed"] > job["spec"]["backoffLimit"]:
            self._finish(job, "Failed", "BackoffLimitExceeded")
        return None

    def _finish(self, job: Json, kind: str, reason: str) -> None:
        job["status"]["conditions"] = [{"type": kind, "status": "True", "reason": reason, "lastTransitionTime": written(self.now)}]


def matches_rule(rule: Json, pod: Json) -> bool:
    """Whether a rule of a podFailurePolicy matches a failed pod."""
    if "onPodConditions" in rule:
        return any(condition_of(pod, pattern["type"]) for pattern in rule["onPodConditions"])
    (container,) = pod["status"]["containerStatuses"]
    return container["state"]["terminated"]["exitCode"] in rule["onExitCodes"]["values"]


def _selects(selector: str, resource: Json) -> bool:
    key, _, value = selector.partition("=")
    return bool(resource["metadata"]["labels"].get(key) == value)

"""What really happened in a namespace, and which promises it breaks: every change of FineTuneJobs, Jobs and pods in one order, judged without the operator.

`Recorder` watches the API server itself, beside any proxy. `broken_promises` is pure: resourceVersions come from one counter of the whole API server, so
they order the changes of all kinds. `wrong_at_rest` says what is not as it should be once nothing happens any more.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from finetune_api import names
from finetune_api.digests import run_digest
from finetune_api.validation import parse_spec
from support.api_client import ApiClient, Json, RefusedError
from support.simulated_cluster import broken_status_rules

FINAL = ("Succeeded", "Failed")
AT_WORK = ("Pending", "Running", "Unknown")


def paths_in(namespace: str) -> dict[str, str]:
    """Where each kind that is looked at lies."""
    return {
        "finetunejobs": f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs",
        "jobs": f"/apis/batch/v1/namespaces/{namespace}/jobs",
        "pods": f"/api/v1/namespaces/{namespace}/pods",
    }


@dataclass(frozen=True)
class Change:
    """One change: the object as it stood after it, or as it last stood when it was removed."""

    version: int
    kind: str
    resource: Json
    removed: bool = False

    @property
    def uid(self) -> str:
        """Whose."""
        return str(self.resource["metadata"]["uid"])


@dataclass
class State:
    """Everything at one moment, and what is remembered of what is gone.

    Attributes:
        live: kind -> UID -> object.
        ends: (UID of the FineTuneJob, name of the Job) -> Complete or Failed, also of Jobs that are gone.
        stored: (UID of the FineTuneJob, name of the Job) of each training whose end, and each preflight whose result, its status has held.
        exits: UID of a pod -> (name of its Job, exit code).
    """

    live: dict[str, dict[str, Json]] = field(default_factory=lambda: {"finetunejobs": {}, "jobs": {}, "pods": {}})
    ends: dict[tuple[str, str], str] = field(default_factory=dict)
    stored: set[tuple[str, str]] = field(default_factory=set)
    exits: dict[str, tuple[str, int]] = field(default_factory=dict)

    def apply(self, change: Change) -> None:
        """Takes a change in."""
        resource = change.resource
        if change.removed:
            self.live[change.kind].pop(change.uid, None)
        else:
            self.live[change.kind][change.uid] = resource
        if change.kind == "jobs" and (end := end_of(resource)):
            self.ends[owner_of(resource), name_of(resource)] = end
        if change.kind == "finetunejobs":
            self.stored |= {(change.uid, name) for name in _told_of(resource.get("status") or {})}
        if change.kind == "pods" and (code := exit_code(resource)) is not None:
            self.exits[change.uid] = (owner_name(resource), code)

    def asks_for(self, job: Json) -> bool:
        """Whether the FineTuneJob of a Job exists and its spec asks for this very run."""
        owner = self.live["finetunejobs"].get(owner_of(job))
        return owner is not None and not is_leaving(owner) and wanted_job(owner) == name_of(job)


def broken_promises(history: list[Change]) -> list[str]:
    """What no fault may bring about, as sentences in the order of the changes; empty when every promise was kept."""
    state, problems = State(), []
    for change in sorted(history, key=lambda item: item.version):
        before = state.live[change.kind].get(change.uid)
        for rule in _RULES[change.kind]:
            problems += [f"{change.version} {name_of(change.resource)}: {problem}" for problem in rule(state, before, change)]
        state.apply(change)
    return problems


def state_after(history: list[Change]) -> State:
    """Everything after the last change."""
    state = State()
    for change in sorted(history, key=lambda item: item.version):
        state.apply(change)
    return state


def wrong_at_rest(state: State) -> list[str]:
    """What is stuck, lost or said wrongly once faults and edits are over; empty when all is as it should be."""
    problems = [
        f"{kind[:-1]} {name_of(item)} is still being deleted"
        for kind, found in state.live.items()
        for item in found.values()
        if is_leaving(item)
    ]
    left = [name_of(job) for job in state.live["jobs"].values() if is_training(job) and not state.asks_for(job)]
    problems += [f"Job {name} is left over: no FineTuneJob asks for it" for name in left]
    for resource in state.live["finetunejobs"].values():
        problems += [f"{name_of(resource)}: {problem}" for problem in _wrong(state, resource)]
    return problems


def _told_of(status: Json) -> Iterator[str]:
    """Names of the Jobs whose end a status holds."""
    name = str((status.get("run") or {}).get("jobName"))
    if status.get("phase") in FINAL:
        yield name
    if status.get("phase") in FINAL or status.get("preflight"):
        yield names.preflight_job_name(name)


# What is read from an object.


def name_of(resource: Json) -> str:
    """Its name."""
    return str(resource["metadata"]["name"])


def owner_of(resource: Json) -> str:
    """UID of its controller; empty for none."""
    owners = resource["metadata"].get("ownerReferences") or ()
    return next((str(owner["uid"]) for owner in owners if owner.get("controller")), "")


def owner_name(resource: Json) -> str:
    """Name of its controller; empty for none."""
    owners = resource["metadata"].get("ownerReferences") or ()
    return next((str(owner["name"]) for owner in owners if owner.get("controller")), "")


def is_leaving(resource: Json) -> bool:
    """Whether its deletion was asked for."""
    return bool(resource["metadata"].get("deletionTimestamp"))


def phase_of(resource: Json) -> str:
    """status.phase."""
    return str((resource.get("status") or {}).get("phase", ""))


def end_of(job: Json) -> str:
    """Complete, Failed, or empty."""
    conditions = (job.get("status") or {}).get("conditions") or ()
    return next((str(item["type"]) for item in conditions if item["type"] in ("Complete", "Failed") and item["status"] == "True"), "")


def exit_code(pod: Json) -> int | None:
    """Of its trainer."""
    statuses = (pod.get("status") or {}).get("containerStatuses") or ()
    return next((int(item["state"]["terminated"]["exitCode"]) for item in statuses if "terminated" in item.get("state", {})), None)


def wanted_job(finetunejob: Json) -> str:
    """Name of the training Job that the spec asks for."""
    metadata = finetunejob["metadata"]
    return names.training_job_name(metadata["name"], metadata["uid"], run_digest(parse_spec(finetunejob["spec"])))


def is_training(resource: Json) -> bool:
    """Whether a Job or pod trains; a preflight does not."""
    return bool(resource["metadata"].get("labels", {}).get("app.kubernetes.io/component") == "training")


# The rules: what each change may not be.

Rule = Callable[[State, Json | None, Change], Iterator[str]]


def _status_is_well_formed(_: State, before: Json | None, change: Change) -> Iterator[str]:
    status = change.resource.get("status")
    if not status or (before or {}).get("status") == status:
        return
    yield from broken_status_rules(status, change.resource["metadata"]["generation"])
    seen = ((before or {}).get("status") or {}).get("observedGeneration", 0)
    if status.get("observedGeneration", 0) < seen:
        yield f"observedGeneration went back from {seen} to {status.get('observedGeneration')}"


def _transition_times_are_true(_: State, before: Json | None, change: Change) -> Iterator[str]:
    earlier = {item["type"]: item for item in ((before or {}).get("status") or {}).get("conditions", ())}
    for item in (change.resource.get("status") or {}).get("conditions", ()):
        old = earlier.get(item["type"])
        if old and old["status"] == item["status"] and old["lastTransitionTime"] != item["lastTransitionTime"]:
            yield f"{item['type']} stayed {item['status']}, but its transition time changed"


def _an_end_stays(_: State, before: Json | None, change: Change) -> Iterator[str]:
    if before is None or phase_of(before) not in FINAL:
        return
    runs = [((item.get("status") or {}).get("run") or {}).get("runDigest") for item in (before, change.resource)]
    if runs[0] == runs[1] and phase_of(change.resource) != phase_of(before):
        yield f"the end of a run went back from {phase_of(before)} to {phase_of(change.resource)}"


def _an_end_is_true(state: State, before: Json | None, change: Change) -> Iterator[str]:
    phase = phase_of(change.resource)
    if phase not in FINAL or (before is not None and phase_of(before) == phase):
        return
    end = state.ends.get((change.uid, str(change.resource["status"]["run"]["jobName"])))
    if (phase, end) not in (("Succeeded", "Complete"), ("Failed", "Failed")):
        yield f"it says {phase}, but its Job has {end or 'not ended'}"


def _never_two_jobs(state: State, before: Json | None, change: Change) -> Iterator[str]:
    job = change.resource
    if before is not None or change.removed or not is_training(job):
        return
    for other in state.live["jobs"].values():
        if is_training(other) and owner_of(other) == owner_of(job) and not end_of(other):
            yield f"DUPLICATE: made while Job {name_of(other)} of the same FineTuneJob has not ended"


def _checked_before_a_gpu_is_asked_for(state: State, before: Json | None, change: Change) -> Iterator[str]:
    job, owner = change.resource, state.live["finetunejobs"].get(owner_of(change.resource))
    wants_gpu = is_training(job) and "nvidia.com/gpu" in job["spec"]["template"]["spec"]["containers"][0]["resources"].get("limits", {})
    if before is not None or change.removed or owner is None or not wants_gpu:
        return
    skips = owner["spec"].get("runPolicy", {}).get("preflight") == "Skip"
    if not skips and (owner_of(job), names.preflight_job_name(name_of(job))) not in state.stored:
        yield "UNCHECKED: it asks for a GPU before a preflight's result is stored"


def _never_trained_again(state: State, before: Json | None, change: Change) -> Iterator[str]:
    run = (owner_of(change.resource), name_of(change.resource))
    end = state.ends.get(run)
    # A preflight is small: its TTL stands from the start, and it runs again where its result was not stored before.
    if before is None and not change.removed and end and (is_training(change.resource) or run in state.stored):
        yield f"RE-TRAINING: made although a Job of this run was {end} before"


def _no_ttl_before_the_end_is_stored(state: State, before: Json | None, change: Change) -> Iterator[str]:
    job = change.resource
    had = before is not None and "ttlSecondsAfterFinished" in before["spec"]
    if had or not is_training(job) or "ttlSecondsAfterFinished" not in job["spec"]:
        return
    if owner_of(job) in state.live["finetunejobs"] and (owner_of(job), name_of(job)) not in state.stored:
        yield "LOST: it has a TTL before its FineTuneJob's status holds its end"


def _nothing_is_stopped_without_a_reason(state: State, before: Json | None, change: Change) -> Iterator[str]:
    job = change.resource
    begins = before is not None and not is_leaving(before) and (is_leaving(job) or change.removed)
    if not begins or not state.asks_for(job):
        return
    if not end_of(job):
        yield "RE-TRAINING: deleted at work, though its FineTuneJob asks for this run"
    elif (owner_of(job), name_of(job)) not in state.stored:
        yield "LOST: deleted before its FineTuneJob's status held its end"


def _never_two_trainers(state: State, before: Json | None, change: Change) -> Iterator[str]:
    pod = change.resource
    if before is not None or change.removed or not is_training(pod):
        return
    label = pod["metadata"]["labels"][names.LABEL_JOB]
    for other in state.live["pods"].values():
        if is_training(other) and other["metadata"]["labels"][names.LABEL_JOB] == label and phase_of(other) in AT_WORK:
            yield f"DUPLICATE: made while pod {name_of(other)} of {label} is at work"


_RULES: dict[str, tuple[Rule, ...]] = {
    "finetunejobs": (_status_is_well_formed, _transition_times_are_true, _an_end_stays, _an_end_is_true),
    "jobs": (
        _never_two_jobs,
        _checked_before_a_gpu_is_asked_for,
        _never_trained_again,
        _no_ttl_before_the_end_is_stored,
        _nothing_is_stopped_without_a_reason,
    ),
    "pods": (_never_two_trainers,),
}


def _wrong(state: State, resource: Json) -> Iterator[str]:
    """What is not right about one FineTuneJob at rest."""
    status, uid, wanted = resource.get("status") or {}, str(resource["metadata"]["uid"]), wanted_job(resource)
    end = state.ends.get((uid, wanted))
    run_policy = resource["spec"].get("runPolicy", {})
    at_work = [pod for pod in state.live["pods"].values() if owner_name(pod) == wanted and phase_of(pod) == "Running"]
    unended = "Suspended" if run_policy.get("suspend") else "Running" if at_work else "Pending"
    expected = {"Complete": "Succeeded", "Failed": "Failed"}.get(end or "", unended)
    if phase_of(resource) != expected:
        yield f"the phase is {phase_of(resource) or 'empty'}, but {expected} is right: {status.get('message', '')[:200]}"
    if status.get("observedGeneration") != resource["metadata"]["generation"]:
        yield f"the status speaks of generation {status.get('observedGeneration')} of {resource['metadata']['generation']}"
    if (status.get("run") or {}).get("jobName") != wanted:
        yield f"the status speaks of the run {(status.get('run') or {}).get('jobName')}, the spec of {wanted}"
    owned = [job for job in state.live["jobs"].values() if owner_of(job) == uid]
    jobs = [job for job in owned if is_training(job)]
    is_held_at_preflight = run_policy.get("suspend") and any(not is_training(job) and not end_of(job) for job in owned)
    if not end and not jobs and not is_held_at_preflight:
        yield "STUCK: it has no Job"
    for job in jobs:
        if end_of(job) and job["spec"].get("ttlSecondsAfterFinished") != run_policy.get("ttlSecondsAfterFinished"):
            yield f"Job {name_of(job)} has ended and not got its TTL"
    told = {item["podUID"]: item.get("exitCode") for item in status.get("attempts", ())}
    for pod, (job_name, code) in state.exits.items():
        if job_name == wanted and pod in state.live["pods"] and told.get(pod) != code and len(told) < 10:
            yield f"pod {pod} ended with {code}, but attempts say {told.get(pod, 'nothing')}"


# Watching.


class Recorder:
    """Every change in a namespace since it began."""

    def __init__(self, api: ApiClient, namespace: str) -> None:
        self._api = api
        self._paths = paths_in(namespace)
        self.history: list[Change] = []
        self.failure: BaseException | None = None

    async def record(self) -> None:
        """Watches until it is cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for kind in self._paths:
                    group.create_task(self._follow(kind))
        except BaseExceptionGroup as error:
            self.failure = error

    async def is_up_to_date(self) -> bool:
        """Whether it knows all that the API server knows now.

        Raises:
            BaseException: the recorder itself failed.
        """
        if self.failure:
            raise self.failure
        live = state_after(self.history).live
        for kind, path in self._paths.items():
            there = {item["metadata"]["uid"]: item["metadata"]["resourceVersion"] async for item in self._api.list(path)}
            if there != {uid: item["metadata"]["resourceVersion"] for uid, item in live[kind].items()}:
                return False
        return True

    async def _follow(self, kind: str) -> None:
        version = await self._begin(kind)
        while True:
            try:
                query = f"{self._paths[kind]}?resourceVersion={version}&allowWatchBookmarks=true"
                async for event, resource in self._api.watch(query):
                    assert event != "ERROR", resource
                    version = resource["metadata"]["resourceVersion"]
                    if event != "BOOKMARK":
                        self.history.append(Change(int(version), kind, resource, removed=event == "DELETED"))
            except aiohttp.ClientError:
                await asyncio.sleep(0.2)  # the next watch goes on where this one ended

    async def _begin(self, kind: str) -> str:
        while True:
            try:
                listed = await self._api.request("GET", self._paths[kind])
                break
            except RefusedError as error:
                if error.status != 429:  # an API server that has just got the CRD asks for patience
                    raise
                await asyncio.sleep(0.2)
        for item in listed["items"]:
            self.history.append(Change(int(item["metadata"]["resourceVersion"]), kind, item))
        return str(listed["metadata"]["resourceVersion"])


@asynccontextmanager
async def recording(api: ApiClient, namespace: str) -> AsyncIterator[Recorder]:
    """Records for the block."""
    recorder = Recorder(api, namespace)
    task = asyncio.create_task(recorder.record())
    try:
        yield recorder
    finally:
        task.cancel()
        await asyncio.wait({task})

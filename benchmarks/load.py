"""What benchmarks/operator_bench.py stands on: a cluster with fake nodes, the operator of this checkout as a user of its own, and exact eyes on both.

Times are the process's own clock: a request's start, and the moment when its watch event arrived. Writes are counted from the API server's audit log,
and in a burst it also says when they were done: on a full machine the API server cuts watches that fall behind, and the news is seconds late.
"""

import asyncio
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import aiohttp
import yaml
from finetune_api import names
from finetune_api.spec import GROUP, PLURAL, VERSION
from support.api_client import MERGE, ApiClient, connected
from support.kubernetes import Cluster, running_cluster
from support.kwok import running_kwok
from support.operator_process import A_USERS_RESYNC, OperatorProcess, install_crd
from support.specs import job, minimal_spec

NAMESPACE = "default"
SYSTEM = "finetune-bench"  # the namespace of the operator's Lease and service accounts
PARALLEL = 32  # connections of the client that applies, and of the bare one
FINETUNEJOBS = f"/apis/{GROUP}/{VERSION}/namespaces/{NAMESPACE}/{PLURAL}"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
COMPONENTS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
QUIET_SECONDS = 3.0
IDLE_SHARE = 0.2  # of one core, for the whole control plane
_TICKS = os.sysconf("SC_CLK_TCK")
_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "userGroups": [f"system:serviceaccounts:{SYSTEM}"], "verbs": ["create", "update", "patch", "delete"]}],
}

Json = dict[str, Any]
Item = TypeVar("Item")


class TooSlowError(Exception):
    """What was waited for did not come in time."""


def finetunejob(name: str, gpus: int = 0) -> Json:
    """A FineTuneJob whose pod ends as its name says (tests/cluster/kwok/stages.yaml)."""
    return job(minimal_spec() | {"resources": {"gpus": gpus}}, name)


@dataclass
class Follower:
    """What the watches said so far. A key is a FineTuneJob's name, a time is in seconds of perf_counter.

    Attributes:
        applied: when the request that made it began.
        jobs: when its first Job was seen.
        owners: FineTuneJobs by their Jobs' names.
        statuses: when its first status was seen.
        phases: its phase.
        preflights: names of Jobs that only check.
    """

    applied: dict[str, float] = field(default_factory=dict)
    jobs: dict[str, float] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, float] = field(default_factory=dict)
    phases: dict[str, str] = field(default_factory=dict)
    preflights: set[str] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _counts: Counter[str] = field(default_factory=Counter)

    def saw_job(self, kind: str, item: Json) -> None:
        """A Job, or its metadata."""
        label = item["metadata"].get("labels", {}).get(names.LABEL_JOB)
        if kind == "ADDED" and label:
            self.jobs.setdefault(label, time.perf_counter())
            self.owners[item["metadata"]["name"]] = label
            if item["metadata"]["name"].endswith("-pre"):
                self.preflights.add(item["metadata"]["name"])
            self._changed.set()

    def saw_finetunejob(self, _kind: str, item: Json) -> None:
        """A whole FineTuneJob."""
        name, phase = item["metadata"]["name"], (item.get("status") or {}).get("phase")
        if phase:
            self.statuses.setdefault(name, time.perf_counter())
            self._counts[self.phases.get(name, "")] -= 1
            self._counts[phase] += 1
            self.phases[name] = phase
            self._changed.set()

    def count(self, phase: str) -> int:
        """How many are in a phase."""
        return self._counts[phase]

    def delays(self, until: Mapping[str, float], wanted: Iterable[str]) -> list[float]:
        """Seconds from apply to this moment of each, sorted."""
        return sorted(until[name] - self.applied[name] for name in wanted)

    async def until(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Waits for the watches to make the condition true.

        Raises:
            TooSlowError: not within so many seconds.
        """
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise TooSlowError(f"not within {seconds:.0f} s: {what}; {len(self.jobs)} Jobs, phases {dict(+self._counts)}") from None


class AuditLog:
    """Writes that the service accounts of the benchmark asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._entries: list[Json] = []

    def mark(self) -> int:
        """A point in the log, for writes()."""
        self._read()
        return len(self._entries)

    def writes(self, since: int, user: str = "operator") -> list[Json]:
        """Since a mark: resource ("jobs", "finetunejobs/status", ...), name, verb, HTTP status and time of each."""
        self._read()
        return [entry for entry in self._entries[since:] if entry["user"] == user]

    def first(self, resource: str, since: int) -> dict[str, float]:
        """When the operator's first write of this resource to each name was done, in seconds of perf_counter."""
        found: dict[str, float] = {}
        for entry in self.writes(since):
            if entry["resource"] == resource and entry["code"] < 300:
                found.setdefault(entry["name"], entry["at"])
        return found

    async def quiet(self) -> int:
        """Waits until nothing was written for a while, the Lease aside; a mark of then."""
        while True:
            before = self._without_leases()
            await asyncio.sleep(QUIET_SECONDS)
            if self._without_leases() == before:
                return self.mark()

    def _without_leases(self) -> int:
        self._read()
        return sum(entry["resource"] != "leases" for entry in self._entries)

    def _read(self) -> None:
        with self._path.open("rb") as log:
            log.seek(self._offset)
            whole = log.read().rpartition(b"\n")[0]
        self._offset += len(whole) + 1 if whole else 0
        self._entries += [_summary(json.loads(line)) for line in whole.splitlines()]


def _summary(entry: Json) -> Json:
    target = entry.get("objectRef", {})
    resource = "/".join(part for part in (target.get("resource", ""), target.get("subresource", "")) if part)
    user = entry["user"]["username"].rpartition(":")[2]
    return {
        "user": user,
        "verb": entry["verb"],
        "resource": resource,
        "name": target.get("name", ""),
        "code": entry["responseStatus"]["code"],
        "at": datetime.fromisoformat(entry["stageTimestamp"]).timestamp() - time.time() + time.perf_counter(),
    }


@dataclass
class World:
    """A cluster with fake nodes, and the operator on it."""

    kube: Cluster
    api: ApiClient
    operator: OperatorProcess
    audit: AuditLog
    seen: Follower

    async def apply(self, wanted: Iterable[str], gpus: int = 0) -> None:
        """Makes FineTuneJobs, as many at a time as there are connections."""

        async def one(name: str) -> None:
            self.seen.applied[name] = time.perf_counter()
            await self.api.request("POST", FINETUNEJOBS, finetunejob(name, gpus))

        await in_parallel(wanted, one)

    def first_jobs(self, mark: int) -> dict[str, float]:
        """When the first Job of each FineTuneJob was stored, by the audit log since a mark."""
        found: dict[str, float] = {}
        for name, at in self.audit.first("jobs", mark).items():
            found.setdefault(self.seen.owners[name], at)
        return found

    async def handled(self, name: str, seconds: float = 60) -> float:
        """Applies one FineTuneJob that runs for ever and returns the seconds until its Job was there."""
        await self.apply([name])
        await self.seen.until(f"the Job of {name}", lambda: name in self.seen.jobs, seconds)
        return self.seen.jobs[name] - self.seen.applied[name]

    async def settled(self) -> None:
        """Waits until the control plane idles: for seconds after its start, and after a CRD, it is busy with itself."""
        while True:
            before = sum(_cpu_seconds(pid) for pid in component_pids(self.kube.folder).values())
            await asyncio.sleep(QUIET_SECONDS)
            after = sum(_cpu_seconds(pid) for pid in component_pids(self.kube.folder).values())
            if after - before < IDLE_SHARE * QUIET_SECONDS:
                return

    def memory_bytes(self, kind: str = "VmRSS") -> int:
        """The operator's resident set, or its peak (VmHWM)."""
        text = Path(f"/proc/{self.operator.pid}/status").read_text()
        (kilobytes,) = re.findall(rf"^{kind}:\s+(\d+) kB", text, re.MULTILINE)
        return int(kilobytes) * 1024

    def cpu_seconds(self) -> dict[str, float]:
        """What each process has used so far."""
        pids = {**component_pids(self.kube.folder), "operator": self.operator.pid, "benchmark": os.getpid()}
        return {name: _cpu_seconds(pid) for name, pid in pids.items()}


@asynccontextmanager
async def world(number: int, *, operator: bool = True, nodes: int = 1, run_seconds: float = 1.0) -> AsyncIterator[World]:
    """A fresh cluster, with the operator at work unless `operator` is false, and watches on its Jobs and FineTuneJobs."""
    with TemporaryDirectory(prefix="bench-operator-") as name, _cluster(Path(name), number) as kube:
        folder = Path(name)
        with running_kwok(kube, folder, nodes=nodes, run_seconds=run_seconds, count_attempts=False):
            install_crd(kube)
            kube.kubectl("create", "namespace", SYSTEM)
            as_operator = _as_service_account(kube, "operator")
            process = OperatorProcess(as_operator, folder / "operator.log", RESYNC_SECONDS=A_USERS_RESYNC, LEASE_NAMESPACE=SYSTEM)
            async with connected(_as_service_account(kube, "bare").kubeconfig, "bench", PARALLEL + 2) as api:
                made = World(kube, api, process, AuditLog(folder / "log" / "writes.log"), Follower())
                async with _following(made):
                    with _working(made) if operator else nullcontext():
                        if operator:
                            await made.handled("exit-0-first")
                        await made.settled()
                        yield made


@contextmanager
def _cluster(folder: Path, number: int) -> Iterator[Cluster]:
    policy = folder / "writes-policy.yaml"
    policy.write_text(json.dumps(_AUDIT_POLICY))
    flags = f"--audit-policy-file {policy} --audit-log-path {folder}/log/writes.log --audit-log-maxsize 10000"
    os.environ["CLUSTER_API_SERVER_FLAGS"] = flags
    with running_cluster(folder, number, node=False) as kube:
        yield kube


@contextmanager
def _working(made: World) -> Iterator[None]:
    made.operator.start()
    try:
        yield
        made.operator.require_no_traceback()
    except TooSlowError:
        print(f"The operator's last words:\n{made.operator.log[-2000:]}", file=sys.stderr, flush=True)
        raise
    finally:
        made.operator.kill()


@asynccontextmanager
async def _following(made: World) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:  # a watch that dies ends the part too
        tasks = [
            group.create_task(_follow(made.api, JOBS, made.seen.saw_job, metadata_only=True)),
            group.create_task(_follow(made.api, FINETUNEJOBS, made.seen.saw_finetunejob, metadata_only=False)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _follow(api: ApiClient, path: str, saw: Callable[[str, Json], None], *, metadata_only: bool) -> None:
    version = ""
    while True:
        with suppress(aiohttp.ClientError):  # a watch that fell behind is cut; the next goes on where it was, as the operator's does
            async for kind, item in api.watch(f"{path}?resourceVersion={version}", metadata_only=metadata_only):
                version = item["metadata"].get("resourceVersion", "")  # none: an ERROR, it fell too far behind, and begins with everything
                if kind in ("ADDED", "MODIFIED"):
                    saw(kind, item)


def _as_service_account(kube: Cluster, name: str) -> Cluster:
    """The cluster as this service account of ours sees it; it may do everything, since permissions are other tests' matter."""
    kube.kubectl("create", "serviceaccount", name, "-n", SYSTEM)
    kube.kubectl("create", "clusterrolebinding", name, "--clusterrole=cluster-admin", f"--serviceaccount={SYSTEM}:{name}")
    token = kube.kubectl("create", "token", name, "-n", SYSTEM, "--duration=24h").stdout.strip()
    config = yaml.safe_load(kube.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    seen = Cluster(kube.folder / name, kube.number)
    seen.folder.mkdir()
    seen.kubeconfig.write_text(yaml.safe_dump(config))
    kube.wait(f"what {name} may do", lambda: seen.kubectl("get", "finetunejobs,jobs,pods", "-A", check=False).returncode == 0)
    return seen


async def in_parallel(items: Iterable[Item], work: Callable[[Item], Awaitable[None]], parallel: int = PARALLEL) -> None:
    """Works on every item, on so many at a time, in order."""
    waiting = iter(items)

    async def worker() -> None:
        for item in waiting:
            await work(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(parallel):
            group.create_task(worker())


async def make_foreign_pods(api: ApiClient, number: int, node: str) -> None:
    """Pods that are nobody's of ours, running on this node."""
    spec = {"nodeName": node, "automountServiceAccountToken": False, "containers": [{"name": "web", "image": "web"}]}

    async def one(index: int) -> None:
        labels = {"app.kubernetes.io/name": "web", "index": str(index)}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"foreign-{index}", "labels": labels}, "spec": spec}
        await api.request("POST", PODS, body)

    await in_parallel(range(number), one)


async def foreign_pods_run(api: ApiClient) -> None:
    """Waits until no pod is left that kwok has not started."""
    while (await api.request("GET", f"{PODS}?fieldSelector=status.phase=Pending&limit=1"))["items"]:  # noqa: ASYNC110 the server says it to nobody
        await asyncio.sleep(1)


async def patch_status(api: ApiClient, name: str, resource_version: str, status: Json) -> None:
    """What the operator does to a FineTuneJob's status."""
    body = {"metadata": {"resourceVersion": resource_version}, "status": status}
    await api.request("PATCH", f"{FINETUNEJOBS}/{name}/status", body, MERGE)


def component_pids(folder: Path) -> dict[str, int]:
    """Process ids of the cluster's components, as this process sees them: those that work in its folder, and kwok."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_text().split("\0")
            ours = (process / "cwd").resolve() == folder.resolve() or str(folder / "kwok.yaml") in words
            name = next((name for name in COMPONENTS for word in words[:2] if Path(word).name == name), None)
            if ours and name:
                found[name] = int(process.name)
    return found


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS

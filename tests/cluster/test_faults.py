"""The operator under fire: a proxy that fails one request in five, SIGKILL at random moments, an API server that is away, and people who change their minds.

What happened is judged by the audit of support/promises.py, never by what the operator says of itself. `make soak` runs the same tests at full size:
SOAK_JOBS, SOAK_KILLS and SOAK_AWAY_SECONDS are the sizes, SOAK_SEED replays a seed.
"""

import asyncio
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.api_client import connected
from support.crowd import Crowd
from support.deployment import Deployment, as_a_kubelet, soon
from support.fault_proxy import Fault, FaultProxy, fault_proxy
from support.kubernetes import Cluster, running_cluster, what_is_missing
from support.kwok import running_kwok
from support.operator_process import A_USERS_RESYNC, install_crd
from support.promises import (
    FINAL,
    Recorder,
    broken_promises,
    is_training,
    name_of,
    owner_of,
    phase_of,
    recording,
    state_after,
    wrong_at_rest,
)

pytestmark = pytest.mark.cluster

CLUSTER_NUMBER = 2  # beside the clusters of the other tests and of the benchmark
RUN_SECONDS = 3.0
JOBS = int(os.environ.get("SOAK_JOBS", "25"))
KILLS = int(os.environ.get("SOAK_KILLS", "8"))
AWAY_SECONDS = float(os.environ.get("SOAK_AWAY_SECONDS", "60"))
LIFE_SECONDS = (0.5, 14.0)  # how long an operator lives before it is killed, its start included
RIGHT_SECONDS = 60.0
RECOVERED_SECONDS = 30.0
ENDED_SECONDS = 90.0
REQUESTS_PER_OBJECT = 8  # a second, at most, when the API server is back
DEFECT = "a defect of the operator"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server and its controllers, with a fake node whose pods kwok plays."""
    missing = what_is_missing(node=False)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing, pytrace=False)
    if missing:
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("faults")
    with running_cluster(folder, CLUSTER_NUMBER, node=False) as kube, running_kwok(kube, folder, run_seconds=RUN_SECONDS):
        install_crd(kube)
        yield kube


@pytest.fixture
def seed() -> int:
    """Of everything random in a test; printed, so that a failure can be replayed."""
    chosen = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(10**6))
    print(f"SOAK_SEED={chosen}")
    return chosen


@dataclass
class Field:
    """Where one test takes place."""

    kube: Cluster
    proxy: FaultProxy
    recorder: Recorder
    crowd: Crowd
    folder: Path

    def deployment(self, back_off: Callable[[int], float], **settings: str) -> Deployment:
        """An operator behind the proxy, with the settings that a user gets."""
        kubeconfig = self.proxy.write_kubeconfig(self.folder / "kubeconfig")
        return Deployment(self.kube, self.folder / "log", kubeconfig, back_off, **{"RESYNC_SECONDS": A_USERS_RESYNC, **settings})

    async def becomes(self, what: str, condition: Callable[[], Awaitable[list[str]]], seconds: float) -> float:
        """Polls until a list of problems is empty and returns the seconds that it took; AssertionError with what is left."""
        begin = time.monotonic()
        while problems := await condition():
            taken = time.monotonic() - begin
            if taken > seconds:
                broken = broken_promises(self.recorder.history)
                raise AssertionError("\n".join([f"not {what} within {seconds:.0f} s:", *problems[:20], "broken promises:", *broken[:20]]))
            await asyncio.sleep(0.25)
        return time.monotonic() - begin

    async def wrong(self) -> list[str]:
        """What is not right now, by the recorder's own knowledge."""
        problems = wrong_at_rest(state_after(self.recorder.history))
        return problems or ([] if await self.recorder.is_up_to_date() else ["the recorder is behind"])

    def never_right(self) -> Callable[[], Awaitable[list[str]]]:
        """What has been wrong at every look since the first one.

        Pods go on to end while the operator catches up, and each is told of a moment later: there may be no moment at which every status is right.
        """
        subjects: set[str] | None = None

        async def still() -> list[str]:
            nonlocal subjects
            now = {problem.partition(": ")[0]: problem for problem in wrong_at_rest(state_after(self.recorder.history))}
            subjects = set(now) if subjects is None else subjects & set(now)
            return [now[subject] for subject in sorted(subjects)]

        return still

    async def comes_right(self, seconds: float) -> float:
        """Every status was right once within the given seconds, which are returned; then every job comes to the end that its name says, and all are right.

        A Job makes its next pod only after a back-off of Kubernetes' own, for which the operator is not to blame.
        """
        taken = await self.becomes("right", self.never_right(), seconds)
        await self.becomes("ended as their names say", self.crowd.unexpected, ENDED_SECONDS)
        await self.becomes("right at the end", self.wrong, 10)
        return taken

    async def unfinished(self, names: list[str]) -> list[str]:
        """Which of these have not ended."""
        live = state_after(self.recorder.history).live["finetunejobs"].values()
        ended = {name_of(item) for item in live if phase_of(item) in FINAL}
        return [name for name in names if name not in ended]

    def require_kept_promises(self, deployment: Deployment) -> None:
        """AssertionError with every promise that any change broke."""
        problems = broken_promises(self.recorder.history)
        assert not problems, "\n".join(problems[:40])
        assert DEFECT not in deployment.log, deployment.log[deployment.log.index(DEFECT) - 200 :][:4000]

    async def jobless(self, names: list[str]) -> list[str]:
        """Which of these have no Job."""
        live = state_after(self.recorder.history).live
        owners = {owner_of(job) for job in live["jobs"].values()}
        return [name for name in names if not any(name_of(item) == name and uid in owners for uid, item in live["finetunejobs"].items())]

    def made_jobs(self) -> int:
        """How many training Jobs there ever were."""
        return len({change.uid for change in self.recorder.history if change.kind == "jobs" and is_training(change.resource)})

    def ended_jobs(self) -> int:
        """How many of them came to an end of their own."""
        return len(state_after(self.recorder.history).ends)


@pytest.fixture
async def field(cluster: Cluster, tmp_path: Path, seed: int, request: pytest.FixtureRequest) -> AsyncIterator[Field]:
    """A namespace of its own, a proxy that makes no trouble yet, and a recorder beside it."""
    async with opened(cluster, tmp_path, seed, re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:40].strip("-")) as made:
        yield made


@asynccontextmanager
async def opened(cluster: Cluster, folder: Path, seed: int, stem: str) -> AsyncIterator[Field]:
    namespace = f"{stem}-{seed}"
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(connected(cluster.kubeconfig, "soak"))
        await api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        stack.push_async_callback(api.request, "DELETE", f"/api/v1/namespaces/{namespace}")
        proxy = await stack.enter_async_context(fault_proxy(cluster.kubeconfig, seed))
        recorder = await stack.enter_async_context(recording(api, namespace))
        yield Field(cluster, proxy, recorder, Crowd(api, namespace, random.Random(seed)), folder)  # noqa: S311 a replay, no secret


async def test_nothing_is_lost_doubled_or_stuck_under_fire(field: Field, seed: int) -> None:
    dice = random.Random(f"{seed}/killer")  # noqa: S311
    deployment = field.deployment(soon(dice))
    lives = [dice.uniform(*LIFE_SECONDS) for _ in range(KILLS)]
    seconds = sum(lives)

    async def kill() -> None:
        for life in lives:
            await asyncio.sleep(life)
            await deployment.kill()

    async with deployment.running():
        field.proxy.trouble(rate=0.2, watch_rate=0.5)
        await asyncio.gather(kill(), field.crowd.apply(JOBS, seconds * 0.6), field.crowd.disturb(2 * JOBS, seconds))
        await field.crowd.resume_all()
        field.proxy.calm()
        try:
            taken = await field.comes_right(RIGHT_SECONDS)
        finally:
            print(field.proxy.summary())
            print(f"{len(deployment.exits)} deaths of the operator, {deployment.crashes} by itself; {dict(field.crowd.done)}")
    print(f"{field.made_jobs()} Jobs of {JOBS} FineTuneJobs, every status right {taken:.0f} s after the last fault")
    field.require_kept_promises(deployment)


async def test_an_api_server_that_was_away_is_met_by_an_operator_that_lost_nothing(field: Field) -> None:
    # A container that is restarted has its pod's name, as the chart gives it, and takes up the Lease of the one before.
    deployment = field.deployment(as_a_kubelet, LEASE_NAMESPACE=field.crowd.namespace, LEASE_IDENTITY="the-pod")
    async with deployment.running():
        before = await field.crowd.apply(JOBS)
        await field.becomes("begun", lambda: field.jobless(before), 60)
        ended = field.ended_jobs()
        await field.proxy.go_away()
        await asyncio.sleep(AWAY_SECONDS / 2)
        await field.crowd.apply(10)
        await field.crowd.disturb(JOBS, AWAY_SECONDS / 2)
        await field.crowd.resume_all()
        assert field.ended_jobs() > ended, "no job ended while the API server was away"
        await field.proxy.come_back()
        returned = time.monotonic()
        try:
            taken = await field.comes_right(RECOVERED_SECONDS)
        finally:
            busiest = field.proxy.busiest_second(returned)
            print(f"exit codes of the operator: {deployment.exits}; busiest second: {busiest} requests")
    print(f"recovered {taken:.0f} s after {AWAY_SECONDS:.0f} s without an API server")
    field.require_kept_promises(deployment)
    assert busiest <= REQUESTS_PER_OBJECT * len(field.crowd.names)
    assert deployment.exits in ([], [1]), "an operator that lost its Lease ends once; the next one waits for the API server"


async def test_trouble_of_some_objects_delays_no_other(field: Field) -> None:
    deployment = field.deployment(as_a_kubelet)
    faults = (Fault.ERROR, Fault.SILENT, Fault.THROTTLED, Fault.CONFLICT)
    bad = await field.crowd.apply(len(faults), kinds=("exit-0",))
    field.proxy.poisons |= {re.compile(rf"[/=]{name}\b"): fault for name, fault in zip(bad, faults, strict=True)}
    async with deployment.running():
        await field.becomes("met by its poison", lambda: poisoned(field.proxy), 20)
        good = await field.crowd.apply(10, kinds=("exit-0",))
        taken = await field.becomes("ended", lambda: field.unfinished(good), 15)
        assert await field.unfinished(bad) == bad
        field.proxy.poisons.clear()
        healed = await field.comes_right(RIGHT_SECONDS)
    print(f"10 others took {taken:.0f} s; the poisoned ones were right {healed:.0f} s after the poison was gone")
    field.require_kept_promises(deployment)


async def poisoned(proxy: FaultProxy) -> list[str]:
    return [] if any(item.fault for item in proxy.seen) else ["no request has met the poison"]


async def test_what_no_watch_says_is_found_by_looking_again(field: Field) -> None:
    field.proxy.poisons[re.compile(r"[?&]watch=")] = Fault.WATCH_SILENT
    deployment = field.deployment(as_a_kubelet, RESYNC_SECONDS="5")
    async with deployment.running():
        await field.becomes("watching", lambda: poisoned(field.proxy), 20)
        await asyncio.sleep(10)  # a watch that falls silent may give its first events before
        await field.crowd.apply(5, kinds=("exit-0", "exit-11"))
        taken = await field.comes_right(40)
    print(f"right after {taken:.0f} s without a single event")
    field.require_kept_promises(deployment)


async def test_a_new_job_waits_for_no_listing_and_an_operator_that_has_just_begun_gives_its_lease_back(field: Field) -> None:
    field.proxy.poisons[re.compile(r"/api/v1/pods\?")] = Fault.ERROR  # of all pods; a job's own can be listed
    deployment = field.deployment(lambda _: 5.0, LEASE_NAMESPACE=field.crowd.namespace, RESYNC_SECONDS="5")
    async with deployment.running():
        new = await field.crowd.apply(3, kinds=("exit-0",))
        await field.becomes("begun", lambda: field.jobless(new), 30)
        assert deployment.ask("/readyz")[0] == 503, "everything was listed"
        deployment.end()
        await field.becomes("ended", lambda: running(deployment), 5)
        assert deployment.exits == [0]
        lease = field.kube.get("lease", "finetune-operator", "-n", field.crowd.namespace)
        assert not lease["spec"].get("holderIdentity")
        field.proxy.poisons.clear()
        await field.comes_right(RIGHT_SECONDS)
    field.require_kept_promises(deployment)


async def running(deployment: Deployment) -> list[str]:
    return [] if deployment.exits else ["the operator is running"]

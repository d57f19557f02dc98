"""Several operators over one Lease, on a real API server: one acts, another takes over, and one that slept does no harm."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.finetunejobs import JobInCluster, merged
from support.kubernetes import Cluster
from support.operator_process import SMALL, OperatorProcess, get_ready
from support.specs import job, minimal_spec

pytestmark = pytest.mark.cluster

Start = Callable[[str], OperatorProcess]


@pytest.fixture
def start(kube: Cluster, namespace: str, tmp_path: Path) -> Iterator[Start]:
    """Starts an operator that shares its Lease with the others of this test."""
    get_ready(kube, tmp_path)
    started: list[OperatorProcess] = []

    def start_one(name: str) -> OperatorProcess:
        operator = OperatorProcess(kube, tmp_path / name, LEASE_NAMESPACE=namespace)
        operator.start()
        started.append(operator)
        return operator

    yield start_one
    for operator in started:
        operator.kill()
        operator.require_no_traceback()


@pytest.fixture
def pair(start: Start, kube: Cluster) -> tuple[OperatorProcess, OperatorProcess]:
    """One that leads and one that waits."""
    first = start("first")
    kube.wait("a leader", lambda: "Leading" in first.log)
    second = start("second")
    kube.wait("a follower", lambda: "Waiting for the Lease" in second.log)
    return first, second


def apply(kube: Cluster, namespace: str, name: str) -> JobInCluster:
    made = JobInCluster(kube, namespace, job(merged(minimal_spec(), SMALL), name))
    made.apply()
    return made


def test_one_acts_and_the_other_takes_over_when_it_is_killed(
    kube: Cluster, namespace: str, pair: tuple[OperatorProcess, OperatorProcess]
) -> None:
    leader, follower = pair
    apply(kube, namespace, "exit-0-first").wait_for_phase("Succeeded", 60)
    assert "Leading" not in follower.log
    assert (leader.ask("/readyz"), follower.ask("/readyz")) == ((200, "ok\n"), (200, "waiting for the Lease\n"))
    leader.kill()
    killed = time.monotonic()
    apply(kube, namespace, "exit-0-second").wait_for_phase("Succeeded", 60)
    print(f"the follower finished a job {time.monotonic() - killed:.0f} s after the leader was killed")


def test_a_leader_that_ends_well_gives_its_place_away_at_once(
    kube: Cluster, namespace: str, pair: tuple[OperatorProcess, OperatorProcess]
) -> None:
    leader, follower = pair
    assert leader.stop() == 0
    kube.wait("the follower leads before the Lease would have ended", lambda: "Leading" in follower.log, 10)


def test_a_leader_that_slept_ends_itself_and_harms_nothing(
    kube: Cluster, namespace: str, pair: tuple[OperatorProcess, OperatorProcess]
) -> None:
    leader, follower = pair
    running = apply(kube, namespace, "wait-asleep")
    running.wait_for_phase("Running", 60)
    leader.freeze()
    kube.wait("another leader", lambda: "Leading" in follower.log, 40)
    running.manifest["spec"]["lora"] = {"rank": 8}
    running.apply()
    running.wait_until("the new run", lambda status: status.get("observedGeneration") == 2 and status.get("phase") == "Running", 60)
    (before,) = running.owned("jobs")
    assert leader.wake() == 1
    assert "another one leads" in leader.log
    apply(kube, namespace, "exit-0-after").wait_for_phase("Succeeded", 60)
    assert [item["metadata"]["uid"] for item in running.owned("jobs")] == [before["metadata"]["uid"]]

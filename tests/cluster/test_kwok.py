"""The operator over pods that kwok plays: what the soak and the benchmark stand on. Each name of kwok/stages.yaml ends as it says, in words the operator reads."""

from collections.abc import Iterator
from typing import Any

import pytest
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.operator_process import OperatorProcess, install_crd
from support.specs import job, minimal_spec

pytestmark = pytest.mark.cluster
SECONDS = 60


@pytest.fixture(scope="module")
def operator(fake_kube: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The CRD and a running operator."""
    install_crd(fake_kube)
    process = OperatorProcess(fake_kube, tmp_path_factory.mktemp("operator") / "log")
    process.start()
    yield process
    process.kill()
    process.require_no_traceback()


@pytest.fixture(scope="module")
def jobs(fake_kube: Cluster, operator: OperatorProcess) -> dict[str, JobInCluster]:
    """One job of each kind, applied together."""
    endings = ("exit-0", "exit-11", "flaky-16", "evicted", "oom", "wait")
    made = {name: JobInCluster(fake_kube, "default", job(minimal_spec(), f"{name}-fake")) for name in endings}
    for item in made.values():
        item.apply()
    return made


def attempts(status: dict[str, Any]) -> list[tuple[int, str]]:
    return [(item["exitCode"], item["reason"]) for item in status["attempts"]]


def test_a_pod_that_succeeds_says_what_it_published(jobs: dict[str, JobInCluster]) -> None:
    status = jobs["exit-0"].wait_for_phase("Succeeded", SECONDS)
    assert [artifact["uri"] for artifact in status["artifacts"]] == ["s3://models/tiny/lora_model"]
    assert attempts(status) == [(0, "Succeeded")]
    assert status["startTime"]


def test_a_pod_that_fails_for_good_says_why(jobs: dict[str, JobInCluster]) -> None:
    status = jobs["exit-11"].wait_for_phase("Failed", SECONDS)
    assert "asked to end with 11" in status["message"]
    assert attempts(status) == [(11, "InvalidData")]


def test_a_pod_without_memory_is_out_of_memory(jobs: dict[str, JobInCluster]) -> None:
    assert attempts(jobs["oom"].wait_for_phase("Failed", SECONDS)) == [(137, "OOMKilled")]


def test_a_flaky_job_fails_once_and_then_succeeds(jobs: dict[str, JobInCluster]) -> None:
    assert attempts(jobs["flaky-16"].wait_for_phase("Succeeded", SECONDS)) == [(16, "InfrastructureError"), (0, "Succeeded")]


def test_an_evicted_job_goes_on_in_another_pod(jobs: dict[str, JobInCluster]) -> None:
    assert attempts(jobs["evicted"].wait_for_phase("Succeeded", SECONDS)) == [(137, "Evicted"), (0, "Succeeded")]


def test_a_job_that_hangs_runs_until_it_is_suspended(jobs: dict[str, JobInCluster]) -> None:
    waiting = jobs["wait"]
    waiting.wait_for_phase("Running", SECONDS)
    waiting.kube.kubectl("patch", "ftj", waiting.name, "--type=merge", "-p", '{"spec":{"runPolicy":{"suspend":true}}}')
    waiting.wait_for_phase("Suspended", SECONDS)
    waiting.kube.wait("no pod at work", lambda: not [pod for pod in waiting.owned("pods") if pod["status"]["phase"] == "Running"])

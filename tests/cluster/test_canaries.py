"""Planted Secrets never come out: a stand-in that tells them in every text it has is repeated by no status, Event, Job or line of the operator's log."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.canaries import HUB_SECRET, S3_SECRET, Watch, read_objects
from support.finetunejobs import JobInCluster, merged
from support.kubernetes import Cluster
from support.operator_process import SMALL, OperatorProcess, get_ready
from support.specs import job, minimal_spec

pytestmark = pytest.mark.cluster

S3, HUB = {"credentials": {"secretName": "s3-keys"}}, {"credentials": {"secretName": "hub-token"}}
CREDENTIALS = {
    "model": HUB,
    "dataset": S3,
    "outputs": {"destinations": [{"uri": "s3://models/tiny"} | S3, {"uri": "hf://acme/tiny"} | HUB]},
}


@pytest.fixture
def operator(kube: Cluster, tmp_path: Path) -> Iterator[OperatorProcess]:
    """One that logs all it can."""
    get_ready(kube, tmp_path)
    process = OperatorProcess(kube, tmp_path / "log", LOG_LEVEL="DEBUG")
    process.start()
    yield process
    process.kill()
    process.require_no_traceback()


def test_what_a_container_tells_of_its_secrets_is_repeated_nowhere(kube: Cluster, namespace: str, operator: OperatorProcess) -> None:
    kube.make_secret(namespace, "s3-keys", S3_SECRET)
    kube.make_secret(namespace, "hub-token", HUB_SECRET)
    jobs = {}
    for name in ("leak-0", "leak-11", "leak-16", "leak-logs"):
        spec = merged(merged(minimal_spec() | SMALL, CREDENTIALS), {"runPolicy": {"backoffLimit": 0}})
        jobs[name] = JobInCluster(kube, namespace, job(spec, name))
        jobs[name].apply()
    told = Watch([*S3_SECRET.values(), *HUB_SECRET.values()])
    for name, made in jobs.items():
        made.wait_for_phase("Succeeded" if name == "leak-0" else "Failed", 90)
        told.read("pod", str(made.owned("pods")[0]["status"]))
        assert len(told.found) >= 2, f"{name} told nothing"  # or the rest would show nothing
        told.found.clear()
    kube.wait("the events", lambda: len(kube.get("events", "-n", namespace, "--field-selector", "reason=Failed")["items"]) == 3)
    watch = Watch([*S3_SECRET.values(), *HUB_SECRET.values()])
    read_objects(watch, kube, namespace, pods=False)
    watch.read("the operator's log", operator.log)
    assert watch.texts == 4
    assert watch.found == []
    assert "***" in jobs["leak-11"].status()["message"]
    assert "last words" in jobs["leak-logs"].status()["message"]

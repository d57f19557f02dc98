"""A job that wants a GPU on a real node: what comes before it, what never comes where preflight refuses, and that neither edit nor kill makes it come twice."""

from collections.abc import Callable
from typing import Any

import pytest
from support.finetunejobs import JobInCluster
from support.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

Make = Callable[..., JobInCluster]
Json = dict[str, Any]
GPU = {"resources": {"gpus": 1}}


def asks_for_a_gpu(item: Json) -> bool:
    pod = item["spec"]["template"]["spec"] if item["kind"] == "Job" else item["spec"]
    return "nvidia.com/gpu" in pod["containers"][0]["resources"].get("limits", {})


def test_the_gpu_is_asked_for_when_preflight_has_passed_and_its_words_stay(make: Make) -> None:
    made = make("exit-0-checked", **GPU)
    status = made.wait_for_phase("Succeeded", 90)
    jobs = sorted(made.owned("jobs"), key=lambda item: str(item["metadata"]["name"]))
    assert [(item["metadata"]["name"], asks_for_a_gpu(item)) for item in jobs] == [
        (status["run"]["jobName"], True),
        (f"{status['run']['jobName']}-pre", False),
    ]
    assert status["preflight"]["message"] == "Kernels were not checked."
    assert status["preflight"]["passedAt"] <= jobs[0]["metadata"]["creationTimestamp"]
    assert len(status["attempts"]) == 1


def test_what_preflight_refuses_never_asks_for_a_gpu(make: Make) -> None:
    made = make("refuse-it", **GPU)
    status = made.wait_for_phase("Failed", 90)
    assert status["message"] == "The stand-in may not write there."
    assert next(item["reason"] for item in status["conditions"] if item["type"] == "Stalled") == "AccessDenied"
    seen = made.owned("jobs") + made.owned("pods")
    assert seen
    assert not [item["metadata"]["name"] for item in seen if asks_for_a_gpu(item)]


def test_a_preflight_that_waits_says_why_and_an_edit_replaces_it(make: Make) -> None:
    made = make("wait-large", resources={"gpus": 1}, scheduling={"nodeSelector": {"kubernetes.io/arch": "nowhere"}})
    made.wait_until("the scheduler's reason", lambda status: "No node can take the pod" in status.get("message", ""), 30)
    made.edit(scheduling={"nodeSelector": {"kubernetes.io/arch": None}})
    made.wait_until("training", lambda status: status.get("preflight") and status["phase"] == "Running", 60)
    assert len(made.owned("jobs")) == 2


def test_preflight_can_be_skipped_and_a_job_without_a_gpu_has_none(make: Make) -> None:
    skipped, small = make("exit-0-skipped", **GPU, runPolicy={"preflight": "Skip"}), make("exit-0-small")
    for made in (skipped, small):
        status = made.wait_for_phase("Succeeded", 60)
        assert "preflight" not in status
        assert [item["metadata"]["name"] for item in made.owned("jobs")] == [status["run"]["jobName"]]


def test_it_is_not_run_again_when_the_operator_is_killed_or_the_training_job_is_deleted(make: Make, operator: OperatorProcess) -> None:
    made = make("wait-twice", **GPU)
    status = made.wait_until("training", lambda status: status if status.get("preflight") and status["phase"] == "Running" else None, 60)
    checked = next(item for item in made.owned("jobs") if not asks_for_a_gpu(item))
    operator.kill()
    made.kube.kubectl("delete", "job", status["run"]["jobName"], "-n", made.namespace)
    operator.start()
    made.kube.wait("another attempt", lambda: len(made.status()["attempts"]) == 2, 60)
    assert made.status()["preflight"] == status["preflight"]
    assert [item["metadata"]["uid"] for item in made.owned("jobs") if not asks_for_a_gpu(item)] == [checked["metadata"]["uid"]]

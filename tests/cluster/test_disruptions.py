"""Disruptions on a real node: eviction, drain, preemption and a full disk. None counts as a failure, and another pod of the same Job goes on."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster

pytestmark = pytest.mark.cluster

NO_RETRIES: dict[str, Any] = {"runPolicy": {"backoffLimit": 0}}
Make = Callable[..., JobInCluster]


def require_another_pod(made: JobInCluster, first: dict[str, Any], job_uids: list[str]) -> None:
    """The same Job runs another pod, and the status tells of both."""
    assert made.running_pod()["metadata"]["uid"] != first["uid"]
    ended, running = made.wait_until("two attempts", lambda status: len(status.get("attempts", ())) == 2 and status["attempts"], 30)
    assert (ended["podUID"], ended["reason"]) == (first["uid"], "Disrupted")
    assert "end" not in running
    assert made.job_uids() == job_uids
    assert not made.owned("jobs")[0]["status"].get("failed")
    made.wait_for_phase("Running", 30)


def test_an_evicted_pod_is_followed_by_another(make: Make) -> None:
    made = make("wait-evicted", **NO_RETRIES)
    pod, jobs = made.running_pod()["metadata"], made.job_uids()
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod["name"], "namespace": made.namespace}}
    path = f"/api/v1/namespaces/{made.namespace}/pods/{pod['name']}/eviction"
    made.kube.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(eviction))
    require_another_pod(made, pod, jobs)


@pytest.fixture
def uncordoned(kube: Cluster) -> Iterator[None]:
    """The node takes pods again after the test."""
    yield
    kube.kubectl("uncordon", "node1")


def test_a_drained_node_is_waited_for(make: Make, uncordoned: None) -> None:
    made = make("wait-drained", **NO_RETRIES)
    pod, jobs = made.running_pod()["metadata"], made.job_uids()
    made.kube.kubectl("drain", "node1", f"--pod-selector=finetune.dev/job={made.name}", "--delete-emptydir-data", "--timeout=60s")
    status = made.wait_for_reason("Unschedulable")
    assert "unschedulable" in status["message"]
    made.kube.kubectl("uncordon", "node1")
    require_another_pod(made, pod, jobs)


PRIORITY = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}, "value": 1000}


def urgent_pod(gpus: int) -> dict[str, Any]:
    """A pod that the scheduler makes room for."""
    security = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "pause",
        "image": "localhost/pause:1",
        "imagePullPolicy": "Never",
        "securityContext": security,
        "resources": {"limits": {"nvidia.com/gpu": str(gpus)}},
    }
    spec = {"priorityClassName": "urgent", "terminationGracePeriodSeconds": 1, "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "urgent"}, "spec": spec}


def test_a_preempted_pod_waits_for_its_gpu_and_goes_on(make: Make, kube: Cluster, namespace: str) -> None:
    kube.kubectl("apply", "-f", "-", input=json.dumps(PRIORITY))
    made = make("wait-preempted", resources={"gpus": 1}, **NO_RETRIES)
    pod, jobs = made.running_pod()["metadata"], made.job_uids()
    kube.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(urgent_pod(gpus=4)))
    kube.kubectl("wait", "-n", namespace, "pod/urgent", "--for=condition=Ready", "--timeout=60s")
    status = made.wait_for_reason("Unschedulable")
    assert "Insufficient nvidia.com/gpu" in status["message"]
    kube.kubectl("delete", "pod", "urgent", "-n", namespace)
    require_another_pod(made, pod, jobs)
    assert made.status()["gpuSeconds"] >= 1


def test_a_pod_that_fills_its_workspace_is_told_what_to_raise(make: Make) -> None:
    made = make("fill", storage={"workspace": {"size": "4Mi"}}, **NO_RETRIES)

    def evicted(status: dict[str, Any]) -> bool:
        return any(attempt.get("reason") == "Evicted" for attempt in status.get("attempts", ()))

    made.wait_until("an eviction", evicted, 60)
    made.wait_until("the mend", lambda status: "raise storage.workspace.size" in status["message"], 60)

"""Disruptions on a real node: eviction, drain, preemption and a full disk. None counts as a failure, and another pod of the same Job goes on."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.operator_process import OperatorProcess, small_job
from support.watching import Watch

pytestmark = pytest.mark.cluster

NO_RETRIES: dict[str, Any] = {"runPolicy": {"backoffLimit": 0}}


@dataclass(frozen=True)
class Disrupted:
    """A job whose first pod was taken away."""

    job: JobInCluster
    pod_uid: str
    job_uids: list[str]

    def require_another_pod(self, reason: str = "Disrupted") -> None:
        """The same Job runs another pod, and the status tells of both."""
        assert self.job.running_pod()["metadata"]["uid"] != self.pod_uid
        ended, running = self.job.wait_until("two attempts", lambda status: len(status.get("attempts", ())) == 2 and status["attempts"], 30)
        assert (ended["podUID"], ended["reason"]) == (self.pod_uid, reason)
        assert "end" not in running
        assert self.job.job_uids() == self.job_uids
        assert not self.job.owned("jobs")[0]["status"].get("failed")
        self.job.wait_for_phase("Running", 30)


def run_and(made: JobInCluster, take_away: Callable[[JobInCluster, str], Any]) -> Disrupted:
    """Takes the first pod away, named by its name, once it runs."""
    pod, job_uids = made.running_pod()["metadata"], made.job_uids()
    take_away(made, pod["name"])
    return Disrupted(made, pod["uid"], job_uids)


def evict(made: JobInCluster, pod: str) -> None:
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": made.namespace}}
    path = f"/api/v1/namespaces/{made.namespace}/pods/{pod}/eviction"
    made.kube.kubectl("create", "--raw", path, "-f", "-", input=json.dumps(eviction))


def delete(made: JobInCluster, pod: str) -> None:
    made.kube.kubectl("delete", "pod", pod, "-n", made.namespace, "--wait=false")


def drain(made: JobInCluster, _: str) -> None:
    made.kube.kubectl("drain", "node1", f"--pod-selector=finetune.dev/job={made.name}", "--delete-emptydir-data", "--timeout=60s")


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


def preempt(made: JobInCluster, _: str) -> None:
    """All GPUs of the node for somebody else."""
    made.kube.kubectl("apply", "-f", "-", input=json.dumps(PRIORITY))
    made.kube.kubectl("create", "-n", made.namespace, "-f", "-", input=json.dumps(urgent_pod(gpus=4)))


@pytest.fixture(scope="module")
def fill(kube: Cluster, operator: OperatorProcess, finetunejobs: Watch, make_namespace: Callable[[str], str]) -> JobInCluster:
    """Begun first, since a kubelet looks at its disk every 10 s."""
    made = small_job(kube, make_namespace("filled"), "fill", storage={"workspace": {"size": "4Mi"}}, **NO_RETRIES)
    made.apply()
    return made


@pytest.fixture(scope="module")
def disrupted(kube: Cluster, fill: JobInCluster, make_namespace: Callable[[str], str]) -> Iterator[dict[str, Disrupted]]:
    """All of it at once, since a Job waits 10 s before it makes another pod; the drain, which closes the node, comes last."""
    namespace, ways = make_namespace("disrupted"), {"evicted": evict, "deleted": delete, "preempted": preempt, "drained": drain}
    policy = {"runPolicy": NO_RETRIES["runPolicy"] | {"preflight": "Skip"}}
    jobs = {way: small_job(kube, namespace, f"wait-{way}", resources={"gpus": int(way == "preempted")}, **policy) for way in ways}
    kube.kubectl("create", "-n", namespace, "-f", "-", input="\n---\n".join(json.dumps(job.manifest) for job in jobs.values()))
    yield {way: run_and(job, ways[way]) for way, job in jobs.items()}
    kube.kubectl("uncordon", "node1")
    kube.kubectl("delete", "namespace", namespace, fill.namespace, "--wait=false")


def test_a_drained_node_is_waited_for(disrupted: dict[str, Disrupted], kube: Cluster) -> None:
    drained = disrupted["drained"]
    assert "unschedulable" in drained.job.wait_for_reason("Unschedulable")["message"]
    kube.kubectl("uncordon", "node1")
    drained.require_another_pod()


def test_a_preempted_pod_waits_for_its_gpu_and_goes_on(disrupted: dict[str, Disrupted], kube: Cluster) -> None:
    preempted = disrupted["preempted"]
    preempted.job.wait_until("its GPU", lambda status: "Insufficient nvidia.com/gpu" in status["message"], 60)
    kube.kubectl("delete", "pod", "urgent", "-n", preempted.job.namespace)
    preempted.require_another_pod()
    assert preempted.job.status()["gpuSeconds"] >= 1


def test_an_evicted_pod_is_followed_by_another(disrupted: dict[str, Disrupted]) -> None:
    disrupted["evicted"].require_another_pod()


def test_a_pod_deleted_by_hand_is_followed_by_another(disrupted: dict[str, Disrupted]) -> None:
    disrupted["deleted"].require_another_pod("Checkpointed")


def test_a_pod_that_fills_its_workspace_is_told_what_to_raise(fill: JobInCluster, finetunejobs: Watch) -> None:
    def told(item: dict[str, Any]) -> bool:
        return item["metadata"]["name"] == "fill" and "raise storage.workspace.size" in item.get("status", {}).get("message", "")

    status = fill.kube.wait("the mend", lambda: finetunejobs.first(told), 60).object["status"]
    assert status["attempts"][0]["reason"] == "Evicted"
    assert status["phase"] == "Pending"

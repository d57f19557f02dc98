"""Whose Job it is, on a real API server: one of our own is taken up, a stranger's is left alone, and one that was deleted by hand is made again."""

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from finetune_api import names
from finetune_api.digests import run_digest
from finetune_api.spec import FineTuneJobSpec
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.operator_process import OperatorProcess
from support.watching import StatusRules

pytestmark = pytest.mark.cluster

Make = Callable[..., JobInCluster]


def lose_status(made: JobInCluster) -> None:
    """Leaves the object as an operator that died before its first status write would."""
    made.kube.kubectl("patch", "ftj", made.name, "-n", made.namespace, "--subresource=status", "--type=merge", "-p", '{"status": null}')
    assert made.status() == {}


def test_a_job_whose_status_was_never_written_is_adopted_running_or_ended(
    make: Make, operator: OperatorProcess, status_rules: StatusRules
) -> None:
    running, ended = make("wait-adopted"), make("exit-0-adopted")
    status_rules.exempt |= {running.name, ended.name}
    pod, before = running.running_pod()["metadata"]["uid"], ended.wait_for_phase("Succeeded", 60)
    jobs = running.job_uids(), ended.job_uids()
    operator.kill()
    lose_status(running)
    lose_status(ended)
    operator.start()
    assert ended.wait_for_phase("Succeeded", 60) | {"conditions": None} == before | {"conditions": None}
    assert [attempt["podUID"] for attempt in running.wait_for_phase("Running", 60)["attempts"]] == [pod]
    assert running.running_pod()["metadata"]["uid"] == pod
    assert (running.job_uids(), ended.job_uids()) == jobs


def foreign_job(name: str) -> dict[str, Any]:
    """A Job that someone else made."""
    container = {"name": "main", "image": "localhost/pause:1"}
    spec = {"suspend": True, "template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def test_a_namesake_is_said_and_never_touched(make: Make, kube: Cluster, namespace: str) -> None:
    made = make("exit-0-taken")
    made.wait_for_phase("Succeeded", 60)
    wanted = deepcopy(made.manifest["spec"]) | {"runPolicy": {"rerun": "again"}}
    digest = run_digest(FineTuneJobSpec.model_validate(wanted))
    name = names.training_job_name(made.name, made.read()["metadata"]["uid"], digest)
    kube.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(foreign_job(name)))
    before = kube.wait(
        "its controller's word", lambda: (job := kube.get("job", name, "-n", namespace)).get("status", {}).get("conditions") and job
    )
    made.edit(runPolicy={"rerun": "again"})
    status = made.wait_for_reason("NameTaken")
    assert name in status["message"]
    assert made.condition("Stalled")["status"] == "True"
    assert kube.get("job", name, "-n", namespace) == before
    kube.kubectl("delete", "job", name, "-n", namespace)
    made.wait_for_phase("Succeeded", 60)
    assert made.read()["status"]["run"]["jobName"] == name


def test_a_job_deleted_by_hand_is_made_again_and_both_pods_are_attempts(make: Make) -> None:
    made = make("wait-again", runPolicy={"backoffLimit": 0})
    pod, jobs = made.running_pod(), made.job_uids()
    made.kube.kubectl("delete", "job", "-n", made.namespace, "-l", f"finetune.dev/job={made.name}")
    assert made.running_pod()["metadata"]["uid"] != pod["metadata"]["uid"]
    attempts = made.wait_until("two attempts", lambda status: len(status.get("attempts", ())) == 2 and status["attempts"], 30)
    assert attempts[0]["podUID"] == pod["metadata"]["uid"]
    assert len(made.job_uids()) == 1
    assert made.job_uids() != jobs
    made.wait_for_phase("Running", 30)

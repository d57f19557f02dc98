"""What an older version of the operator left in a cluster, read by this one: nothing is restarted, nothing trained again.

stored/VERSION holds FineTuneJobs with their status and Jobs, as stored/record.py took them from a real run. Here they get the UIDs of today.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

STORED = Path(__file__).parent / "stored"
VERSIONS = sorted(folder.name for folder in STORED.iterdir() if (folder / "running.json").exists())
Json = dict[str, Any]


@dataclass(frozen=True)
class Upgraded:
    """A stored object that stands in the cluster again."""

    job: JobInCluster
    status: Json
    job_uid: str


def restore(kube: Cluster, namespace: str, path: Path, *, with_job: bool = True) -> Upgraded:
    """The object, its Job and its status, made while no operator runs."""
    stored = json.loads(path.read_text())
    metadata, run = stored["finetunejob"]["metadata"], stored["finetunejob"]["status"]["run"]
    old_uid, name, job_name = metadata.pop("uid"), metadata["name"], run["jobName"]
    # Else the operator of today would not find the Jobs of that version.
    assert names.training_job_name(name, old_uid, run["runDigest"]) == job_name
    made = JobInCluster(kube, namespace, {key: value for key, value in stored["finetunejob"].items() if key != "status"})
    made.apply()
    uid = made.read()["metadata"]["uid"]
    rewired = path.read_text().replace(old_uid, uid).replace(job_name, names.training_job_name(name, uid, run["runDigest"]))
    status, child = json.loads(rewired)["finetunejob"]["status"], json.loads(rewired)["job"]
    if with_job:
        kube.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(child))
    patch = json.dumps({"status": status})
    kube.kubectl("patch", "ftj", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
    return Upgraded(made, status, made.job_uids()[0] if with_job else "")


def test_there_is_a_stored_version() -> None:
    assert VERSIONS
    for version in VERSIONS:
        assert {path.stem for path in (STORED / version).glob("*.json")} == {"running", "succeeded", "failed"}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_of_an_older_version_goes_on_and_one_that_had_ended_starts_nothing(
    make: Callable[..., JobInCluster], operator: OperatorProcess, kube: Cluster, make_namespace: Callable[[str], str], version: str
) -> None:
    operator.kill()
    namespace, cleaned = make_namespace("upgraded"), make_namespace("cleaned")  # in the second, TTLs have removed the Jobs
    running = restore(kube, namespace, STORED / version / "running.json")
    ended = [restore(kube, namespace, STORED / version / f"{phase}.json") for phase in ("succeeded", "failed")]
    gone = [restore(kube, cleaned, STORED / version / f"{phase}.json", with_job=False) for phase in ("succeeded", "failed")]
    kube.wait("the end of both Jobs", lambda: all(item.job.owned("jobs")[0].get("status", {}).get("conditions") for item in ended))
    pod = running.job.running_pod()["metadata"]["uid"]
    operator.start()
    make("exit-0-new").wait_for_phase("Succeeded", 60)
    running.job.wait_until("today's word on the running one", lambda status: any(a["podUID"] == pod for a in status["attempts"]), 60)
    assert [item.job.job_uids() for item in (running, *ended)] == [[item.job_uid] for item in (running, *ended)]
    assert [item["metadata"]["uid"] for item in running.job.owned("pods")] == [pod]
    assert {key: running.job.status()[key] for key in ("phase", "run", "startTime")} == {
        key: running.status[key] for key in ("phase", "run", "startTime")
    }
    assert [item.job.status() for item in (*ended, *gone)] == [item.status for item in (*ended, *gone)]
    assert not kube.get("jobs", "-n", cleaned).get("items")

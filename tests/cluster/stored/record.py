#!/usr/bin/env python3
"""Records what this checkout's operator leaves in a cluster: record.py DIR, with the PYTHONPATH of the Makefile.

Once for each released version, into a folder of its own that never changes again; test_upgrade.py gives all of them to the operator of today.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.finetunejobs import JobInCluster
from support.kubernetes import running_cluster
from support.operator_process import OperatorProcess, get_ready, small_job

PHASES = {"exit-0-stored": "Succeeded", "exit-11-stored": "Failed", "wait-stored": "Running"}
NAMESPACE = "stored"
GENERATED = ("batch.kubernetes.io/", "controller-uid", "job-name")


def trimmed(item: dict[str, Any]) -> dict[str, Any]:
    """Without what an API server or a controller adds by itself."""
    kept = {"name", "labels", "ownerReferences", "uid"}
    item["metadata"] = {key: value for key, value in item["metadata"].items() if key in kept}
    if item["kind"] == "Job":
        del item["status"], item["spec"]["selector"], item["metadata"]["uid"]
        for holder in (item["metadata"], item["spec"]["template"]["metadata"]):
            holder["labels"] = {key: value for key, value in holder["labels"].items() if not key.startswith(GENERATED)}
    return item


def record(job: JobInCluster, folder: Path) -> None:
    """One FineTuneJob and its Job, as a file named for the phase."""
    phase = PHASES[job.name]
    job.wait_for_phase(phase, 120)
    (child,) = job.owned("jobs")
    stored = {"finetunejob": trimmed(job.read()), "job": trimmed(child)}
    (folder / f"{phase.lower()}.json").write_text(json.dumps(stored, indent=1) + "\n")


def main(folder: Path) -> None:
    """Records all of PHASES."""
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch, running_cluster(Path(scratch)) as kube:
        get_ready(kube, Path(scratch))
        kube.kubectl("create", "namespace", NAMESPACE)
        operator = OperatorProcess(kube, Path(scratch) / "log")
        kube.wait("its service account", lambda: kube.get("serviceaccount", "default", "-n", NAMESPACE))
        operator.start()
        jobs = [small_job(kube, NAMESPACE, name, runPolicy={"ttlSecondsAfterFinished": 3600}) for name in PHASES]
        for job in jobs:
            job.apply()
        for job in jobs:
            record(job, folder)
        operator.kill()
        kube.kubectl("delete", "namespace", NAMESPACE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

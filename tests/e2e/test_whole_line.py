"""The whole line on real input: YAML in with kubectl, a verified and quantized SmolLM2 out, on a real cluster with a real S3 server.

Each job is trained once, by its fixture; the tests look at what a user sees of it. They run in the order of this file.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_operator.permissions import JOBS, LEASE
from support import canaries
from support.audit import requests_of, uses_of
from support.chart import RELEASE
from support.finetunejobs import JobInCluster
from support.world import World

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


def training_pod(job: JobInCluster) -> str | None:
    """The name of the job's pod that runs."""
    running = [pod["metadata"]["name"] for pod in job.owned("pods") if pod["status"].get("phase") == "Running"]
    return running[0] if running else None


def keys(world: World, prefix: str) -> set[str]:
    pages = world.s3.client().get_paginator("list_objects_v2").paginate(Bucket=world.bucket, Prefix=f"{prefix}/")
    return {item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page.get("Contents", [])}


def reported(world: World, prefix: str) -> dict[str, Any]:
    return dict(json.loads(world.s3.client().get_object(Bucket=world.bucket, Key=f"{prefix}/report.json")["Body"].read()))


def steps_done(status: dict[str, Any]) -> int:
    return int(status.get("progress", {}).get("step", 0))


@pytest.fixture(scope="module")
def experiment(world: World) -> JobInCluster:
    """examples/experiment.yaml, whose pod is deleted in mid-run (SIGTERM), once it ended."""
    job = world.job("experiment")
    job.apply()
    job.wait_until("a first step", lambda status: steps_done(status) >= 1)
    world.kube.kubectl("delete", "pod", "-n", world.namespace, str(training_pod(job)), "--wait=false")
    job.wait_for_phase("Succeeded")
    return job


@pytest.fixture(scope="module")
def production(world: World) -> JobInCluster:
    """examples/production.yaml, whose pod is evicted without any grace (SIGKILL) once a checkpoint was mirrored, once it ended."""
    job = world.job("production")
    job.apply()
    job.wait_until("a mirrored checkpoint", lambda status: any("/.checkpoints/" in f"/{key}" for key in keys(world, "production")))
    evict(job)
    job.wait_for_phase("Succeeded")
    return job


def evict(job: JobInCluster) -> None:
    """What a preempting scheduler or a drained node does, without grace."""
    pod = training_pod(job)
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": job.namespace},
        "deleteOptions": {"gracePeriodSeconds": 0},
    }
    job.kube.kubectl("create", "--raw", f"/api/v1/namespaces/{job.namespace}/pods/{pod}/eviction", "-f", "-", input=json.dumps(eviction))


@pytest.fixture(scope="module")
def published(world: World, production: JobInCluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What production published to the bucket, downloaded."""
    folder = tmp_path_factory.mktemp("published")
    for key in keys(world, "production"):
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        world.s3.client().download_file(world.bucket, f"production/{key}", str(target))
    return folder


def another_job_is_seen_to_its_end(world: World, name: str) -> None:
    """The operator has worked through everything that happened before this job was applied: a barrier, instead of a sleep."""
    job = world.job("experiment", {"metadata": {"name": name}, "spec": {"model": {"credentials": {"secretName": "not-there"}}}})
    job.apply()
    job.wait_for_phase("Failed", 90)


def test_an_adapter_is_trained_and_published(world: World, experiment: JobInCluster) -> None:
    assert [artifact["kind"] for artifact in experiment.status()["artifacts"]] == ["adapter"]
    assert {"lora_model/adapter_config.json", "lora_model/adapter_model.safetensors", "manifest.json"} <= keys(world, "experiment")
    assert not [key for key in keys(world, "experiment") if key.startswith("model-torchao/")]


def test_a_deleted_pod_saves_its_step_and_the_next_one_goes_on(experiment: JobInCluster) -> None:
    first, *_, last = experiment.status()["attempts"]
    assert first["exitCode"] == 18
    assert last["exitCode"] == 0
    assert first["podUID"] != last["podUID"]


def test_a_pod_that_dies_without_warning_resumes_from_the_mirrored_checkpoint(world: World, production: JobInCluster) -> None:
    status = production.status()
    assert len(status["attempts"]) == 2
    assert status["attempts"][-1]["exitCode"] == 0
    assert reported(world, "production")["training"]["resumedFrom"] >= 1


def test_checkpoints_are_removed_after_success(world: World, production: JobInCluster) -> None:
    assert not [key for key in keys(world, "production") if ".checkpoints/" in key]


def test_the_status_tells_what_was_made(world: World, production: JobInCluster) -> None:
    status = production.status()
    assert status["quality"]["shippedMatchesTrained"] is True
    assert {"baseLoss", "tunedLoss", "nearestLoss", "ptqLoss", "quantizedLoss"} <= status["quality"].keys()
    assert status["qat"] | {"coverage": ""} == {"scheme": "int8-int4", "layers": 210, "coverage": ""}
    assert {artifact["uri"].split("://")[0] for artifact in status["artifacts"]} == {"s3", "hf"}
    assert status["observedGeneration"] == production.read()["metadata"]["generation"]
    (ready,) = [item for item in status["conditions"] if item["type"] == "Ready"]
    assert ready["status"] == "True"


def test_every_published_file_is_what_the_manifest_says(published: Path) -> None:
    listed = json.loads((published / "manifest.json").read_text())["files"]
    assert {item["path"] for item in listed} | {"manifest.json"} == {
        str(path.relative_to(published)) for path in published.rglob("*") if path.is_file()
    }
    for item in listed:
        assert hashlib.sha256((published / item["path"]).read_bytes()).hexdigest() == item["sha256"], item["path"]


def test_the_published_model_gives_the_logits_that_the_trainer_recorded_and_writes_a_sentence(published: Path) -> None:
    script = Path(__file__).with_name("load_published.py")
    loaded = subprocess.run(
        [sys.executable, script, published / "model-torchao", published / "proof"], capture_output=True, text=True, check=True
    )
    result = json.loads(loaded.stdout.splitlines()[-1])
    assert result["difference"] == 0.0
    assert len(result["sentence"].split()) > 6
    assert any("Int8" in kind or "Intx" in kind for kind in result["kinds"])


def test_the_same_yaml_again_changes_nothing(world: World, production: JobInCluster) -> None:
    before = production.read()
    jobs = [job["metadata"]["uid"] for job in production.owned("jobs")]
    assert production.apply().endswith("unchanged")
    another_job_is_seen_to_its_end(world, "after-the-same-yaml")
    assert production.read() == before
    assert [job["metadata"]["uid"] for job in production.owned("jobs")] == jobs


def test_another_destination_gets_the_model_without_another_training(world: World, production: JobInCluster) -> None:
    trained = reported(world, "production")
    first = production.manifest["spec"]["outputs"]["destinations"][0]
    production.manifest["spec"]["outputs"]["destinations"].append(first | {"uri": f"s3://{world.bucket}/elsewhere"})
    production.apply()

    def published_again() -> bool:
        status = production.status()
        return status["observedGeneration"] == 2 and status["phase"] == "Succeeded"

    world.kube.wait("the model at another destination", published_again, 180)
    assert reported(world, "elsewhere") == trained  # a second training would have taken other times
    assert {key for key in keys(world, "elsewhere") if key != "manifest.json"} <= keys(world, "production")


def test_a_model_is_shared_on_the_hub(world: World) -> None:
    job = world.job("share")
    job.apply()
    status = job.wait_for_phase("Succeeded")
    assert {artifact["uri"].split("://")[0] for artifact in status["artifacts"]} == {"hf"}


def test_no_secret_and_no_row_comes_out_anywhere(world: World, experiment: JobInCluster, production: JobInCluster) -> None:
    """Statuses, Events, Jobs, termination messages and logs of every run so far, those of test_bad_input.py with them."""
    watch = canaries.Watch([*canaries.ALL, world.s3.access_key, world.s3.secret_key, world.hub.token])
    canaries.read_objects(watch, world.kube, world.namespace, pods=True)
    watch.read("the operator's log", world.kube.kubectl("logs", "-n", world.system, f"deployment/{RELEASE}").stdout)
    assert watch.texts >= 7
    assert watch.found == []


def test_a_deleted_job_is_not_trained_again(world: World, experiment: JobInCluster) -> None:
    world.kube.kubectl("delete", "jobs", "-n", world.namespace, "-l", f"finetune.dev/job={experiment.name}")
    another_job_is_seen_to_its_end(world, "after-a-deleted-job")
    assert experiment.status()["phase"] == "Succeeded"
    assert not experiment.owned("jobs")


def test_a_deleted_finetunejob_takes_its_job_and_pods_along_and_leaves_the_model(world: World, production: JobInCluster) -> None:
    before = keys(world, "production")
    world.kube.kubectl("delete", "finetunejob", "-n", world.namespace, production.name, "--timeout=30s")
    world.kube.wait("no Job is left", lambda: not production.owned("jobs"))
    world.kube.wait("no pod is left", lambda: not production.owned("pods"))
    assert keys(world, "production") == before


def test_the_operator_asked_for_nothing_beyond_its_permissions(world: World, production: JobInCluster) -> None:
    requests = requests_of(world.kube, world.system, RELEASE)
    assert len(requests) > 50
    assert uses_of(requests) <= {(item.group, item.resource, item.verb) for item in (*JOBS, *LEASE)}
    assert [request for request in requests if not request.allowed or request.code == 403] == []
    assert {request.namespace for request in requests if request.resource} == {world.namespace, world.system}

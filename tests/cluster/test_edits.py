"""Edits and deletions on a real API server: each field does what its class says, and nothing trains twice.

A table holds an edit of every field that is served; a field without one fails the test.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from finetune_api.fields import FieldClass, leaves, marks_of
from finetune_api.spec import FineTuneJobSpec
from finetune_api.validation import spec_problems
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.operator_process import SMALL, OperatorProcess, small_job
from support.specs import changed, minimal_spec
from support.watching import Watch

pytestmark = pytest.mark.cluster

OPERATOR_SETTINGS = {"ALLOWED_IMAGES": '["*"]', "ALLOWED_SERVICE_ACCOUNTS": '["*"]'}
Json = dict[str, Any]
Make = Callable[..., JobInCluster]

CLASSES = {".".join(path): (info, field_class) for path, info, field_class in leaves(FineTuneJobSpec)}
UNSERVED = {path for path, (info, _) in CLASSES.items() if marks_of(info).get("notYet") and set(marks_of(info)["served"]) <= {info.default}}
# path of the field: its edited value, and what else the spec needs for it, before the edit already.
EDITS: dict[str, tuple[Any, Json]] = {
    "model.source": ("hf://acme/other", {}),
    "model.credentials.secretName": ("hub-token", {}),
    "model.endpoint": ("https://s3.example.com", {"model.source": "s3://models/base"}),
    "model.dtype": ("bfloat16", {}),
    "model.trustRemoteCode": (True, {}),
    "dataset.source": ("s3://corpora/other.jsonl", {}),
    "dataset.credentials.secretName": ("s3-keys", {}),
    "dataset.endpoint": ("https://s3.example.com", {}),
    "dataset.format": ("chat", {}),
    "dataset.evaluation.percent": (10, {}),
    "dataset.evaluation.source": ("s3://corpora/held-out.jsonl", {}),
    "lora.rank": (8, {}),
    "lora.alpha": (8, {}),
    "lora.targetModules": ("q_proj", {}),
    "quantization.scheme": ("int8", {}),
    "quantization.groupSize": (64, {"quantization.scheme": "int4"}),
    "quantization.qatPercent": (25, {}),
    "quantization.distill": (False, {}),
    "quantization.acceptInexact": (True, {}),
    "training.backend": ("native", {}),
    "training.epochs": (2, {}),
    "training.batchSize": (8, {}),
    "training.learningRate": ("5e-5", {}),
    "training.maxLength": (512, {}),
    "training.seed": (7, {}),
    "training.checkpointEvery": (10, {}),
    "quality.maxLossIncreasePercent": ("2.5", {}),
    "quality.onFailure": ("Warn", {}),
    "outputs.artifacts": (["adapter"], {}),
    "outputs.destinations.0.uri": ("s3://models/other", {}),
    "outputs.destinations.0.credentials.secretName": ("s3-keys", {}),
    "outputs.destinations.0.endpoint": ("https://s3.example.com", {}),
    "outputs.destinations.0.private": (True, {"outputs.destinations.0.uri": "hf://acme/tiny"}),
    "resources.gpus": (1, {"runPolicy.preflight": "Skip"}),
    "resources.gpuType": ("nvidia-h100-80gb", {}),
    "resources.memory": ("128Mi", {}),
    "resources.cpu": ("20m", {}),
    "scheduling.nodeSelector": ({"zone": "a"}, {}),
    "scheduling.tolerations.0.key": ("other", {"scheduling.tolerations": [{"key": "gpu"}]}),
    "scheduling.tolerations.0.operator": ("Exists", {"scheduling.tolerations": [{"key": "gpu"}]}),
    "scheduling.tolerations.0.value": ("h100", {"scheduling.tolerations": [{"key": "gpu"}]}),
    "scheduling.tolerations.0.effect": ("NoSchedule", {"scheduling.tolerations": [{"key": "gpu"}]}),
    "scheduling.priorityClassName": ("urgent", {}),
    "scheduling.runtimeClassName": ("nvidia", {}),
    "pod.image": ("localhost/other:1", {}),
    "pod.imagePullSecrets": (["registry"], {}),
    "pod.serviceAccountName": ("trainer", {}),
    "storage.cache.persistentVolumeClaim": ("models", {}),
    "storage.workspace.persistentVolumeClaim": ("work", {}),
    "storage.workspace.size": ("2Gi", {}),
    "storage.workspace.storageClassName": ("fast", {}),
    "storage.checkpoints.uri": ("s3://models/checkpoints", {}),
    "storage.checkpoints.credentials.secretName": ("s3-keys", {"storage.checkpoints.uri": "s3://models/checkpoints"}),
    "storage.checkpoints.endpoint": ("https://s3.example.com", {"storage.checkpoints.uri": "s3://models/checkpoints"}),
    "runPolicy.preflight": ("Skip", {}),
    "runPolicy.rerun": ("again", {}),
    "runPolicy.suspend": (False, {}),
    "runPolicy.backoffLimit": (7, {}),
    "runPolicy.activeDeadlineSeconds": (3600, {}),
    "runPolicy.ttlSecondsAfterFinished": (60, {}),
}


def path_of_class(path: str) -> str:
    """Without list indices, as the fields of a list's items are named."""
    return ".".join(part for part in path.split(".") if not part.isdigit())


def name_of(path: str) -> str:
    return "wait-" + path_of_class(path).replace(".", "-").lower()


@dataclass(frozen=True)
class Edited:
    """A job before and after the edit of one field."""

    before: Json
    after: Json
    job_before: Json
    job_after: Json

    def changes(self, digest: str) -> bool:
        return bool(self.before["run"][digest] != self.after["run"][digest])


def by_name(kube: Cluster, namespace: str, kind: str) -> dict[str, Json]:
    """Objects by the FineTuneJob that they are, or belong to."""
    items = kube.get(kind, "-n", namespace).get("items", [])
    return {item["metadata"].get("labels", {}).get("finetune.dev/job", item["metadata"]["name"]): item for item in items}


def wait_for_generation(kube: Cluster, namespace: str, generation: int) -> tuple[dict[str, Json], dict[str, Json]]:
    """FineTuneJobs and Jobs, once each status speaks of this generation and each run has its one Job."""

    def settled() -> tuple[dict[str, Json], dict[str, Json]] | None:
        jobs, children = by_name(kube, namespace, "ftj"), by_name(kube, namespace, "jobs")
        done = [
            name
            for name, item in jobs.items()
            if item.get("status", {}).get("observedGeneration") == generation
            and item["status"]["phase"] in ("Suspended", "Running")
            and item["status"]["run"]["jobName"] == children.get(name, {}).get("metadata", {}).get("name")
        ]
        return (jobs, children) if len(done) == len(EDITS) else None

    found: tuple[dict[str, Json], dict[str, Json]] = kube.wait(f"generation {generation} of all", settled, 90)
    return found


@pytest.fixture(scope="module")
def edited(
    kube: Cluster, operator: OperatorProcess, finetunejobs: Watch, make_namespace: Callable[[str], str]
) -> Iterator[dict[str, Edited]]:
    """A suspended job for each field, all edited at once: an edit costs no pod."""
    namespace, before, after = make_namespace("edited"), [], []
    for path, (value, needed) in EDITS.items():
        manifest = small_job(kube, namespace, name_of(path), runPolicy={"suspend": True}).manifest
        for needed_path, needed_value in needed.items():
            manifest = manifest | {"spec": changed(manifest["spec"], needed_path, needed_value)}
        before.append(manifest)
        after.append(manifest | {"spec": changed(manifest["spec"], path, value)})
    kube.kubectl("create", "-n", namespace, "-f", "-", input="\n---\n".join(map(json.dumps, before)))
    jobs_before, children_before = wait_for_generation(kube, namespace, 1)
    kube.kubectl("replace", "-n", namespace, "-f", "-", input="\n---\n".join(map(json.dumps, after)))
    jobs_after, children_after = wait_for_generation(kube, namespace, 2)
    yield {
        path: Edited(jobs_before[name]["status"], jobs_after[name]["status"], children_before[name], children_after[name])
        for path in EDITS
        if (name := name_of(path))
    }
    kube.kubectl("delete", "ftj", "-n", namespace, "--all", "--wait=false")


def test_every_field_that_is_served_has_an_edit() -> None:
    assert {path_of_class(path) for path in EDITS} == set(CLASSES) - UNSERVED
    assert {field_class for _, field_class in CLASSES.values()} == set(FieldClass)


def test_the_edits_of_the_table_are_valid() -> None:
    """A spec that the operator refuses would tell nothing about classes."""
    for path, (value, needed) in EDITS.items():
        spec = minimal_spec() | SMALL
        for item in [*needed.items(), (path, value)]:
            spec = changed(spec, *item)
        assert [str(problem) for problem in spec_problems(spec, local=False)] == [], path


@pytest.mark.parametrize("path", EDITS)
def test_an_edit_does_what_the_class_of_its_field_says(edited: dict[str, Edited], path: str) -> None:
    _, field_class = CLASSES[path_of_class(path)]
    found = edited[path]
    is_same_job = found.job_before["metadata"]["uid"] == found.job_after["metadata"]["uid"]
    assert (found.changes("trainDigest"), found.changes("runDigest"), is_same_job) == {
        FieldClass.TRAIN: (True, True, False),
        FieldClass.RUN: (False, True, False),
        FieldClass.LIVE: (False, False, True),
    }[field_class]


@pytest.mark.parametrize(
    ("path", "field"), [("runPolicy.backoffLimit", "backoffLimit"), ("runPolicy.activeDeadlineSeconds", "activeDeadlineSeconds")]
)
def test_a_live_edit_is_patched_onto_the_job(edited: dict[str, Edited], path: str, field: str) -> None:
    assert edited[path].job_before["spec"].get(field) != EDITS[path][0]
    assert edited[path].job_after["spec"][field] == EDITS[path][0]


def test_no_other_live_field_is_patched_and_a_ttl_not_before_the_end(edited: dict[str, Edited]) -> None:
    assert edited["runPolicy.suspend"].job_after["spec"]["suspend"] is False
    assert "ttlSecondsAfterFinished" not in edited["runPolicy.ttlSecondsAfterFinished"].job_after["spec"]


def test_an_edit_of_the_run_stops_the_old_pod_before_the_new_one_starts(make: Make) -> None:
    made = make("wait-run")
    pod, (job,), before = made.running_pod(), made.owned("jobs"), made.status()
    made.edit(resources={"memory": "96Mi"})

    def another() -> Json | None:
        pods = [item for item in made.owned("pods") if item["status"].get("phase") == "Running"]
        assert len(pods) <= 1
        return next((item for item in pods if item["metadata"]["uid"] != pod["metadata"]["uid"]), None)

    assert made.kube.wait("another pod", another)["spec"]["containers"][0]["resources"]["limits"]["memory"] == "96Mi"
    after = made.wait_for_phase("Running", 30)
    assert after["run"]["trainDigest"] == before["run"]["trainDigest"]
    assert after["run"]["runDigest"] != before["run"]["runDigest"]
    assert job["metadata"]["uid"] not in made.job_uids()


def test_an_edit_to_and_fro_ends_in_one_job_of_the_first_spec(make: Make) -> None:
    made = make("wait-to-and-fro")
    made.running_pod()
    before = made.status()["run"]
    made.edit(lora={"rank": 8})
    made.edit(lora={"rank": 32})
    made.kube.wait("the third generation", lambda: made.status().get("observedGeneration") == 3 and made.status()["phase"] == "Running")
    assert made.status()["run"]["trainDigest"] == before["trainDigest"]
    made.running_pod()
    assert len(made.job_uids()) == 1


def test_an_end_is_kept_when_the_spec_goes_on_as_it_was(make: Make) -> None:
    made = make("exit-0-kept", runPolicy={"rerun": "first"})
    before = made.wait_for_phase("Succeeded", 60)
    made.apply()
    made.edit(runPolicy={"backoffLimit": 5})
    made.kube.wait("the second generation", lambda: made.status().get("observedGeneration") == 2)
    assert {name: value for name, value in made.status().items() if name not in ("observedGeneration", "conditions")} == {
        name: value for name, value in before.items() if name not in ("observedGeneration", "conditions")
    }
    (job,) = made.job_uids()
    made.edit(runPolicy={"rerun": "second"})
    made.kube.wait("another run", lambda: made.status().get("observedGeneration") == 3 and made.status()["phase"] == "Succeeded")
    assert job not in made.job_uids()


def test_resuming_starts_the_deadline_anew(make: Make) -> None:
    made = make("wait-anew", runPolicy={"activeDeadlineSeconds": 600})
    made.running_pod()
    started = made.owned("jobs")[0]["status"]["startTime"]
    made.edit(runPolicy={"suspend": True})
    made.wait_for_phase("Suspended", 60)
    made.edit(runPolicy={"suspend": False})
    made.running_pod()
    assert made.owned("jobs")[0]["status"]["startTime"] > started


def test_a_deadline_that_is_lowered_ends_the_run(make: Make) -> None:
    made = make("wait-lowered", runPolicy={"activeDeadlineSeconds": 600})
    made.running_pod()
    (job,) = made.job_uids()
    made.edit(runPolicy={"activeDeadlineSeconds": 1})
    status = made.wait_for_phase("Failed", 60)
    assert "its deadline of 1 s" in status["message"]
    assert made.job_uids() == [job]


# The moment at which the FineTuneJob is deleted: the job's name, its changes, and what is waited for first.
MOMENTS: dict[str, tuple[str, Json, Callable[[JobInCluster], Any]]] = {
    "before anything is made": ("wait-at-once", {}, lambda _: None),
    "pending": ("wait-pending", {"scheduling": {"nodeSelector": {"zone": "nowhere"}}}, lambda made: made.wait_for_reason("Unschedulable")),
    "running": ("wait-running", {}, JobInCluster.running_pod),
    "suspended": ("wait-suspended", {"runPolicy": {"suspend": True}}, lambda made: made.wait_for_phase("Suspended", 60)),
    "finished": ("exit-0-finished", {}, lambda made: made.wait_for_phase("Succeeded", 60)),
    "failed": ("exit-11-failed", {}, lambda made: made.wait_for_phase("Failed", 60)),
}


@pytest.mark.parametrize("is_up", [True, False], ids=["with the operator", "while it is down"])
def test_a_deletion_takes_everything_along_at_any_moment(
    make: Make, operator: OperatorProcess, kube: Cluster, namespace: str, is_up: bool
) -> None:
    made = [make(name, **changes) for name, changes, _ in MOMENTS.values()]
    for job, (_, _, reached) in zip(made, MOMENTS.values(), strict=True):
        reached(job)
    if not is_up:
        operator.kill()
    kube.kubectl("delete", "ftj", "-n", namespace, *(job.name for job in made), "--timeout=20s")
    kube.wait("no Job and no pod", lambda: not kube.get("jobs,pods", "-n", namespace).get("items"))
    if not is_up:
        operator.start()
        make("exit-0-next").wait_for_phase("Succeeded", 60)
        assert len(kube.get("jobs", "-n", namespace)["items"]) == 1


def test_an_operator_that_was_down_past_the_ttl_trains_nothing_again(
    make: Make, operator: OperatorProcess, kube: Cluster, namespace: str
) -> None:
    made = {
        phase: make(name, runPolicy={"ttlSecondsAfterFinished": 2})
        for phase, name in (("Succeeded", "exit-0-ttl"), ("Failed", "exit-11-ttl"))
    }
    before = {phase: job.wait_for_phase(phase, 60) for phase, job in made.items()}
    kube.wait(
        "the TTL on both",
        lambda: all(not job.owned("jobs") or "ttlSecondsAfterFinished" in job.owned("jobs")[0]["spec"] for job in made.values()),
    )
    operator.kill()
    kube.wait("the end of both Jobs", lambda: not kube.get("jobs", "-n", namespace).get("items"))
    operator.start()
    make("exit-0-after-ttl").wait_for_phase("Succeeded", 60)
    assert {phase: job.status() for phase, job in made.items()} == before
    assert len(kube.get("jobs", "-n", namespace)["items"]) == 1

"""Objects that are not as they should be, on a real API server: each is told what is wrong, none harms its pod, and none delays another job."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import yaml
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.operator_process import CRD, OperatorProcess, small_job
from support.watching import Seen, StatusRules, Watch

pytestmark = pytest.mark.cluster

ANNOTATION_BYTES = 256 * 1024  # of all names and values: what the API server takes, whatever larger figure an etcd could hold
Make = Callable[..., JobInCluster]
Json = dict[str, Any]


@pytest.fixture
def loose_schema(kube: Cluster, operator: OperatorProcess) -> Iterator[Callable[[], None]]:
    """A CRD that takes anything, as one of another version might; returns what puts the real one back."""
    crd = yaml.safe_load(CRD.read_text())
    loose = deepcopy(crd)
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    loose["spec"]["versions"][0]["schema"]["openAPIV3Schema"] = anything

    def put(definition: Json) -> None:
        kube.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=json.dumps(definition))

    put(loose)
    probe = json.dumps(small_job(kube, "default", "probe", runPolicy={"nonsense": 1}).manifest)
    dry_run = ("create", "-n", "default", "--dry-run=server", "-f", "-")
    kube.wait("the loose schema", lambda: not kube.kubectl(*dry_run, input=probe, check=False).returncode)

    def restore() -> None:
        put(crd)
        kube.wait("the real schema", lambda: kube.kubectl(*dry_run, input=probe, check=False).returncode)

    yield restore
    put(crd)


@pytest.fixture(scope="module")
def running(
    kube: Cluster, operator: OperatorProcess, finetunejobs: Watch, make_namespace: Callable[[str], str]
) -> Iterator[dict[str, JobInCluster]]:
    """A job at work for each test that spoils one; they stay as they are spoiled until the last test."""
    namespace = make_namespace("odd")
    jobs = {what: small_job(kube, namespace, f"wait-{what}") for what in ("nonsense", "unreadable", "flipped", "unlabelled", "disowned")}
    kube.kubectl("create", "-n", namespace, "-f", "-", input="\n---\n".join(json.dumps(job.manifest) for job in jobs.values()))
    yield jobs
    kube.kubectl("delete", "namespace", namespace, "--wait=false")


def succeeded_meanwhile(make: Make, name: str, seconds: float = 30) -> None:
    """Another job of the same namespace goes through."""
    make(name).wait_for_phase("Succeeded", seconds)


def test_specs_of_another_schema_are_told_so_and_start_nothing(
    loose_schema: Callable[[], None], kube: Cluster, namespace: str, make: Make, operator: OperatorProcess
) -> None:
    """One that is a list where an object belongs gets no status: under the real schema the API server refuses each write, and an event says so."""
    odd: dict[str, Json] = {
        "exit-0-word": {"training": {"epochs": "three"}},
        "exit-0-huge": {"lora": {"rank": 100000}},
        "exit-0-list": {"model": []},
    }
    word, huge, listed = (small_job(kube, namespace, name, **changes) for name, changes in odd.items())
    manifests = [job.manifest for job in (word, huge, listed)]
    operator.freeze()  # until the real schema is back
    kube.kubectl("create", "-n", namespace, "-f", "-", input="\n---\n".join(map(json.dumps, manifests)))
    loose_schema()
    os.kill(operator.pid, signal.SIGCONT)
    succeeded_meanwhile(make, "exit-0-beside-odd-specs")
    assert "training.epochs" in word.wait_for_reason("InvalidSpec")["message"]
    assert "lora.rank" in huge.wait_for_reason("InvalidSpec")["message"]
    kube.wait("a word on spec.model", lambda: "spec.model" in events_of(listed, "InvalidSpec"), 60)
    assert listed.status() == {}
    assert {item["metadata"]["labels"]["finetune.dev/job"] for item in kube.get("jobs", "-n", namespace)["items"]} == {
        "exit-0-beside-odd-specs"
    }
    for job in (word, listed):
        job.edit(training={"epochs": 3}, model={"source": "hf://acme/tiny"})
        job.wait_for_phase("Succeeded", 60)


def events_of(made: JobInCluster, reason: str) -> str:
    """What the events of this reason say of a job."""
    selector = f"involvedObject.name={made.name},reason={reason}"
    return "\n".join(
        item["message"] for item in made.kube.get("events", "-n", made.namespace, "--field-selector", selector).get("items", ())
    )


NONSENSE = {
    "phase": "Succeeded",
    "observedGeneration": 99,
    "message": "x" * 1024,
    "gpuSeconds": 1,
    "conditions": [{"type": "Ready", "status": "True", "reason": "Because", "message": "", "lastTransitionTime": "1999-01-01T00:00:00Z"}],
    "attempts": [{"podUID": "none", "start": "1999-01-01T00:00:00Z"}],
    "run": {"runDigest": "of nothing", "jobName": "no-such-job"},
}
UNREADABLE = {"phase": 7, "conditions": "none", "attempts": {"a": 1}, "run": [], "progress": "half", "observedGeneration": "one"}


def test_a_status_edited_by_hand_is_written_anew_and_the_pod_goes_on(running: dict[str, JobInCluster], status_rules: StatusRules) -> None:
    made = running["nonsense"]
    status_rules.exempt.add(made.name)
    pod = made.running_pod()
    nonsense = json.dumps({"status": NONSENSE})
    made.kube.kubectl("patch", "ftj", made.name, "-n", made.namespace, "--subresource=status", "--type=merge", "-p", nonsense)
    status = made.kube.wait("the true status", lambda: (status := made.status())["phase"] == "Running" and status)
    assert status_rules.broken([Seen(0, "MODIFIED", made.read() | {"metadata": made.read()["metadata"] | {"name": "judged"}})]) == []
    assert [attempt["podUID"] for attempt in status["attempts"]] == [pod["metadata"]["uid"]]
    assert made.running_pod()["metadata"]["uid"] == pod["metadata"]["uid"]


def test_a_status_of_another_schema_is_written_anew(
    loose_schema: Callable[[], None], running: dict[str, JobInCluster], status_rules: StatusRules
) -> None:
    made = running["unreadable"]
    status_rules.exempt.add(made.name)
    pod = made.running_pod()
    unreadable = json.dumps({"status": UNREADABLE})
    made.kube.kubectl("patch", "ftj", made.name, "-n", made.namespace, "--subresource=status", "--type=merge", "-p", unreadable)
    loose_schema()
    made.wait_for_phase("Running", 60)
    assert made.running_pod()["metadata"]["uid"] == pod["metadata"]["uid"]


def patch_job(made: JobInCluster, patch: Json) -> Json:
    """Edits the run's Job as a person would; returns it as it was."""
    name = made.status()["run"]["jobName"]
    before = made.kube.get("job", name, "-n", made.namespace)
    made.kube.kubectl("patch", "job", name, "-n", made.namespace, "--type=merge", "-p", json.dumps(patch))
    return before


def test_a_job_that_was_suspended_by_hand_goes_on(running: dict[str, JobInCluster]) -> None:
    made = running["flipped"]
    made.running_pod()
    before = patch_job(made, {"spec": {"suspend": True}})
    made.kube.wait("the spec's own word", lambda: made.owned("jobs")[0]["spec"]["suspend"] is False)
    made.running_pod()
    assert made.job_uids() == [before["metadata"]["uid"]]


def test_a_job_without_its_label_is_still_ours(running: dict[str, JobInCluster]) -> None:
    made = running["unlabelled"]
    pod = made.running_pod()
    before = patch_job(made, {"metadata": {"labels": {"finetune.dev/job": None}}})
    made.edit(runPolicy={"backoffLimit": 7})
    name = before["metadata"]["name"]
    after = made.kube.wait(
        "a live edit", lambda: (job := made.kube.get("job", name, "-n", made.namespace))["spec"]["backoffLimit"] == 7 and job
    )
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert made.running_pod()["metadata"]["uid"] == pod["metadata"]["uid"]
    made.wait_until("the truth", lambda status: status["observedGeneration"] == 2 and status["phase"] == "Running", 30)


def test_a_job_without_its_owner_is_a_strangers(running: dict[str, JobInCluster]) -> None:
    made = running["disowned"]
    pod = made.running_pod()
    patch_job(made, {"metadata": {"ownerReferences": None}})
    made.wait_for_reason("NameTaken")
    assert made.running_pod()["metadata"]["uid"] == pod["metadata"]["uid"]


def test_as_many_annotations_as_the_api_server_takes_delay_nobody(make: Make, kube: Cluster, namespace: str) -> None:
    made = small_job(kube, namespace, "exit-0-annotated")
    names = [f"example.com/{index}" for index in range(4)]
    room = ANNOTATION_BYTES - sum(map(len, names))
    made.manifest["metadata"]["annotations"] = dict.fromkeys(names, "x" * (room // len(names)))
    made.manifest["metadata"]["annotations"][names[0]] += "x" * (room % len(names))
    one_more = deepcopy(made.manifest)
    one_more["metadata"]["annotations"][names[0]] += "x"
    refused = kube.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(one_more), check=False)
    assert "may not be more than 262144 bytes" in refused.stderr
    kube.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(made.manifest))
    made.wait_for_phase("Succeeded", 60)


def test_long_names_work(make: Make, finetunejobs: Watch) -> None:
    names = [("exit-0-" + "a" * 50 + "." + "b." * 100)[: length - 1] + "z" for length in (63, 64, 253)]
    made = [make(name) for name in names]
    assert [len(job.name) for job in made] == [63, 64, 253]
    for job in made:
        assert len(job.wait_for_phase("Succeeded", 60)["run"]["jobName"]) <= 63
    assert set(names) <= {item.name for item in finetunejobs.seen}


def test_a_job_beside_all_of_them_is_not_delayed(make: Make, running: dict[str, JobInCluster]) -> None:
    assert all(job.read() for job in running.values())
    succeeded_meanwhile(make, "exit-0-beside-all")

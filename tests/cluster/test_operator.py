"""The operator on a real API server and kubelet: what the status says of each end of a pod, and what no event, edit or restart may do.

The operator runs from this checkout, outside the cluster; the pods are a stand-in for the trainer (k8s/actor) that ends as the job's name says.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.finetunejobs import JobInCluster
from support.finetunejobs import merged as with_changes
from support.kubernetes import Cluster
from support.operator_process import SMALL, OperatorProcess, get_ready
from support.specs import job, minimal_spec

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def operator(kube: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """The CRD and a running operator."""
    folder = tmp_path_factory.mktemp("operator")
    get_ready(kube, folder)
    process = OperatorProcess(kube, folder / "log")
    process.start()
    yield process
    process.kill()
    process.require_no_traceback()


Make = Callable[..., JobInCluster]


@pytest.fixture
def make(kube: Cluster, namespace: str, operator: OperatorProcess) -> Make:
    """Applies a job of this name, with changes to its spec."""

    def apply(name: str, **changes: Any) -> JobInCluster:
        spec = with_changes(minimal_spec() | SMALL, changes)
        made = JobInCluster(kube, namespace, job(spec, name))
        made.apply()
        return made

    return apply


def edit(made: JobInCluster, **changes: Any) -> None:
    made.manifest = with_changes(made.manifest, {"spec": changes})
    made.apply()


def condition(status: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((item for item in status.get("conditions", []) if item["type"] == kind), {})


def running_pod(made: JobInCluster) -> dict[str, Any]:
    return made.kube.wait("a running pod", lambda: [pod for pod in made.owned("pods") if pod["status"].get("phase") == "Running"])[0]


def test_a_run_that_succeeds(make: Make) -> None:
    made = make("exit-0", runPolicy={"ttlSecondsAfterFinished": 3600})
    status = made.wait_for_phase("Succeeded", 60)
    assert condition(status, "Ready")["status"] == "True"
    assert [artifact["uri"] for artifact in status["artifacts"]] == ["s3://models/tiny/lora_model"]
    assert [attempt["exitCode"] for attempt in status["attempts"]] == [0]
    (child,) = made.owned("jobs")
    shown = made.kube.kubectl("get", "ftj", made.name, "-n", made.namespace).stdout.splitlines()
    assert shown[0].split() == ["NAME", "PHASE", "STAGE", "PROGRESS", "LOSS", "AGE"]
    assert shown[1].split()[:3] == ["exit-0", "Succeeded", "Publishing"]
    made.kube.wait("the TTL", lambda: made.owned("jobs")[0]["spec"].get("ttlSecondsAfterFinished") == 3600)
    assert child["metadata"]["ownerReferences"][0]["kind"] == "FineTuneJob"


def events_of(made: JobInCluster) -> set[str]:
    return {item["reason"] for item in made.events()}


def test_events_tell_the_story_of_a_run(make: Make) -> None:
    good, bad = make("exit-0-told"), make("exit-11-told")
    good.wait_for_phase("Succeeded", 60)
    bad.wait_for_phase("Failed", 60)
    good.kube.wait("its events", lambda: events_of(good) == {"Created", "Started", "Succeeded", "Published"})
    bad.kube.wait("its events", lambda: events_of(bad) == {"Created", "Started", "Failed"})
    described = good.kube.kubectl("describe", "ftj", good.name, "-n", good.namespace).stdout
    assert "adapter at s3://models/tiny/lora_model" in described


def test_bad_data_fails_at_once_with_the_trainers_sentence(make: Make) -> None:
    status = make("exit-11").wait_for_phase("Failed", 60)
    assert condition(status, "Stalled")["reason"] == "InvalidData"
    assert "asked to end with 11" in status["message"]
    assert len(status["attempts"]) == 1


def test_trouble_of_the_infrastructure_is_tried_again(make: Make) -> None:
    status = make("exit-16", runPolicy={"backoffLimit": 1}).wait_for_phase("Failed", 90)
    assert [attempt["exitCode"] for attempt in status["attempts"]] == [16, 16]
    assert "asked to end with 16" in status["message"]


def test_a_pod_without_enough_memory_is_told_what_to_raise(make: Make) -> None:
    status = make("oom", runPolicy={"backoffLimit": 2}).wait_for_phase("Failed", 90)
    assert condition(status, "Stalled")["reason"] == "OOMKilled"
    assert "64Mi" in status["message"]
    assert "resources.memory" in status["message"]
    assert len(status["attempts"]) == 1


def test_a_suspended_job_stops_its_pod_and_goes_on_when_resumed(make: Make) -> None:
    made = make("wait-suspend")
    running_pod(made)
    edit(made, runPolicy={"suspend": True})
    status = made.wait_for_phase("Suspended", 60)
    assert condition(status, "Ready")["status"] == "False"
    assert not condition(status, "Stalled")
    assert not condition(status, "Reconciling")
    made.kube.wait("no pod runs", lambda: not [pod for pod in made.owned("pods") if pod["status"].get("phase") == "Running"])
    edit(made, runPolicy={"suspend": False})
    made.wait_for_phase("Running", 60)
    assert len(made.owned("jobs")) == 1


def test_an_edit_that_changes_the_weights_replaces_the_job(make: Make) -> None:
    made = make("wait-edit")
    running_pod(made)
    (before,) = made.owned("jobs")
    edit(made, lora={"rank": 8})

    def replaced() -> bool:
        jobs = made.owned("jobs")
        assert len([item for item in jobs if not item["metadata"].get("deletionTimestamp")]) <= 1
        return [item["metadata"]["uid"] for item in jobs] not in ([], [before["metadata"]["uid"]]) and len(jobs) == 1

    made.kube.wait("another Job", replaced)
    made.wait_for_phase("Running", 60)
    assert made.status()["observedGeneration"] == 2


def test_a_live_edit_restarts_nothing(make: Make) -> None:
    made = make("wait-live")
    pod = running_pod(made)
    edit(made, runPolicy={"backoffLimit": 7})
    made.kube.wait("the new limit", lambda: made.owned("jobs")[0]["spec"]["backoffLimit"] == 7)
    assert [item["metadata"]["uid"] for item in made.owned("pods")] == [pod["metadata"]["uid"]]


def test_a_failed_run_is_tried_again_when_rerun_asks_for_it(make: Make) -> None:
    made = make("exit-11-rerun")
    made.wait_for_phase("Failed", 60)
    edit(made, runPolicy={"rerun": "again"})
    made.kube.wait("another run's failure", lambda: made.status().get("observedGeneration") == 2 and made.status()["phase"] == "Failed")
    assert len({item["metadata"]["uid"] for item in made.owned("jobs")}) == 1


Samples = Counter[tuple[str, frozenset[tuple[str, str]]]]


def sample(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    """Names one sample of the operator's own."""
    return f"finetune_operator_{name}", frozenset(labels.items())


def samples_of(operator: OperatorProcess) -> Samples:
    """What a scrape finds."""
    status, text = operator.ask("/metrics")
    assert status == 200, text
    found = [item for family in text_string_to_metric_families(text) for item in family.samples]
    return Counter({(item.name, frozenset(item.labels.items())): item.value for item in found})


def phases_in(samples: Samples) -> Counter[str]:
    """How many FineTuneJobs there are of each phase."""
    name, _ = sample("finetunejobs")
    return Counter({dict(labels)["phase"]: value for (found, labels), value in samples.items() if found == name})


def test_metrics_tell_what_was_done_and_how_the_jobs_stand(make: Make, operator: OperatorProcess, kube: Cluster) -> None:
    kube.wait("readiness", lambda: operator.ask("/readyz") == (200, "ok\n"))
    before = samples_of(operator)
    make("exit-0-counted").wait_for_phase("Succeeded", 60)
    make("exit-11-counted").wait_for_phase("Failed", 60)

    def at_rest() -> Samples | None:
        listed = Counter(item.get("status", {}).get("phase", "none") for item in kube.get("ftj", "-A")["items"])
        samples = samples_of(operator)
        waiting = [samples[sample("queue_depth", state=state)] for state in ("due", "delayed")]
        return samples if phases_in(samples) == listed and waiting == [0, 0] else None

    after = kube.wait("an empty queue, and the phases that kubectl sees", at_rest)
    assert {"Succeeded", "Failed"} <= {phase for phase, jobs in phases_in(after).items() if jobs}
    assert after[sample("queue_oldest_seconds")] == 0
    grown = Counter({name: value - before[name] for name, value in after.items()})
    assert grown[sample("api_requests_total", verb="POST", code="201")] >= 2
    assert grown[sample("api_requests_total", verb="PATCH", code="200")] >= 2
    assert grown[sample("api_requests_total", verb="GET", code="200")] >= 1
    assert grown[sample("reconcile_seconds_count")] >= 2
    assert grown[sample("reconcile_errors_total", kind="defect")] == 0


def test_a_completion_is_not_lost_on_an_operator_that_is_down(make: Make, operator: OperatorProcess) -> None:
    made = make("exit-0-late", runPolicy={"ttlSecondsAfterFinished": 1}, scheduling={"nodeSelector": {"finetune.dev/later": "yes"}})
    made.kube.wait("a pod", lambda: made.owned("pods"))
    operator.kill()
    made.kube.kubectl("label", "node", "node1", "finetune.dev/later=yes", "--overwrite")
    made.kube.wait("the pod's end", lambda: made.owned("jobs")[0]["status"].get("succeeded"))
    operator.start()
    made.wait_for_phase("Succeeded", 60)
    made.kube.wait("the TTL's end", lambda: not made.owned("jobs"))
    edit(made, runPolicy={"suspend": False})
    assert made.status()["phase"] == "Succeeded"
    assert not made.owned("jobs")


def test_a_job_that_nothing_can_hold_says_why_it_waits(make: Make) -> None:
    made = make("wait-nowhere", scheduling={"nodeSelector": {"zone": "nowhere"}})
    status = made.wait_until("the scheduler's reason", lambda status: status if "node" in status.get("message", "") else None, 60)
    assert status["phase"] == "Pending"
    assert "affinity/selector" in status["message"]


def test_a_quota_that_is_used_up_is_named(make: Make, kube: Cluster, namespace: str) -> None:
    kube.kubectl("create", "quota", "none", "--hard=pods=0", "-n", namespace)
    made = make("wait-quota")
    made.wait_until("the quota", lambda status: "quota" in status.get("message", ""), 60)


def test_a_job_that_the_api_server_refuses_says_why_and_is_made_when_it_may_be(make: Make, kube: Cluster, namespace: str) -> None:
    kube.kubectl("create", "quota", "none", "--hard=count/jobs.batch=0", "-n", namespace)
    made = make("exit-0-refused")
    made.wait_until("the quota", lambda status: "exceeded quota" in status.get("message", ""), 60)
    assert condition(made.status(), "Reconciling")["reason"] == "JobRefused"
    kube.kubectl("delete", "quota", "none", "-n", namespace)
    made.wait_for_phase("Succeeded", 90)


def test_an_image_that_nobody_allowed_starts_nothing(make: Make) -> None:
    made = make("wait-image", pod={"image": "evil.example/x"})
    status = made.wait_until("the refusal", lambda status: condition(status, "Stalled"), 60)
    assert status["reason"] == "NotAllowed"
    assert "evil.example/x" in made.status()["message"]
    assert not made.owned("jobs")


def test_names_longer_than_a_label_work(make: Make) -> None:
    name = "exit-0-" + "long." * 12 + "name"
    made = make(name)
    made.wait_for_phase("Succeeded", 60)


def test_a_deleted_finetunejob_takes_everything_along_while_the_operator_is_down(make: Make, operator: OperatorProcess) -> None:
    made = make("wait-delete")
    running_pod(made)
    operator.kill()
    made.kube.kubectl("delete", "ftj", made.name, "-n", made.namespace, "--timeout=20s")
    made.kube.wait("no Job and no pod", lambda: not made.owned("jobs") and not made.owned("pods"))
    operator.start()


def test_sigterm_ends_the_operator_well(make: Make, operator: OperatorProcess) -> None:
    make("exit-0-last").wait_for_phase("Succeeded", 60)
    assert operator.stop() == 0
    operator.start()

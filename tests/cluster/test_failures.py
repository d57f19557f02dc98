"""Why a job failed, on a real kubelet and Job controller: one sentence that says what to do, and stays when Job and pods are gone."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cluster.image import write_image
from finetune_api.exits import PERMANENT, REASONS, ExitCode
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.operator_process import OperatorProcess, small_job
from support.watching import Watch

pytestmark = pytest.mark.cluster

OPERATOR_SETTINGS = {"ALLOWED_IMAGES": '["localhost/*", "localhost:1/*"]'}
Jobs = dict[str, JobInCluster]

BROKEN = "localhost/broken:1"  # an image whose program is not there
NO_RETRIES: dict[str, Any] = {"runPolicy": {"backoffLimit": 0}}
RETRIES: dict[str, Any] = {"runPolicy": {"backoffLimit": 3}}  # which a failure that can't pass does not use
DEADLINE: dict[str, Any] = {"runPolicy": {"backoffLimit": 0, "activeDeadlineSeconds": 5}}
LATE: dict[str, Any] = {"runPolicy": {"backoffLimit": 0, "activeDeadlineSeconds": 12}}  # after a busy kubelet's first pull, too
CODES = [code for code in ExitCode if code not in (ExitCode.SUCCEEDED, ExitCode.CHECKPOINTED)]
# Name of the job, changes to its spec, the reason it fails for, and what its message holds.
CASES: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    *(
        (f"exit-{int(code)}", RETRIES if code in PERMANENT else NO_RETRIES, REASONS[code], (f"asked to end with {int(code)}",))
        for code in CODES
    ),
    ("oom", RETRIES, "OOMKilled", ("in stage Training", "64Mi", "resources.memory", "training.maxLength")),
    ("crash", NO_RETRIES, "Error", ("exit code 3", "its last words: loading the model fatal: the tokenizer has no end token")),
    ("wait-deadline", DEADLINE, "DeadlineExceeded", ("its deadline of 5 s", "runPolicy.activeDeadlineSeconds", "runPolicy.rerun")),
    (
        "wait-unpulled",
        LATE | {"pod": {"image": "localhost:1/absent:1"}},
        "DeadlineExceeded",
        ("its deadline of 12 s", "localhost:1/absent:1"),
    ),
    ("wait-unstarted", NO_RETRIES | {"pod": {"image": BROKEN}}, "Error", ("/no-such-program", "no such file")),
]


@pytest.fixture(scope="module")
def failing(
    kube: Cluster,
    operator: OperatorProcess,
    finetunejobs: Watch,
    make_namespace: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Jobs]:
    """All of them at once."""
    archive = tmp_path_factory.mktemp("broken") / "broken.tar"
    write_image(BROKEN, archive, ["/no-such-program"], {})
    kube.import_archive(archive)
    namespace = make_namespace("failing")
    made = {name: small_job(kube, namespace, name, **changes) for name, changes, _, _ in CASES}
    kube.kubectl("apply", "-n", namespace, "-f", "-", input="\n---\n".join(json.dumps(job.manifest) for job in made.values()))
    yield made
    kube.kubectl("delete", "namespace", namespace, "--wait=false")


@pytest.mark.parametrize(
    ("name", "reason", "words"), [(name, reason, words) for name, _, reason, words in CASES], ids=lambda value: str(value)
)
def test_a_failure_is_one_sentence_that_outlives_the_pod(failing: Jobs, name: str, reason: str, words: tuple[str, ...]) -> None:
    job = failing[name]
    status = job.wait_for_phase("Failed", 90)
    assert len(status.get("attempts", ())) <= 1
    assert job.condition("Stalled")["reason"] == reason, status["message"]
    assert not [word for word in words if word not in status["message"]], status["message"]
    assert {item["message"] for item in status["conditions"] if item["type"] in ("Ready", "Stalled")} == {status["message"]}
    job.kube.kubectl("delete", "jobs,pods", "-n", job.namespace, "-l", f"finetune.dev/job={name}", "--wait=false")
    job.kube.wait("no Job and no pod", lambda: not job.owned("jobs") and not job.owned("pods"))
    assert job.status()["message"] == status["message"]
    described = job.kube.kubectl("describe", "ftj", name, "-n", job.namespace).stdout
    assert " ".join(status["message"].split()) in " ".join(described.split())


def test_a_pod_that_was_deleted_and_then_killed_did_not_run_out_of_memory(make: Callable[..., JobInCluster]) -> None:
    made = make("deaf-by-hand")
    pod = made.running_pod()["metadata"]
    made.kube.kubectl("delete", "pod", pod["name"], "-n", made.namespace, "--grace-period=3")
    status = made.wait_for_phase("Failed", 60)
    assert made.condition("Stalled")["reason"] == "PodDeleted", made.story()
    assert "memory" not in status["message"]
    assert "deleted" in status["message"]

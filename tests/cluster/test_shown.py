"""What a person sees with kubectl alone: a list that fits 100 columns, a description that explains any job, a wait that ends."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from support.finetunejobs import JobInCluster
from support.kubernetes import Cluster
from support.watching import Watch

pytestmark = pytest.mark.cluster

COLUMNS = 100
Make = Callable[..., JobInCluster]

NOWHERE = {"scheduling": {"nodeSelector": {"zone": "nowhere"}}}
# Name of the job, changes to its spec, the reason that its conditions end with, and what a description must hold besides.
SHOWN: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("exit-0", {}, "Succeeded", ("s3://models/tiny/lora_model", "Exit Code:  0")),
    ("exit-11", {}, "InvalidData", ("asked to end with 11", "Exit Code:  11")),
    ("wait-nowhere", NOWHERE, "Unschedulable", ("affinity/selector", "correct spec.scheduling")),
    ("wait-running", {}, "Running", ("The trainer is at work",)),
    ("wait-suspended", {"runPolicy": {"suspend": True}}, "Suspended", ("set runPolicy.suspend to false",)),
    ("wait-refused", {"pod": {"image": "evil.example/x"}}, "NotAllowed", ("evil.example/x", "allowedImages")),
]


@pytest.mark.parametrize(("name", "changes", "reason", "words"), SHOWN, ids=[name for name, *_ in SHOWN])
def test_a_description_alone_explains_a_job(make: Make, name: str, changes: dict[str, Any], reason: str, words: tuple[str, ...]) -> None:
    made = make(name, **changes)
    status = made.wait_for_reason(reason)
    described = made.kube.kubectl("describe", "ftj", name, "-n", made.namespace).stdout
    text = " ".join(described.split())
    shown = (status["message"], f"Phase: {status['phase']}", f"Reason: {reason}", *words)
    assert [word for word in shown if " ".join(word.split()) not in text] == []


def test_a_list_fits_100_columns(make: Make, kube: Cluster, namespace: str) -> None:
    made = make("wait-" + "n" * 25, runPolicy={"suspend": True})
    assert len(made.name) == 30
    made.wait_for_phase("Suspended", 60)
    # The longest words that a run has: what an operator keeps of a run that is suspended.
    progress = {"summary": "123456/200000", "step": 123456, "totalSteps": 200000, "loss": "0.0001234"}
    longest = json.dumps({"status": {"stage": "Converting", "progress": progress}})
    kube.kubectl("patch", "ftj", made.name, "-n", namespace, "--subresource=status", "--type=merge", "-p", longest)
    lines = kube.kubectl("get", "ftj", "-n", namespace).stdout.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[:5] == [made.name, "Suspended", "Converting", "123456/200000", "0.0001234"]
    assert max(map(len, lines)) <= COLUMNS - len("364d"), lines


def test_kubectl_wait_ends_when_the_model_is_published(make: Make) -> None:
    made = make("exit-0-awaited")
    made.kube.kubectl("wait", "ftj", made.name, "-n", made.namespace, "--for=condition=Ready", "--timeout=60s")
    assert made.status()["phase"] == "Succeeded"


def test_kubectl_wait_for_stalled_ends_when_a_person_must_act(make: Make) -> None:
    made = make("exit-12-awaited")
    made.kube.kubectl("wait", "ftj", made.name, "-n", made.namespace, "--for=condition=Stalled", "--timeout=60s")
    assert made.status()["phase"] == "Failed"


def test_kubectl_get_watch_shows_each_phase(make: Make, finetunejobs: Watch) -> None:
    made = make("exit-0-watched")
    made.wait_for_phase("Succeeded", 60)
    own = [item.object.get("status", {}).get("phase") for item in finetunejobs.seen if item.name == made.name]
    assert list(dict.fromkeys(phase for phase in own if phase)) in (["Pending", "Succeeded"], ["Pending", "Running", "Succeeded"])

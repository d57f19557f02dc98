"""The rules of kstatus and of the API conventions, on conditions.py alone and on every status that a decision writes."""

import json
from datetime import timedelta
from typing import Any

import pytest
from finetune_api.exits import ExitCode
from finetune_api.status import Condition, ConditionType, FineTuneJobStatus, Phase, Stage
from finetune_operator.conditions import ConditionValue, Standing, Verdict, build_conditions
from finetune_operator.decide import decide
from finetune_operator.desired import build_job
from finetune_operator.plan import WriteStatus
from finetune_operator.subject import Json, Subject, World, read_subject
from hypothesis import given, settings
from hypothesis import strategies as st
from support.simulated_cluster import (
    NOW,
    SETTINGS,
    broken_status_rules,
    build_ended_state,
    build_finetunejob,
    build_pod,
    build_stored_job,
    merged,
    written,
)

EARLIER, LATER = "2026-01-01T12:00:00Z", "2026-01-01T13:00:00Z"


def conditions_of(standing: Standing, before: tuple[Condition, ...] = (), now: str = EARLIER) -> dict[ConditionType, Condition]:
    verdict = Verdict(Phase.PENDING, standing, "Because", "A sentence.")
    return {item.type: item for item in build_conditions(verdict, {}, before, 3, now)}


@pytest.mark.parametrize(
    ("standing", "expected"),
    [
        (Standing.READY, {"Ready": "True"}),
        (Standing.RECONCILING, {"Ready": "False", "Reconciling": "True"}),
        (Standing.STALLED, {"Ready": "False", "Stalled": "True"}),
        (Standing.IDLE, {"Ready": "False"}),
    ],
)
def test_a_standing_has_its_conditions_and_no_other(standing: Standing, expected: dict[str, str]) -> None:
    assert {kind.value: item.status for kind, item in conditions_of(standing).items()} == expected


def test_a_transition_time_stays_while_the_status_stays() -> None:
    before = tuple(conditions_of(Standing.RECONCILING).values())
    after = conditions_of(Standing.STALLED, before, LATER)
    assert after[ConditionType.READY].last_transition_time == EARLIER
    assert after[ConditionType.STALLED].last_transition_time == LATER


def test_a_transition_time_changes_with_the_status() -> None:
    before = tuple(conditions_of(Standing.RECONCILING).values())
    assert conditions_of(Standing.READY, before, LATER)[ConditionType.READY].last_transition_time == LATER


def test_conditions_speak_of_the_current_generation() -> None:
    assert {item.observed_generation for item in conditions_of(Standing.STALLED).values()} == {3}


def test_a_milestone_stands_beside_the_standing() -> None:
    verdict = Verdict(Phase.RUNNING, Standing.RECONCILING, "Running", "The trainer is at work.")
    trained = ConditionValue("True", "Trained", "The adapter is trained.")
    built = build_conditions(verdict, {ConditionType.TRAINED: trained}, (), 1, EARLIER)
    assert [item.type.value for item in built] == ["Ready", "Reconciling", "Trained"]


def test_reconciling_and_stalled_end_when_they_are_no_longer_true() -> None:
    before = tuple(conditions_of(Standing.STALLED).values())
    assert set(conditions_of(Standing.READY, before)) == {ConditionType.READY}


# Every status that a decision writes: any spec, Job, pod and last words.

SPECS = st.sampled_from(
    [
        {},
        {"runPolicy": {"suspend": True}},
        {"runPolicy": {"activeDeadlineSeconds": 1, "backoffLimit": 1}},
        {"quality": {"maxLossIncreasePercent": "1"}},
        {"resources": {"gpus": 2}},
        {"model": {"colour": "red" * 1000}},
        {"pod": {"image": "registry.example.com/" + "x" * 480}},
        {"outputs": {"destinations": [{"uri": f"s3://models/{'y' * 1000}{number}"} for number in range(8)]}},
    ]
)
JOB_CONDITIONS = st.sampled_from(
    [
        None,
        {"type": "Complete", "reason": "CompletionsReached"},
        {"type": "Failed", "reason": "PodFailurePolicy", "message": "m" * 2000},
        {"type": "Failed", "reason": "BackoffLimitExceeded"},
        {"type": "Failed", "reason": "DeadlineExceeded"},
        {"type": "Failed", "reason": "not CamelCase"},
        {"type": "Failed"},
    ]
)
VERIFIED_BY = st.sampled_from(["weights and logits", "weights; kernel not run", "something new"])
LOSSES = st.sampled_from([None, "1.234", "0", "-1", "nan", "1e308", "words", ""])
WORDS = st.one_of(
    st.text(max_size=1500),
    st.fixed_dictionaries(
        {"version": st.just(1), "stage": st.sampled_from([stage.value for stage in Stage])},
        optional={
            "message": st.text(max_size=1024),
            "step": st.integers(0, 1000),
            "totalSteps": st.integers(0, 1000),
            "model": st.text(max_size=1024),
            "quality": st.fixed_dictionaries(
                {"tunedLoss": LOSSES, "quantizedLoss": LOSSES, "shippedMatchesTrained": st.booleans(), "verifiedBy": VERIFIED_BY},
                optional={"shortfall": st.none() | st.text(max_size=1100)},
            ),
        },
    ).map(json.dumps),
)
REASONS = st.one_of(st.sampled_from(["ContainerCreating", "ImagePullBackOff", "rpc error", "Völlig", ""]), st.text(max_size=200))
STATES = st.one_of(
    st.none(),
    st.just({"running": {"startedAt": EARLIER}}),
    st.just({"running": {}}),
    st.builds(lambda reason, message: {"waiting": {"reason": reason, "message": message}}, REASONS, st.text(max_size=1500)),
    st.builds(build_ended_state, st.sampled_from([*map(int, ExitCode), 1, 137, 255]), WORDS, REASONS),
    st.just({"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown", "startedAt": None, "finishedAt": None}}),
)
PODS = st.fixed_dictionaries(
    {"phase": st.sampled_from(["Pending", "Running", "Succeeded", "Failed"]), "state": STATES},
    optional={
        "conditions": st.sampled_from(
            [
                ({"type": "DisruptionTarget", "status": "True", "reason": "x" * 2000},),
                ({"type": "PodScheduled", "status": "False", "message": "n" * 3000},),
            ]
        ),
        "reason": st.just("Evicted"),
        "message": st.text(max_size=2000),
    },
)


def stored_after(raw: Json, jobs: tuple[Json, ...], now_seconds: int = 0, **facts: Any) -> Json:
    subject = read_subject(raw)
    seen = World(subject, jobs, **facts) if isinstance(subject, Subject) else subject
    plan = decide(seen, NOW + timedelta(seconds=now_seconds), SETTINGS)
    status: Json = raw.get("status") or {}
    for action in plan.actions:
        if isinstance(action, WriteStatus):
            status = merged(status, action.patch)
    return status


@settings(derandomize=True)
@given(SPECS, JOB_CONDITIONS, st.lists(PODS, max_size=3), st.lists(st.text(max_size=2000), max_size=2), st.booleans())
def test_every_status_that_a_decision_writes_keeps_the_rules(
    changes: Json, condition: Json | None, pods: list[Json], warnings: list[str], has_job: bool
) -> None:
    raw = build_finetunejob(changes, generation=3)
    subject = read_subject(raw)
    jobs = (build_stored_job(build_job(subject, SETTINGS), condition=condition),) if has_job and isinstance(subject, Subject) else ()
    children = tuple(build_pod(job, name=f"pod-{number}", **pod) for job in jobs for number, pod in enumerate(pods))
    status = stored_after(raw, jobs, pods=children, warnings=tuple(warnings))
    assert broken_status_rules(status, 3) == []
    assert FineTuneJobStatus.model_validate(status).wire() == status


@settings(derandomize=True)
@given(st.lists(st.tuples(JOB_CONDITIONS, st.lists(PODS, max_size=2)), min_size=2, max_size=4))
def test_from_one_status_to_the_next_a_transition_time_changes_only_with_its_status(worlds: list[tuple[Json | None, list[Json]]]) -> None:
    raw = build_finetunejob()
    manifest = build_job(read_subject(raw), SETTINGS)
    for seconds, (condition, pods) in enumerate(worlds):
        job = build_stored_job(manifest, condition=condition)
        children = tuple(build_pod(job, name=f"pod-{number}", **pod) for number, pod in enumerate(pods))
        before = {item["type"]: item for item in raw.get("status", {}).get("conditions", [])}
        raw = raw | {"status": stored_after(raw, (job,), seconds, pods=children)}
        for item in raw["status"]["conditions"]:
            old = before.get(item["type"])
            stayed = old is not None and old["status"] == item["status"]
            assert item["lastTransitionTime"] == (
                old["lastTransitionTime"] if old and stayed else written(NOW + timedelta(seconds=seconds))
            )

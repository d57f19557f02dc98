"""decide.py as a table: a world and what is done about it. One row a policy of POLICIES and a way to end."""

import json
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import pytest
from finetune_api.exits import REASONS, ExitCode
from finetune_api.progress import ProgressReport
from finetune_api.status import Progress, Stage
from finetune_operator import decide as decide_module
from finetune_operator.decide import CHECKPOINTED_LIMIT, EVICTED_LIMIT, FULL_DISK_LIMIT, Situation, decide, report_a_refused_job
from finetune_operator.desired import build_job, build_preflight_job
from finetune_operator.plan import CreateJob, DeleteJob, EmitEvent, PatchJob, Plan, WriteStatus, merge_patch
from finetune_operator.progress import trainer_of
from finetune_operator.reads import must_be_read, unexplained
from finetune_operator.settings import Settings
from finetune_operator.subject import Json, Subject, Unreadable, World, is_unfinished, read_subject
from finetune_operator.timing import changed_at
from support.simulated_cluster import (
    NOW,
    SETTINGS,
    broken_status_rules,
    build_ended_state,
    build_finetunejob,
    build_pod,
    build_stored_job,
    merged,
)

RUNNING: Json = {"running": {"startedAt": "2026-01-01T11:59:00Z"}}
DISRUPTED: Json = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
COMPLETE: Json = {"type": "Complete", "reason": "CompletionsReached"}


def failed(reason: str = "PodFailurePolicy") -> Json:
    return {"type": "Failed", "reason": reason}


def job_for(raw: Json, **changes: Any) -> Json:
    """The stored Job of the run that a FineTuneJob asks for."""
    return build_stored_job(build_job(read_subject(raw), SETTINGS), **changes)


def preflight_for(raw: Json, **changes: Any) -> Json:
    """The stored preflight Job of that run."""
    return build_stored_job(build_preflight_job(read_subject(raw), SETTINGS), uid="preflight-uid", **changes)


def world_of(raw: Json, *jobs: Json, **facts: Any) -> World:
    subject = read_subject(raw)
    assert isinstance(subject, Subject)
    return World(subject, tuple(jobs), **facts)


def kinds(plan: Plan) -> list[str]:
    """What a plan does, events aside."""
    return [type(action).__name__ for action in plan.actions if not isinstance(action, EmitEvent)]


def status_after(raw: Json, plan: Plan) -> Json:
    """The stored status once the plan is executed."""
    status: Json = raw.get("status") or {}
    for action in plan.actions:
        if isinstance(action, WriteStatus):
            status = merged(status, action.patch)
    return status


def ready_reason(status: Json) -> str:
    return str(next(item["reason"] for item in status["conditions"] if item["type"] == "Ready"))


def ended(code: int, message: str = "", **pod: Any) -> tuple[Json, World]:
    """A run whose only pod failed with this exit code, and whose Job failed for it."""
    raw = build_finetunejob()
    job = job_for(raw, condition=failed())
    return raw, world_of(raw, job, pods=(build_pod(job, phase="Failed", state=build_ended_state(code, message), **pod),))


def latched(phase: str = "Succeeded", changes: Json | None = None) -> Json:
    """A FineTuneJob whose run has ended, with the status that the operator writes for it."""
    raw = build_finetunejob(changes)
    job = job_for(raw, condition=COMPLETE if phase == "Succeeded" else failed())
    code = 0 if phase == "Succeeded" else 11
    pod = build_pod(job, phase=phase, state=build_ended_state(code))
    return raw | {"status": status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))}


@dataclass(frozen=True)
class Row:
    """A world, and the plan it leads to."""

    policy: str
    world: World
    actions: list[str]
    phase: str | None = None
    reason: str | None = None


def rows() -> dict[str, Row]:
    new, suspended = build_finetunejob(), build_finetunejob({"runPolicy": {"suspend": True}})
    job, deleted = job_for(new), job_for(new)
    deleted["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    other = job_for(build_finetunejob({"training": {"seed": 7}}), uid="other")
    foreign = job_for(new)
    foreign["metadata"]["ownerReferences"] = []
    leaving = build_finetunejob()
    leaving["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    done = latched()
    wrong = build_finetunejob({"resources": {"gpus": 2}})
    image = build_finetunejob({"pod": {"image": "registry.example.com/other:1"}})
    account = build_finetunejob({"pod": {"serviceAccountName": "admin"}})
    checkpointed = tuple(
        build_pod(job, name=f"pod-{index}", phase="Failed", state=build_ended_state(18)) for index in range(CHECKPOINTED_LIMIT)
    )
    filled = {"reason": "Evicted", "message": 'Usage of EmptyDir volume "workspace" exceeds the limit "50Gi".'}
    filling = tuple(build_pod(job, name=f"pod-{index}", state=RUNNING, **(filled | {"phase": "Failed"})) for index in range(EVICTED_LIMIT))
    full = {
        "reason": "Evicted",
        "message": "The node was low on resource: ephemeral-storage. Container trainer was using 90Gi.",
        "phase": "Failed",
    }
    crowded = tuple(build_pod(job, name=f"pod-{index}", state=RUNNING, **full) for index in range(FULL_DISK_LIMIT))
    succeeded = build_pod(job, phase="Succeeded", state=build_ended_state(0))
    complete = job_for(new, condition=COMPLETE)
    checked = build_finetunejob({"runPolicy": {"preflight": "Auto"}})
    pre, passed, refused = (preflight_for(checked, condition=condition) for condition in (None, COMPLETE, failed()))
    return {
        "a training whose node's disk is full again and again": Row(
            "stop_what_fills_its_disk", world_of(new, job, pods=crowded), ["WriteStatus", "DeleteJob"], "Failed", "Evicted"
        ),
        "what is being deleted is left": Row("leave_what_is_being_deleted", world_of(leaving), []),
        "a run that has ended": Row("keep_what_has_ended", world_of(done), []),
        "a spec that breaks a rule": Row("stall_on_what_is_not_allowed", world_of(wrong), ["WriteStatus"], "Pending", "InvalidSpec"),
        "an image that is not allowed": Row("stall_on_what_is_not_allowed", world_of(image), ["WriteStatus"], "Pending", "NotAllowed"),
        "a service account that is not": Row("stall_on_what_is_not_allowed", world_of(account), ["WriteStatus"], "Pending", "NotAllowed"),
        "the Job of another run": Row(
            "wait_until_other_jobs_are_gone", world_of(new, other), ["WriteStatus", "DeleteJob"], "Pending", "Replacing"
        ),
        "a Job that someone deleted": Row("wait_until_other_jobs_are_gone", world_of(new, deleted), ["WriteStatus"], "Pending", "Replacing"),
        "a namesake": Row("stall_on_a_namesake", world_of(new, namesake=foreign), ["WriteStatus"], "Pending", "NameTaken"),
        "a pod that outlives its Job": Row(
            "wait_until_orphaned_pods_are_gone", world_of(new, orphaned_pods=(build_pod(job, phase="Running"),)), ["WriteStatus"], "Pending", "Replacing"
        ),
        "an edit to what is not allowed": Row(
            "stall_on_what_is_not_allowed", world_of(image, other), ["WriteStatus", "DeleteJob"], "Pending", "NotAllowed"
        ),
        "a job that wants a GPU": Row(
            "check_before_a_gpu_is_asked_for", world_of(checked), ["WriteStatus", "CreateJob"], "Pending", "JobCreated"
        ),
        "preflight at work": Row(
            "check_before_a_gpu_is_asked_for",
            world_of(checked, pre, pods=(build_pod(pre, phase="Running", state=RUNNING),)),
            ["WriteStatus"],
            "Running",
            "Running",
        ),
        "preflight whose node's disk is full again and again": Row(
            "stop_what_fills_its_disk",
            world_of(checked, pre, pods=tuple(build_pod(pre, name=f"pod-{index}", state=RUNNING, **full) for index in range(FULL_DISK_LIMIT))),
            ["WriteStatus", "DeleteJob"],
            "Failed",
            "Evicted",
        ),
        "preflight that is told to stop too often": Row(
            "stop_what_only_checkpoints",
            world_of(checked, pre, pods=tuple(build_pod(pre, name=f"pod-{index}", phase="Failed", state=build_ended_state(18)) for index in range(CHECKPOINTED_LIMIT))),
            ["WriteStatus", "DeleteJob"],
            "Failed",
            "CheckpointedTooOften",
        ),
        "preflight that has passed": Row(
            "check_before_a_gpu_is_asked_for",
            world_of(checked, passed, pods=(build_pod(passed, phase="Succeeded", state=build_ended_state(0)),)),
            ["WriteStatus", "CreateJob"],
            "Pending",
            "JobCreated",
        ),
        "preflight that refuses": Row(
            "check_before_a_gpu_is_asked_for",
            world_of(checked, refused, pods=(build_pod(refused, phase="Failed", state=build_ended_state(12)),)),
            ["WriteStatus"],
            "Failed",
            "AccessDenied",
        ),
        "no Job yet": Row("create_what_is_missing", world_of(new), ["WriteStatus", "CreateJob"], "Pending", "JobCreated"),
        "too many checkpoints": Row(
            "stop_what_only_checkpoints", world_of(new, job, pods=checkpointed), ["WriteStatus", "DeleteJob"], "Failed", "CheckpointedTooOften"
        ),
        "a disk that is filled again and again": Row(
            "stop_what_fills_its_disk", world_of(new, job, pods=filling), ["WriteStatus", "DeleteJob"], "Failed", "Evicted"
        ),
        "a Job without a pod": Row("report_what_is_seen", world_of(new, job), ["WriteStatus"], "Pending", "JobCreated"),
        "a Job that can't make its pod": Row(
            "report_what_is_seen", world_of(new, job, warnings=("exceeded quota",)), ["WriteStatus"], "Pending", "PodNotCreated"
        ),
        "a running pod": Row(
            "report_what_is_seen", world_of(new, job, pods=(build_pod(job, phase="Running", state=RUNNING),)), ["WriteStatus"], "Running", "Running"
        ),
        "a retry": Row(
            "report_what_is_seen",
            world_of(new, job, pods=(build_pod(job, phase="Failed", state=build_ended_state(16)),)),
            ["WriteStatus"],
            "Pending",
            "Retrying",
        ),
        "suspended": Row("report_what_is_seen", world_of(suspended, job_for(suspended)), ["WriteStatus"], "Suspended", "Suspended"),
        "suspending": Row(
            "report_what_is_seen",
            world_of(suspended, job, pods=(build_pod(job, phase="Running", state=RUNNING),)),
            ["WriteStatus", "PatchJob"],
            "Running",
            "Suspending",
        ),
        "success": Row("report_what_is_seen", world_of(new, complete, pods=(succeeded,)), ["WriteStatus"], "Succeeded", "Succeeded"),
    }  # fmt: skip


@pytest.mark.parametrize("row", rows().values(), ids=rows().keys())
def test_a_world_leads_to_its_plan(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(policy: decide_module.Policy) -> decide_module.Policy:
        def note(situation: decide_module.Situation) -> Plan | None:
            asked.append(policy.__name__)  # type: ignore[attr-defined]
            return policy(situation)

        return note

    monkeypatch.setattr(decide_module, "POLICIES", tuple(noted(policy) for policy in decide_module.POLICIES))
    plan = decide(row.world, NOW, SETTINGS)
    assert (asked[-1], kinds(plan)) == (row.policy, row.actions)
    if row.phase:
        status = status_after(row.world.subject.raw, plan)
        assert (status["phase"], ready_reason(status)) == (row.phase, row.reason)


def test_every_policy_has_a_row() -> None:
    assert {row.policy for row in rows().values()} == {policy.__name__ for policy in decide_module.POLICIES}  # type: ignore[attr-defined]


@pytest.mark.parametrize("row", rows().values(), ids=rows().keys())
def test_a_plan_that_was_executed_writes_no_second_status(row: Row) -> None:
    raw = row.world.subject.raw
    after = raw | {"status": status_after(raw, decide(row.world, NOW, SETTINGS))}
    again = decide(replace(row.world, subject=read_subject(after)), NOW + timedelta(seconds=1), SETTINGS)
    assert not [action for action in again.actions if isinstance(action, WriteStatus) and action.patch]


@pytest.mark.parametrize("code", [code for code in ExitCode if code is not ExitCode.SUCCEEDED])
def test_each_exit_code_ends_the_run_with_its_reason_and_names_the_code(code: ExitCode) -> None:
    raw, world = ended(code)
    status = status_after(raw, decide(world, NOW, SETTINGS))
    assert (status["phase"], ready_reason(status)) == ("Failed", REASONS[code])
    assert f"exit code {int(code)}" in status["message"]
    assert status["attempts"][0]["exitCode"] == code


def test_the_trainers_own_sentence_becomes_the_message() -> None:
    sentence = "rows.jsonl, line 3: found a number, but a string is expected."
    raw, world = ended(11, json.dumps({"version": 1, "stage": "Loading", "message": sentence, "exitCode": 11}))
    status = status_after(raw, decide(world, NOW, SETTINGS))
    assert (status["message"], status["stage"]) == (sentence, "Loading")


def test_the_last_log_lines_become_the_message_where_the_trainer_said_nothing() -> None:
    raw, world = ended(1, "line 1\nline 2\nline 3\nImportError: no such module\n")
    assert "line 2 line 3 ImportError: no such module" in status_after(raw, decide(world, NOW, SETTINGS))["message"]


def test_running_out_of_memory_names_the_stage_the_limit_and_the_mend() -> None:
    raw = build_finetunejob({"resources": {"memory": "3Gi"}})
    job = job_for(raw, condition=failed())
    state = build_ended_state(137, json.dumps({"version": 1, "stage": "Converting"}), "OOMKilled")
    world = world_of(raw, job, pods=(build_pod(job, phase="Failed", state=state),))
    status = status_after(raw, decide(world, NOW, SETTINGS))
    assert ready_reason(status) == "OOMKilled"
    for part in ("out of memory", "Converting", "3Gi", "resources.memory"):
        assert part in status["message"]


def test_a_pod_evicted_for_its_disk_names_the_workspace() -> None:
    raw, world = ended(137, reason="Evicted", message="x")
    pod = world.pods[0]
    pod["status"] |= {"reason": "Evicted", "message": 'Usage of EmptyDir volume "workspace" exceeds the limit "50Gi".'}
    status = status_after(raw, decide(world, NOW, SETTINGS))
    assert ready_reason(status) == "Evicted"
    assert "storage.workspace.size" in status["message"]


def test_a_disrupted_pod_is_waited_for_and_not_a_failure() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pod = build_pod(job, phase="Failed", state=build_ended_state(18), conditions=(DISRUPTED,))
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert (status["phase"], status["attempts"][0]["reason"]) == ("Pending", "Disrupted")
    assert "PreemptionByScheduler" in status["message"]


def test_disruptions_never_count_as_checkpointed_too_often() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pods = tuple(
        build_pod(job, name=f"pod-{index}", phase="Failed", state=build_ended_state(18), conditions=(DISRUPTED,))
        for index in range(CHECKPOINTED_LIMIT)
    )
    assert status_after(raw, decide(world_of(raw, job, pods=pods), NOW, SETTINGS))["phase"] == "Pending"


def test_a_run_that_checkpointed_too_often_has_a_completion_time() -> None:
    row = rows()["too many checkpoints"]
    assert status_after(row.world.subject.raw, decide(row.world, NOW, SETTINGS))["completionTime"] == "2026-01-01T12:00:00Z"


@pytest.mark.parametrize(
    ("pod", "reason", "parts"),
    [
        ({"state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}, "ImagePullFailed", ["trainer:1", "not found"]),
        (
            {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": "no"}}},
            "PodWaiting",
            ["CreateContainerConfigError", "no"],
        ),
        ({"state": {"waiting": {"reason": "not a word"}}}, "PodWaiting", ["not a word"]),
        (
            {"conditions": ({"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available."},)},
            "Unschedulable",
            ["0/3 nodes are available", "spec.resources"],
        ),
        ({"state": {"waiting": {"reason": "ContainerCreating"}}}, "ContainerCreating", ["starting"]),
    ],
)
def test_a_pod_that_does_not_start_says_why(pod: Json, reason: str, parts: list[str]) -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    status = status_after(raw, decide(world_of(raw, job, pods=(build_pod(job, **pod),)), NOW + timedelta(seconds=3), SETTINGS))
    assert (status["phase"], ready_reason(status)) == ("Pending", reason)
    assert all(part in status["message"] for part in parts)


def test_an_image_that_can_not_be_pulled_is_the_trainers_also_where_a_sidecar_stands_before_it() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pod = build_pod(job, state={"waiting": {"reason": "ErrImagePull", "message": "not found"}})
    pod["spec"] = pod["spec"] | {"containers": [{"name": "istio-proxy", "image": "proxy:1"}, *pod["spec"]["containers"]]}
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW + timedelta(seconds=3), SETTINGS))
    assert "The image registry.example.com/trainer:1 can't be pulled" in status["message"]


def test_a_pod_that_waits_for_its_volume_says_what_the_events_say() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pod = build_pod(job, state={"waiting": {"reason": "ContainerCreating"}})
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,), warnings=("FailedMount: no claim work",)), NOW, SETTINGS))
    assert "FailedMount: no claim work" in status["message"]


def test_a_job_that_used_up_its_retries_says_how_many() -> None:
    raw = build_finetunejob({"runPolicy": {"backoffLimit": 2}})
    job = job_for(raw, condition=failed("BackoffLimitExceeded"))
    world = world_of(raw, job, pods=(build_pod(job, phase="Failed", state=build_ended_state(16)),))
    status = status_after(raw, decide(world, NOW, SETTINGS))
    assert ready_reason(status) == "InfrastructureError"
    assert "2 retries" in status["message"]


def test_a_job_that_ran_past_its_deadline_names_the_field() -> None:
    raw = build_finetunejob({"runPolicy": {"activeDeadlineSeconds": 60}})
    status = status_after(raw, decide(world_of(raw, job_for(raw, condition=failed("DeadlineExceeded"))), NOW, SETTINGS))
    assert ready_reason(status) == "DeadlineExceeded"
    assert "60 s" in status["message"]
    assert "runPolicy.activeDeadlineSeconds" in status["message"]


def test_a_job_that_stops_at_its_deadline_does_not_promise_another_pod() -> None:
    raw = build_finetunejob({"runPolicy": {"activeDeadlineSeconds": 60}})
    job = job_for(raw, condition={"type": "FailureTarget", "reason": "DeadlineExceeded"})
    pod = build_pod(job, phase="Running", state=RUNNING)
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert (status["phase"], ready_reason(status)) == ("Running", "Stopping")
    assert "its deadline of 60 s" in status["message"]


def test_a_deadline_tells_what_kept_the_pod_from_starting_also_when_the_pod_is_gone() -> None:
    raw = build_finetunejob({"runPolicy": {"activeDeadlineSeconds": 60}})
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
    raw["status"] = status_after(raw, decide(world_of(raw, job_for(raw), pods=(build_pod(job_for(raw), state=waiting),)), NOW, SETTINGS))
    doomed = job_for(raw, condition={"type": "FailureTarget", "reason": "DeadlineExceeded"})
    raw["status"] = stopping = status_after(raw, decide(world_of(raw, doomed), NOW, SETTINGS))
    over = status_after(raw, decide(world_of(raw, job_for(raw, condition=failed("DeadlineExceeded"))), NOW, SETTINGS))
    assert (stopping["phase"], over["phase"]) == ("Pending", "Failed")
    assert (
        "before its pod had started (The image registry.example.com/trainer:1 can't be pulled (ErrImagePull): not found" in over["message"]
    )
    assert over["message"] == stopping["message"]


def test_a_preflight_that_ran_into_the_deadline_is_not_said_to_have_waited_for_its_pod() -> None:
    raw = build_finetunejob({"runPolicy": {"preflight": "Auto", "activeDeadlineSeconds": 60}})
    pod = build_pod(preflight_for(raw), phase="Running", state=RUNNING)
    raw["status"] = status_after(raw, decide(world_of(raw, preflight_for(raw), pods=(pod,)), NOW, SETTINGS))
    doomed = preflight_for(raw, condition={"type": "FailureTarget", "reason": "DeadlineExceeded"})
    raw["status"] = stopping = status_after(raw, decide(world_of(raw, doomed), NOW, SETTINGS))
    over = status_after(raw, decide(world_of(raw, preflight_for(raw, condition=failed("DeadlineExceeded"))), NOW, SETTINGS))
    assert (stopping["phase"], over["phase"]) == ("Running", "Failed")
    assert "its deadline of 60 s, during preflight; raise runPolicy.activeDeadlineSeconds" in over["message"]
    assert over["message"] == stopping["message"]


def test_a_killed_pod_that_was_being_deleted_did_not_run_out_of_memory() -> None:
    raw = build_finetunejob()
    job = job_for(raw, condition=failed())
    pod = build_pod(job, phase="Failed", state=build_ended_state(137))
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert ready_reason(status) == "PodDeleted"
    assert "memory" not in status["message"]


@pytest.mark.parametrize("was_seen_to_end", [False, True])
def test_a_killed_pod_that_is_gone_was_deleted(was_seen_to_end: bool) -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pod = build_pod(job, phase="Running", state=RUNNING)
    if was_seen_to_end:
        pod = build_pod(job, phase="Failed", state=build_ended_state(137))
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    raw["status"] = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    words = {"message": "Container trainer for pod ml/pod-1 failed with exit code 137 matching FailJob rule at index 3"}
    status = status_after(raw, decide(world_of(raw, job_for(raw, condition=failed() | words)), NOW, SETTINGS))
    assert ready_reason(status) == "PodDeleted"
    assert "deleted" in status["message"]


def test_a_pod_whose_node_does_not_answer_names_the_node() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    lost = ({"type": "Ready", "status": "False"}, {"type": "ContainersReady", "status": "True"})
    pod = build_pod(job, phase="Running", state=RUNNING, conditions=lost)
    pod["spec"] = pod["spec"] | {"nodeName": "gpu-7"}
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert (status["phase"], ready_reason(status)) == ("Running", "NodeLost")
    assert "gpu-7" in status["message"]


def with_sidecar(pod: Json, state: Json) -> Json:
    return merged(pod, {"status": {"containerStatuses": [*pod["status"]["containerStatuses"], {"name": "istio-proxy", "state": state}]}})


@pytest.mark.parametrize("code", [0, 16])
def test_a_pod_that_a_sidecar_keeps_from_ending_names_the_sidecar_and_the_mend(code: int) -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pod = with_sidecar(build_pod(job, phase="Running", state=build_ended_state(code)), RUNNING)
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert (status["phase"], ready_reason(status)) == ("Running", "Stopping")
    for part in (f"The trainer has ended (exit code {code})", "istio-proxy", "trainer.podLabels", "trainer.podAnnotations"):
        assert part in status["message"]


def test_a_preflight_that_a_sidecar_keeps_from_ending_says_so_too() -> None:
    raw = build_finetunejob({"runPolicy": {"preflight": "Auto"}})
    pre = preflight_for(raw)
    pod = with_sidecar(build_pod(pre, phase="Running", state=build_ended_state(0)), RUNNING)
    status = status_after(raw, decide(world_of(raw, pre, pods=(pod,)), NOW, SETTINGS))
    assert "istio-proxy" in status["message"]


def test_a_sidecar_beside_a_trainer_at_work_is_no_news() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pod = with_sidecar(build_pod(job, phase="Running", state=RUNNING), RUNNING)
    assert status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))["message"] == "The trainer is at work."


@pytest.mark.parametrize("others", [(), ({"terminated": {"exitCode": 0}},)])
def test_a_trainer_that_has_ended_is_not_said_to_be_at_work(others: tuple[Json, ...]) -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pod = build_pod(job, phase="Running", state=build_ended_state(0))
    for state in others:
        pod = with_sidecar(pod, state)
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert (ready_reason(status), status["message"]) == ("Running", "The trainer has ended (exit code 0); waiting for its pod to say so.")


def test_the_job_of_another_run_is_deleted_before_the_new_one_is_created() -> None:
    old = job_for(build_finetunejob({"training": {"seed": 7}}), uid="old")
    new = build_finetunejob()
    first = decide(world_of(new, old), NOW, SETTINGS)
    assert first.actions[1] == DeleteJob(old["metadata"]["name"], "old")
    going = merged(old, {"metadata": {"deletionTimestamp": "2026-01-01T12:00:00Z"}})
    assert "CreateJob" not in kinds(decide(world_of(new, going), NOW, SETTINGS))
    assert "CreateJob" in kinds(decide(world_of(new), NOW, SETTINGS))


def test_a_job_is_created_only_behind_a_check_that_nothing_has_changed() -> None:
    raw = build_finetunejob()
    stored = raw | {"status": status_after(raw, decide(world_of(raw), NOW, SETTINGS))}
    assert decide(world_of(stored), NOW, SETTINGS).actions[0] == WriteStatus({})
    assert kinds(decide(world_of(stored), NOW, SETTINGS)) == ["WriteStatus", "CreateJob"]


def refused(raw: Json, *, needs_edit: bool = False) -> Json:
    """The status after the API server refused the run's Job."""
    situation = Situation(world_of(raw), NOW, SETTINGS)
    return status_after(raw, report_a_refused_job(situation, 'jobs.batch "x" is forbidden: exceeded quota: none', needs_edit=needs_edit))


@pytest.mark.parametrize(("needs_edit", "standing"), [(False, "Reconciling"), (True, "Stalled")])
def test_a_job_that_the_api_server_refuses_says_why(needs_edit: bool, standing: str) -> None:
    status = refused(build_finetunejob(), needs_edit=needs_edit)
    assert ready_reason(status) == "JobRefused"
    assert "exceeded quota: none" in status["message"]
    assert standing in {item["type"] for item in status["conditions"]}
    assert broken_status_rules(status, 1) == []


def test_a_refusal_stands_until_the_job_is_made() -> None:
    raw = build_finetunejob()
    stored = raw | {"status": refused(raw)}
    plan = decide(world_of(stored), NOW, SETTINGS)
    assert plan.actions[:2] == (WriteStatus({}), CreateJob(build_job(read_subject(stored), SETTINGS)))
    assert kinds(plan) == ["WriteStatus", "CreateJob"]
    assert ready_reason(status_after(stored, decide(world_of(stored, job_for(stored)), NOW, SETTINGS))) == "JobCreated"


def test_a_refusal_of_another_run_does_not_stand() -> None:
    stored = build_finetunejob({"training": {"seed": 7}}, status=refused(build_finetunejob()))
    assert ready_reason(status_after(stored, decide(world_of(stored), NOW, SETTINGS))) == "JobCreated"


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_run_that_has_ended_starts_nothing_when_its_job_is_gone(phase: str) -> None:
    assert decide(world_of(latched(phase)), NOW, SETTINGS) == Plan()


def test_the_job_gets_its_ttl_only_behind_the_terminal_status() -> None:
    raw = build_finetunejob({"runPolicy": {"ttlSecondsAfterFinished": 60}})
    job = job_for(raw, condition=COMPLETE)
    running = decide(world_of(raw, job_for(raw)), NOW, SETTINGS)
    assert "PatchJob" not in kinds(running)
    plan = decide(world_of(raw, job), NOW, SETTINGS)
    assert kinds(plan) == ["WriteStatus", "PatchJob"]
    assert plan.actions[-1] == PatchJob(job["metadata"]["name"], {"spec": {"ttlSecondsAfterFinished": 60}})


def test_a_ttl_that_was_lost_with_the_operator_is_given_later() -> None:
    raw = latched("Succeeded", {"runPolicy": {"ttlSecondsAfterFinished": 60}})
    job = job_for(raw, condition=COMPLETE)
    assert decide(world_of(raw, job), NOW, SETTINGS).actions == (
        PatchJob(job["metadata"]["name"], {"spec": {"ttlSecondsAfterFinished": 60}}),
    )


def test_a_job_that_still_works_for_an_ended_run_is_deleted() -> None:
    raw = latched("Failed")
    job = job_for(raw)
    assert decide(world_of(raw, job), NOW, SETTINGS).actions == (WriteStatus({}), DeleteJob(job["metadata"]["name"], "job-uid"))


def test_a_live_edit_of_an_ended_run_only_moves_the_observed_generation() -> None:
    raw = latched()
    edited = merged(raw, {"metadata": {"generation": 2}, "spec": {"runPolicy": {"backoffLimit": 9}}})
    plan = decide(world_of(edited), NOW, SETTINGS)
    assert kinds(plan) == ["WriteStatus"]
    status = status_after(edited, plan)
    assert status["observedGeneration"] == 2
    assert {item["observedGeneration"] for item in status["conditions"]} == {2}
    assert (status["phase"], status["message"]) == (raw["status"]["phase"], raw["status"]["message"])


def test_the_latch_holds_when_a_newer_operator_wrote_fields_that_this_one_can_not_read() -> None:
    raw = latched()
    newer = merged(raw, {"metadata": {"generation": 2}, "status": {"run": {"colour": "red"}, "weather": "fine"}})
    status = status_after(newer, decide(world_of(newer), NOW, SETTINGS))
    assert status["run"] == newer["status"]["run"]
    assert decide(world_of(newer | {"status": status}), NOW, SETTINGS) == Plan()


def unreadable(raw: Json) -> Unreadable:
    """The same object, with a spec that was stored under another schema."""
    subject = read_subject(merged(raw, {"spec": {"model": {"colour": "red"}}}))
    assert isinstance(subject, Unreadable)
    return subject


def test_of_a_spec_that_can_not_be_read_only_the_status_is_written() -> None:
    subject = unreadable(build_finetunejob())
    plan = decide(subject, NOW, SETTINGS)
    status = status_after(subject.raw, plan)
    assert [type(action) for action in plan.actions] == [WriteStatus]
    assert (status["phase"], ready_reason(status)) == ("Pending", "InvalidSpec")
    assert "model.colour" in status["message"]


def test_a_status_about_a_spec_that_can_not_be_read_is_written_once() -> None:
    raw = unreadable(build_finetunejob()).raw
    raw = raw | {"status": status_after(raw, decide(unreadable(raw), NOW, SETTINGS))}
    assert decide(unreadable(raw), NOW + timedelta(seconds=1), SETTINGS) == Plan()


def test_an_ended_run_keeps_its_status_when_its_spec_can_no_longer_be_read() -> None:
    assert decide(unreadable(latched()), NOW, SETTINGS) == Plan()


def test_a_job_that_is_being_deleted_is_left_when_its_spec_can_not_be_read() -> None:
    leaving = merged(build_finetunejob(), {"metadata": {"deletionTimestamp": "2026-01-01T12:00:00Z"}})
    assert decide(unreadable(leaving), NOW, SETTINGS) == Plan()


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_rerun_makes_a_new_job_after_an_end(phase: str) -> None:
    raw = latched(phase)
    again = merged(raw, {"metadata": {"generation": 2}, "spec": {"runPolicy": {"rerun": "1"}}})
    plan = decide(world_of(again), NOW, SETTINGS)
    created = [action for action in plan.actions if isinstance(action, CreateJob)]
    assert created[0].manifest["metadata"]["name"] != raw["status"]["run"]["jobName"]
    status = status_after(again, plan)
    assert (status["phase"], status.get("completionTime"), status.get("attempts")) == ("Pending", None, None)
    assert {item["type"] for item in status["conditions"]} == {"Ready", "Reconciling"}


@pytest.mark.parametrize(
    ("edit", "patch"),
    [
        ({"suspend": True}, {"suspend": True}),
        ({"backoffLimit": 9}, {"backoffLimit": 9}),
        ({"activeDeadlineSeconds": 60}, {"activeDeadlineSeconds": 60}),
    ],
)
def test_a_live_edit_patches_the_job_and_nothing_restarts(edit: Json, patch: Json) -> None:
    job = job_for(build_finetunejob())
    plan = decide(world_of(build_finetunejob({"runPolicy": edit}), job), NOW, SETTINGS)
    assert plan.actions[-1] == PatchJob(job["metadata"]["name"], {"spec": patch})
    assert not {"CreateJob", "DeleteJob"} & set(kinds(plan))


def test_a_deadline_that_was_taken_back_is_removed_from_the_job() -> None:
    job = job_for(build_finetunejob({"runPolicy": {"activeDeadlineSeconds": 60}}))
    plan = decide(world_of(build_finetunejob(), job), NOW, SETTINGS)
    assert plan.actions[-1] == PatchJob(job["metadata"]["name"], {"spec": {"activeDeadlineSeconds": None}})


def test_a_job_that_runs_already_is_left_alone_when_the_allow_list_shrinks() -> None:
    raw = build_finetunejob({"pod": {"image": "registry.example.com/other:1"}})
    assert kinds(decide(world_of(raw, job_for(raw)), NOW, SETTINGS)) == ["WriteStatus"]


def test_an_image_that_is_not_allowed_is_named_with_the_mend() -> None:
    raw = build_finetunejob({"pod": {"image": "registry.example.com/other:1"}})
    status = status_after(raw, decide(world_of(raw), NOW, SETTINGS))
    assert "registry.example.com/other:1" in status["message"]
    assert "allowedImages" in status["message"]
    allowed = Settings(allowed_images=("registry.example.com/*",))
    assert "CreateJob" in kinds(decide(world_of(raw), NOW, allowed))


def test_a_message_of_control_characters_alone_is_no_message() -> None:
    raw, world = ended(11, json.dumps({"version": 1, "stage": "Loading", "message": "\u0001\u0002"}))
    assert "exit code 11" in status_after(raw, decide(world, NOW, SETTINGS))["message"]


def report(step: int, digest: str = "", stage: Stage = Stage.TRAINING) -> ProgressReport:
    wanted = digest or read_subject(build_finetunejob()).run.train_digest
    return ProgressReport(train_digest=wanted, stage=stage, progress=Progress(summary=f"{step}/400", step=step, total_steps=400))


def running_with(progress: ProgressReport, status: Json | None = None) -> World:
    raw = build_finetunejob(status=status)
    job = job_for(raw)
    return world_of(raw, job, pods=(build_pod(job, phase="Running", state=RUNNING),), progress=progress)


def status_with(progress: ProgressReport, seconds: float = 0, status: Json | None = None) -> Json:
    world = running_with(progress, status)
    return status_after(world.subject.raw, decide(world, NOW + timedelta(seconds=seconds), SETTINGS))


def test_progress_of_the_runs_own_training_is_shown() -> None:
    status = status_with(report(10))
    assert (status["stage"], status["progress"]["summary"], status["progress"]["updatedAt"]) == (
        "Training",
        "10/400",
        "2026-01-01T12:00:00Z",
    )


def test_progress_under_another_digest_is_not_believed() -> None:
    assert "progress" not in status_with(report(10, digest="0" * 64))


def test_progress_is_written_every_10_seconds_at_most() -> None:
    first = status_with(report(10))
    assert status_with(report(11), 9, first)["progress"]["step"] == 10
    assert status_with(report(11), 10, first)["progress"]["step"] == 11


def test_a_new_stage_is_written_at_once() -> None:
    first = status_with(report(10))
    assert status_with(report(10, stage=Stage.EVALUATING), 1, first)["stage"] == "Evaluating"


def test_a_training_without_a_step_for_half_an_hour_says_so_and_goes_on() -> None:
    first = status_with(report(10))
    assert ready_reason(status_with(report(10), 29 * 60, first)) == "Running"
    stuck = status_with(report(10), 30 * 60, first)
    assert ready_reason(stuck) == "NoProgress"
    assert (stuck["phase"], broken_status_rules(stuck, 1)) == ("Running", [])
    assert "2026-01-01T12:00:00Z" in stuck["message"]
    assert ready_reason(status_with(report(11), 31 * 60, stuck)) == "Running"


@pytest.mark.parametrize("answer", [None, "another training's"])
def test_that_nobody_has_answered_is_no_lack_of_progress(answer: str | None) -> None:
    """An operator that was away for an hour has yet to ask."""
    first = status_with(report(10))
    world = running_with(report(10, digest="0" * 64), first)
    silent = world if answer else replace(world, progress=None)
    assert ready_reason(status_after(world.subject.raw, decide(silent, NOW + timedelta(hours=1), SETTINGS))) == "Running"


def test_a_standstill_that_was_seen_lasts_until_a_step_is() -> None:
    """Another operator takes over, and has yet to ask."""
    stuck = status_with(report(10), 30 * 60, status_with(report(10)))
    silent = replace(running_with(report(10), stuck), progress=None)
    assert ready_reason(status_after(silent.subject.raw, decide(silent, NOW + timedelta(minutes=31), SETTINGS))) == "NoProgress"


def test_a_pod_evicted_for_what_its_neighbours_wrote_does_not_count() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    full = {"reason": "Evicted", "message": "The node was low on resource: ephemeral-storage.", "phase": "Failed"}
    pods = tuple(build_pod(job, name=f"pod-{index}", state=RUNNING, **full) for index in range(FULL_DISK_LIMIT))
    assert "DeleteJob" not in kinds(decide(world_of(raw, job, pods=pods), NOW, SETTINGS))


def test_a_stage_without_steps_is_no_lack_of_progress() -> None:
    evaluating = status_with(report(10, stage=Stage.EVALUATING), 0, status_with(report(10)))
    assert ready_reason(status_with(report(10, stage=Stage.EVALUATING), 3600, evaluating)) == "Running"


def test_only_a_running_pod_is_asked_for_progress() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    trainer = trainer_of(world_of(raw, job, pods=(build_pod(job, phase="Running", state=RUNNING),)))
    assert trainer is not None
    assert (trainer.pod_uid, trainer.pod_ip) == ("pod-1-uid", "192.0.2.1")
    assert trainer_of(world_of(raw, job, pods=(build_pod(job),))) is None
    assert trainer_of(world_of(raw, job, pods=(build_pod(job, phase="Failed", state=build_ended_state(1)),))) is None


def test_events_are_read_only_of_what_takes_longer_than_5_seconds() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    pod = build_pod(job, state={"waiting": {"reason": "ContainerCreating"}})
    later = NOW + timedelta(seconds=6)
    assert unexplained(world_of(raw, job), NOW) is None
    assert unexplained(world_of(raw, job), later) == "job-uid"
    assert unexplained(world_of(raw, job, pods=(pod,)), later) == "pod-1-uid"
    assert unexplained(world_of(raw, job, pods=(build_pod(job, phase="Running", state=RUNNING),)), later) is None


def test_events_are_read_of_a_retry_that_gets_no_pod() -> None:
    raw = build_finetunejob()
    job = job_for(raw)
    world = world_of(raw, job, pods=(build_pod(job, phase="Failed", state=build_ended_state(16, now=NOW + timedelta(hours=1))),))
    assert unexplained(world, NOW + timedelta(hours=1, seconds=4)) is None
    assert unexplained(world, NOW + timedelta(hours=1, seconds=6)) == "job-uid"
    assert changed_at(world) == NOW + timedelta(hours=1)


def test_what_a_container_says_reaches_the_status_without_credentials() -> None:
    artifact = {"kind": "adapter", "uri": "s3://me:hush@models/x", "digest": "hf_abcdefghijkl"}
    said = {
        "version": 1,
        "stage": "Publishing",
        "artifacts": [artifact],
        "quality": {"baseLoss": "hf_abcdefghijkl"},
        "qat": {"scheme": "a\nb"},
    }
    raw = build_finetunejob()
    job = job_for(raw, condition=COMPLETE)
    pod = build_pod(job, phase="Succeeded", state=build_ended_state(0, json.dumps(said)))
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert status["artifacts"][0]["uri"] == "s3://***@models/x"
    assert "abcdefghijkl" not in json.dumps(status)
    assert status["qat"]["scheme"] == "a b"


@pytest.mark.parametrize(
    ("verified_by", "sentence"),
    [
        ("weights and logits", "The exported model computes what the trained one does."),
        ("weights; kernel not run", "The exported weights are the trained ones; no kernel of the scheme ran on this node."),
    ],
)
def test_the_condition_says_how_far_the_proof_went(verified_by: str, sentence: str) -> None:
    said = {"version": 1, "stage": "Publishing", "quality": {"shippedMatchesTrained": True, "verifiedBy": verified_by}}
    raw = build_finetunejob()
    job = job_for(raw, condition=COMPLETE)
    pod = build_pod(job, phase="Succeeded", state=build_ended_state(0, json.dumps(said)))
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert status["quality"]["verifiedBy"] == verified_by
    assert [item["message"] for item in status["conditions"] if item["type"] == "Verified"] == [sentence]


def test_what_made_a_run_slow_stands_behind_its_success() -> None:
    said = {"version": 1, "stage": "Publishing", "exitCode": 0, "reason": "Succeeded", "message": "Training took 900 s on the CPU."}
    raw = build_finetunejob()
    job = job_for(raw, condition=COMPLETE)
    pod = build_pod(job, phase="Succeeded", state=build_ended_state(0, json.dumps(said)))
    status = status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))
    assert status["message"].startswith("Trained")
    assert status["message"].endswith(". Training took 900 s on the CPU.")


def test_what_gives_no_event_is_looked_at_again_and_ever_more_seldom() -> None:
    raw = build_finetunejob()
    job = job_for(raw)

    def again(seconds: float, *pods: Json) -> float | None:
        return decide(world_of(raw, job, pods=pods), NOW + timedelta(seconds=seconds), SETTINGS).again_seconds

    assert [again(seconds, build_pod(job)) for seconds in (0, 0.5, 3, 30, 3600)] == [3.0, 2.5, 3.0, 15.0, 60.0]
    assert [again(seconds) for seconds in (0, 5, 3600)] == [3.0, 2.5, 60.0]
    assert again(0, build_pod(job, phase="Running", state=RUNNING)) is None


def test_what_preflight_says_is_latched_and_it_is_not_run_again() -> None:
    raw = build_finetunejob({"runPolicy": {"preflight": "Auto"}})
    said = json.dumps({"version": 1, "stage": "Preflight", "exitCode": 0, "reason": "Succeeded", "message": "Kernels were not checked."})
    job = preflight_for(raw, condition=COMPLETE)
    pod = build_pod(job, phase="Succeeded", state=build_ended_state(0, said))
    passed = raw | {"status": status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))}
    assert passed["status"]["preflight"] == {"passedAt": "2026-01-01T12:00:00Z", "message": "Kernels were not checked."}
    lost = decide(world_of(passed), NOW, SETTINGS)
    assert lost.actions[1] == CreateJob(build_job(read_subject(passed), SETTINGS))
    training = status_after(passed, decide(world_of(passed, job_for(passed), pods=(pod,)), NOW, SETTINGS))
    assert training["preflight"] == passed["status"]["preflight"]
    assert "attempts" not in training, "its pod is no attempt at training"


def test_a_preflight_that_is_stopped_leaves_no_attempt_at_training() -> None:
    raw = build_finetunejob({"runPolicy": {"preflight": "Auto"}})
    job = preflight_for(raw)
    filled = {"phase": "Failed", "reason": "Evicted", "message": 'Usage of EmptyDir volume "workspace" exceeds the limit "50Gi".'}
    pods = tuple(build_pod(job, name=f"pod-{index}", state=RUNNING, **filled) for index in range(EVICTED_LIMIT))
    plan = decide(world_of(raw, job, pods=pods), NOW, SETTINGS)
    ended = raw | {"status": status_after(raw, plan)}
    assert plan.actions[-1] == DeleteJob(job["metadata"]["name"], "preflight-uid")
    assert (ended["status"]["stage"], ended["status"]["completionTime"]) == ("Preflight", "2026-01-01T12:00:00Z")
    assert not {"attempts", "gpuSeconds", "preflight"} & set(ended["status"])
    assert decide(world_of(ended), NOW, SETTINGS) == Plan()


def test_what_preflight_refuses_ends_the_run_before_a_gpu_is_asked_for() -> None:
    raw = build_finetunejob({"runPolicy": {"preflight": "Auto"}})
    job = preflight_for(raw, condition=failed())
    said = json.dumps({"version": 1, "stage": "Preflight", "exitCode": 12, "reason": "AccessDenied", "message": "No such bucket."})
    pod = build_pod(job, phase="Failed", state=build_ended_state(12, said))
    ended = raw | {"status": status_after(raw, decide(world_of(raw, job, pods=(pod,)), NOW, SETTINGS))}
    assert (ended["status"]["phase"], ended["status"]["message"]) == ("Failed", "No such bucket.")
    assert kinds(decide(world_of(ended), NOW, SETTINGS)) == []


def test_a_training_that_has_begun_needs_no_preflight_any_more() -> None:
    raw = build_finetunejob({"runPolicy": {"preflight": "Auto"}})
    job = job_for(raw)
    running = world_of(raw, job, pods=(build_pod(job, phase="Running", state=RUNNING),))
    begun = raw | {"status": status_after(raw, decide(running, NOW, SETTINGS))}
    assert decide(world_of(begun), NOW, SETTINGS).actions[1] == CreateJob(build_job(read_subject(begun), SETTINGS))


def test_a_preflight_job_that_goes_after_its_ttl_disturbs_no_training() -> None:
    raw = build_finetunejob({"runPolicy": {"preflight": "Auto"}})
    job, preflight = job_for(raw), preflight_for(raw, condition=COMPLETE)
    preflight["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    pods = (build_pod(job, phase="Running", state=RUNNING),)
    assert status_after(raw, decide(world_of(raw, job, preflight, pods=pods), NOW, SETTINGS))["phase"] == "Running"
    waits = status_after(raw, decide(world_of(raw, preflight), NOW, SETTINGS))
    assert ready_reason(waits) == "Replacing"


def test_what_has_ended_is_read_once_more_when_it_was_edited() -> None:
    raw = latched()
    assert not must_be_read(world_of(raw))
    assert must_be_read(world_of(merged(raw, {"metadata": {"generation": 2}})))


@pytest.mark.parametrize(("phase", "read"), [("Failed", True), ("Pending", False)])
def test_a_run_that_the_trainer_refused_has_left_a_job_and_one_that_was_never_begun_has_not(phase: str, read: bool) -> None:
    """Both say InvalidSpec; the next run has to wait until what is left is gone."""
    raw = latched("Failed")
    stored = merged(raw["status"], {"phase": phase})
    stored["conditions"] = [item | {"reason": "InvalidSpec"} for item in stored["conditions"]]
    mended = merged(raw, {"metadata": {"generation": 2}, "spec": {"training": {"seed": 7}}}) | {"status": stored}
    assert must_be_read(world_of(mended)) == read


def test_a_pod_whose_job_has_yet_to_judge_its_end_costs_no_write() -> None:
    raw = build_finetunejob()
    running = build_pod(job_for(raw), phase="Running", state=RUNNING)
    raw |= {"status": status_after(raw, decide(world_of(raw, job_for(raw), pods=(running,)), NOW, SETTINGS))}
    for code, seconds, said in ((0, 15, "Running"), (16, 3, "Retrying")):
        pod = build_pod(job_for(raw), phase="Failed" if code else "Succeeded", state=build_ended_state(code))
        soon, later = (decide(world_of(raw, job_for(raw), pods=(pod,)), NOW + timedelta(seconds=at), SETTINGS) for at in (1, seconds))
        assert (soon.actions, soon.again_seconds) == ((), seconds - 1)
        assert ready_reason(status_after(raw, later)) == said


def test_a_pod_that_never_ran_and_is_being_stopped_keeps_saying_what_it_waits_for() -> None:
    raw = build_finetunejob()
    job, pod = job_for(raw), build_pod(job_for(raw), state={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})
    later = NOW + timedelta(seconds=10)
    raw |= {"status": status_after(raw, decide(world_of(raw, job, pods=(pod,)), later, SETTINGS))}
    pod["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:12Z"
    assert decide(world_of(raw, job, pods=(pod,)), later, SETTINGS).actions == ()
    assert ready_reason(raw["status"]) == "ImagePullFailed"


def test_a_new_job_is_looked_at_without_an_event() -> None:
    assert decide(world_of(build_finetunejob()), NOW, SETTINGS).again_seconds == 6.0


def test_a_pod_that_starts_soon_costs_no_write() -> None:
    raw = build_finetunejob()
    waiting = status_after(raw, decide(world_of(raw), NOW, SETTINGS))
    raw, job = build_finetunejob(status=waiting), job_for(raw)
    assert decide(world_of(raw, job, pods=(build_pod(job),)), NOW + timedelta(seconds=1), SETTINGS).actions == ()
    later = status_after(raw, decide(world_of(raw, job, pods=(build_pod(job),)), NOW + timedelta(seconds=3), SETTINGS))
    assert ready_reason(later) == "ContainerCreating"


def test_a_clock_that_is_behind_keeps_no_waiting_pod_from_saying_why() -> None:
    raw = build_finetunejob()
    raw, job = build_finetunejob(status=status_after(raw, decide(world_of(raw), NOW, SETTINGS))), job_for(raw)
    world, behind = world_of(raw, job, pods=(build_pod(job, state={"waiting": {"reason": "ContainerCreating"}}),)), NOW - timedelta(hours=1)
    plan = decide(world, behind, SETTINGS)
    assert unexplained(world, behind) == "pod-1-uid"
    assert (ready_reason(status_after(raw, plan)), plan.again_seconds) == ("ContainerCreating", 60.0)


def test_two_clocks_a_second_apart_cost_no_write() -> None:
    raw = build_finetunejob()
    raw, job = build_finetunejob(status=status_after(raw, decide(world_of(raw), NOW, SETTINGS))), job_for(raw)
    plan = decide(world_of(raw, job, pods=(build_pod(job),)), NOW - timedelta(seconds=1), SETTINGS)
    assert (plan.actions, plan.again_seconds) == ((), 4.0)


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (None, True),
        ({"phase": "Running", "observedGeneration": 1}, True),
        ({"phase": "Succeeded", "observedGeneration": 1}, False),
        ({"phase": "Failed", "observedGeneration": 0}, True),
    ],
)
def test_the_resync_takes_what_has_not_ended_or_was_edited(status: Json | None, expected: bool) -> None:
    assert is_unfinished(build_finetunejob(status=status)) is expected


@pytest.mark.parametrize(
    ("before", "after", "patch"),
    [
        ({}, {"a": 1}, {"a": 1}),
        ({"a": 1}, {}, {"a": None}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, {"a": {"c": None}}),
        ({"a": {"b": 1}}, {"a": {"b": 1}}, {}),
        ({"a": [1]}, {"a": [1, 2]}, {"a": [1, 2]}),
        ({"a": 1}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    ],
)
def test_a_merge_patch_makes_one_value_of_the_other(before: Json, after: Json, patch: Json) -> None:
    assert merge_patch(before, after) == patch
    assert merged(before, patch) == after

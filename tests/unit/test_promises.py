"""The audit that the fault tests are judged by: a history in which all went well breaks nothing, and each promise has a history that breaks it."""

from copy import deepcopy

from finetune_operator.desired import build_job
from finetune_operator.subject import read_subject
from support.api_client import Json
from support.promises import Change, broken_promises, state_after, wanted_job, wrong_at_rest
from support.simulated_cluster import SETTINGS, build_ended_state, build_finetunejob, build_pod, build_stored_job, merged

COMPLETE = {"type": "Complete"}
FAILED = {"type": "Failed"}
TTL = {"spec": {"ttlSecondsAfterFinished": 86400}}
LEAVING = {"metadata": {"deletionTimestamp": "2026-01-01T12:00:00Z"}}
EARLY, LATE = "2026-01-01T12:00:00Z", "2026-01-01T12:00:09Z"


def conditions(phase: str, generation: int, time: str) -> list[Json]:
    kinds = {"Succeeded": (("Ready", "True"),), "Failed": (("Ready", "False"), ("Stalled", "True"))}
    shown = kinds.get(phase, (("Ready", "False"), ("Reconciling", "True")))
    reason = {"Succeeded": "Succeeded", "Failed": "InvalidData"}.get(phase, "Running")
    return [
        {
            "type": kind,
            "status": status,
            "reason": reason,
            "message": "So it is.",
            "observedGeneration": generation,
            "lastTransitionTime": time,
        }
        for kind, status in shown
    ]


def told(resource: Json, phase: str, time: str = EARLY, **more: object) -> Json:
    """The FineTuneJob with a status of this phase for the run that its spec asks for."""
    generation, run = resource["metadata"]["generation"], read_subject(resource).run
    status = {"phase": phase, "message": "So it is.", "observedGeneration": generation, "run": run.wire(), "preflight": {"passedAt": EARLY}}
    return {**resource, "status": {**status, "conditions": conditions(phase, generation, time), **more}}


def job_of(resource: Json, uid: str = "job-1", condition: Json | None = None) -> Json:
    return build_stored_job(build_job(read_subject(resource), SETTINGS), uid, condition=condition)


def history(*steps: tuple[str, Json] | tuple[str, Json, str]) -> list[Change]:
    return [Change(number, step[0], deepcopy(step[1]), removed=len(step) == 3) for number, step in enumerate(steps, 1)]


LASTING = {"runPolicy": {"ttlSecondsAfterFinished": 86400, "preflight": "Auto"}}
TINY = build_finetunejob(LASTING)
EDITED = build_finetunejob({"lora": {"rank": 8}, **LASTING}, generation=2)
JOB = job_of(TINY)
POD = build_pod(JOB, phase="Running", state={"running": {}})
ENDED_POD = build_pod(JOB, phase="Succeeded", state=build_ended_state(0))
ATTEMPT = {"podUID": "pod-1-uid", "exitCode": 0}
GOOD = (
    ("finetunejobs", TINY),
    ("finetunejobs", told(TINY, "Pending")),
    ("jobs", JOB),
    ("pods", POD),
    ("finetunejobs", told(TINY, "Running")),
    ("pods", ENDED_POD),
    ("jobs", job_of(TINY, condition=COMPLETE)),
    ("finetunejobs", told(TINY, "Succeeded", LATE, attempts=[ATTEMPT])),
    ("jobs", merged(job_of(TINY, condition=COMPLETE), TTL)),
)


def test_a_run_in_which_all_goes_well_breaks_nothing() -> None:
    assert broken_promises(history(*GOOD)) == []
    assert wrong_at_rest(state_after(history(*GOOD))) == []


def test_an_edit_a_clean_up_and_a_deletion_break_nothing() -> None:
    second = job_of(EDITED, "job-2")
    steps = history(
        *GOOD[:5],
        ("finetunejobs", {**EDITED, "status": told(TINY, "Running")["status"]}),
        ("jobs", merged(JOB, LEAVING)),
        ("pods", POD, "gone"),
        ("jobs", JOB, "gone"),
        ("finetunejobs", told(EDITED, "Pending")),
        ("jobs", second),
        ("jobs", job_of(EDITED, "job-2", COMPLETE)),
        ("finetunejobs", told(EDITED, "Succeeded", LATE)),
        ("jobs", job_of(EDITED, "job-2", COMPLETE), "gone"),
        ("finetunejobs", EDITED, "gone"),
    )
    assert broken_promises(steps) == []
    assert wrong_at_rest(state_after(steps)) == []


def only_problem(*steps: tuple[str, Json] | tuple[str, Json, str]) -> str:
    (problem,) = broken_promises(history(*steps))
    return problem


def test_a_second_job_beside_one_at_work_is_seen_also_while_the_first_is_being_deleted() -> None:
    changed = ("finetunejobs", {**EDITED, "status": told(TINY, "Running")["status"]})
    second = ("jobs", job_of(EDITED, "job-2"))
    assert "DUPLICATE" in only_problem(*GOOD[:5], changed, second)
    assert "DUPLICATE" in only_problem(*GOOD[:5], changed, ("jobs", merged(JOB, LEAVING)), second)


def test_a_gpu_that_is_asked_for_unchecked_is_seen() -> None:
    status = {key: value for key, value in told(TINY, "Pending")["status"].items() if key != "preflight"}
    assert "UNCHECKED" in only_problem(("finetunejobs", {**TINY, "status": status}), ("jobs", JOB))


def test_two_trainers_at_work_are_seen() -> None:
    assert "DUPLICATE" in only_problem(*GOOD[:4], ("pods", build_pod(JOB, name="pod-2")))


def test_a_job_of_a_run_that_ended_is_seen() -> None:
    gone = ("jobs", merged(job_of(TINY, condition=COMPLETE), TTL), "gone")
    assert "RE-TRAINING: made although" in only_problem(*GOOD, gone, ("jobs", job_of(TINY, "job-2")))


def test_a_job_stopped_without_a_reason_is_seen() -> None:
    assert "RE-TRAINING: deleted at work" in only_problem(*GOOD[:5], ("jobs", merged(JOB, LEAVING)))
    assert "RE-TRAINING: deleted at work" in only_problem(*GOOD[:5], ("jobs", JOB, "gone"))


def test_an_end_that_is_cleaned_up_before_it_is_stored_is_seen() -> None:
    ended = job_of(TINY, condition=COMPLETE)
    assert "LOST: it has a TTL" in only_problem(*GOOD[:7], ("jobs", merged(ended, TTL)))
    assert "LOST: deleted before" in only_problem(*GOOD[:7], ("jobs", ended, "gone"))


def test_an_end_that_goes_back_is_seen() -> None:
    assert "went back from Succeeded to Running" in only_problem(*GOOD, ("finetunejobs", told(TINY, "Running", LATE)))


def test_an_end_that_is_not_true_is_seen() -> None:
    assert "has not ended" in only_problem(*GOOD[:5], ("finetunejobs", told(TINY, "Succeeded", LATE)))
    failed = ("jobs", job_of(TINY, condition=FAILED))
    assert "its Job has Failed" in only_problem(*GOOD[:5], failed, ("finetunejobs", told(TINY, "Succeeded", LATE)))


def test_a_transition_time_that_changes_without_the_status_is_seen() -> None:
    problems = broken_promises(history(*GOOD[:5], ("finetunejobs", told(TINY, "Running", LATE))))
    assert [problem.split(": ")[1] for problem in problems] == [
        "Ready stayed False, but its transition time changed",
        "Reconciling stayed True, but its transition time changed",
    ]


def test_a_status_against_kstatus_is_seen() -> None:
    status = told(TINY, "Running")["status"]
    broken = {**TINY, "status": {**status, "conditions": [*status["conditions"], conditions("Failed", 1, EARLY)[1]]}}
    assert any("never Reconciling and Stalled together" in item for item in broken_promises(history(("finetunejobs", broken))))


def at_rest(*steps: tuple[str, Json] | tuple[str, Json, str]) -> list[str]:
    return wrong_at_rest(state_after(history(*steps)))


def test_what_is_lost_or_stuck_at_rest_is_named() -> None:
    assert any("the phase is Running, but Succeeded is right" in item for item in at_rest(*GOOD[:7]))
    assert any("STUCK: it has no Job" in item for item in at_rest(*GOOD[:2]))
    assert any("has ended and not got its TTL" in item for item in at_rest(*GOOD[:8]))
    assert any("still being deleted" in item for item in at_rest(*GOOD, ("finetunejobs", merged(told(TINY, "Succeeded"), LEAVING))))
    assert any("no FineTuneJob asks for it" in item for item in at_rest(*GOOD, ("finetunejobs", TINY, "gone")))
    assert any("attempts say nothing" in item for item in at_rest(*GOOD[:7], ("finetunejobs", told(TINY, "Succeeded", LATE))))


def test_a_status_of_another_run_or_generation_is_named() -> None:
    problems = at_rest(*GOOD, ("finetunejobs", {**EDITED, "status": told(TINY, "Succeeded")["status"]}))
    assert any("generation 1 of 2" in item for item in problems)
    assert any(f"the spec of {wanted_job(EDITED)}" in item for item in problems)

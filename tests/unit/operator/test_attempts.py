"""attempts.py: the pods of a run as a bounded list, and GPU time that is never counted twice."""

from datetime import timedelta

from finetune_api.status import Attempt
from finetune_operator.attempts import KEPT, added_gpu_seconds, merge_attempts
from finetune_operator.desired import build_job
from finetune_operator.subject import Json, Subject, read_subject
from support.simulated_cluster import NOW, SETTINGS, build_ended_state, build_finetunejob, build_pod, build_stored_job, written

SUBJECT = read_subject(build_finetunejob())
assert isinstance(SUBJECT, Subject)
JOB = build_stored_job(build_job(SUBJECT, SETTINGS))


def pod(number: int, code: int | None = 16) -> Json:
    """A pod that ran for a minute, an hour after the one before; without a code it runs still."""
    now = NOW + timedelta(hours=number)
    running = {"running": {"startedAt": written(now - timedelta(minutes=1))}}
    state = running if code is None else build_ended_state(code, now=now)
    return build_pod(JOB, name=f"pod-{number:02}", phase="Running" if code is None else "Failed", state=state, now=now)


def merge(stored: tuple[Attempt, ...], *pods: Json) -> tuple[Attempt, ...]:
    return merge_attempts(stored, pods, SUBJECT.spec)


def test_a_pod_that_never_started_is_no_attempt() -> None:
    assert merge((), build_pod(JOB)) == ()


def test_a_running_pod_is_an_attempt_without_an_end() -> None:
    (attempt,) = merge((), pod(0, None))
    assert (attempt.pod_uid, attempt.start, attempt.end) == ("pod-00-uid", "2026-01-01T11:59:00Z", None)


def test_an_ended_pod_is_an_attempt_with_its_exit_code_and_reason() -> None:
    (attempt,) = merge((), pod(0, 16))
    assert (attempt.end, attempt.exit_code, attempt.reason) == ("2026-01-01T12:00:00Z", 16, "InfrastructureError")


def test_a_container_that_could_not_be_started_has_no_start_and_took_no_time() -> None:
    failed = pod(0, 128)
    failed["status"]["containerStatuses"][0]["state"]["terminated"]["startedAt"] = "1970-01-01T00:00:00Z"
    (attempt,) = merge((), failed)
    assert (attempt.start, attempt.end) == (None, "2026-01-01T12:00:00Z")
    assert added_gpu_seconds((), (attempt,), 1) == 0


def test_the_end_of_a_known_pod_is_filled_in() -> None:
    running = merge((), pod(0, None))
    (attempt,) = merge(running, pod(0, 0))
    assert attempt.end == "2026-01-01T12:00:00Z"


def test_what_is_known_of_a_pod_that_is_gone_stays() -> None:
    first = merge((), pod(0))
    assert merge(first, pod(1, None))[0] == first[0]


def test_the_last_10_are_kept_oldest_first() -> None:
    attempts = merge((), *(pod(number) for number in reversed(range(14))))
    assert [attempt.pod_uid for attempt in attempts] == [f"pod-{number:02}-uid" for number in range(14 - KEPT, 14)]


def test_gpu_seconds_are_counted_once_a_pod() -> None:
    first = merge((), pod(0), pod(1, None))
    assert added_gpu_seconds((), first, 1) == 60
    second = merge(first, pod(0), pod(1))
    assert added_gpu_seconds(first, second, 1) == 60
    assert added_gpu_seconds(second, merge(second, pod(0), pod(1)), 1) == 0


def test_a_pod_that_fell_off_the_list_is_not_counted_again() -> None:
    pods = [pod(number) for number in range(14)]
    stored = merge((), *pods)
    assert added_gpu_seconds(stored, merge(stored, *pods), 1) == 0


def test_a_run_without_a_gpu_took_no_gpu_seconds() -> None:
    assert added_gpu_seconds((), merge((), pod(0)), 0) == 0


def test_a_clock_that_ran_backwards_takes_nothing_away() -> None:
    backwards = Attempt(pod_uid="x", start="2026-01-01T12:00:00Z", end="2026-01-01T11:00:00Z")
    assert added_gpu_seconds((), (backwards,), 1) == 0


def test_a_pod_that_was_disrupted_before_it_began_is_no_attempt() -> None:
    unknown = {"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown", "startedAt": None, "finishedAt": None}}
    disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    assert merge((), build_pod(JOB, phase="Failed", state=unknown, conditions=(disrupted,))) == ()


def test_an_evicted_pod_whose_container_is_not_told_of_yet_keeps_its_start_and_has_its_reason() -> None:
    begun = merge((), build_pod(JOB, phase="Running", state={"running": {"startedAt": "2026-01-01T11:59:00Z"}}))
    (evicted,) = merge(begun, build_pod(JOB, phase="Failed", reason="Evicted"))
    assert (evicted.start, evicted.end, evicted.reason) == ("2026-01-01T11:59:00Z", None, "Evicted")
    (over,) = merge((evicted,), build_pod(JOB, phase="Failed", state=build_ended_state(137), reason="Evicted"))
    assert (over.end, over.exit_code, over.reason) == ("2026-01-01T12:00:00Z", 137, "Evicted")

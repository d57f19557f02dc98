"""work_queue.py under a clock that only the test moves."""

import asyncio

import pytest
from finetune_operator.subject import Key
from finetune_operator.work_queue import FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS, WorkQueue
from hypothesis import given, settings
from hypothesis import strategies as st

A, B = Key("ml", "a"), Key("ml", "b")


class Clock:
    """Time that stands still."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue:
    return WorkQueue(clock, jitter=lambda: 1.0)


def test_a_key_that_is_added_often_is_taken_once(queue: WorkQueue) -> None:
    for _ in range(5):
        queue.add(A)
    assert len(queue) == 1
    assert queue.poll() == (A, None)
    assert queue.poll() == (None, None)


def test_no_two_workers_have_one_key(queue: WorkQueue) -> None:
    queue.add(A)
    assert queue.poll() == (A, None)
    queue.add(A)
    assert queue.poll() == (None, None)


def test_a_key_is_wanted_until_it_is_taken_and_when_it_is_added_during_the_work(queue: WorkQueue) -> None:
    queue.add(A)
    assert A in queue
    queue.poll()
    assert A not in queue
    queue.add(A)
    assert A in queue


def test_an_outdated_wish_for_the_same_moment_gives_no_second_worker_the_key(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A, 5.0)
    queue.add(A)
    queue.poll()
    queue.add(A, 5.0)
    clock.now += 5.0
    assert queue.poll() == (None, None)


def test_an_urgent_key_comes_before_those_that_wait(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A)
    clock.now += 29
    queue.add(B, urgent=True)
    assert queue.waiting_seconds() == [29, 0.0]
    assert queue.poll() == (B, None)
    assert queue.poll() == (A, None)


def test_others_have_their_turn_however_many_urgent_keys_there_are(queue: WorkQueue) -> None:
    for index in range(40):
        queue.add(Key("ml", f"new-{index:02}"), urgent=True)
        queue.add(Key("ml", f"old-{index:02}"))
    taken = "".join(str(queue.poll()[0]).partition("/")[2][0] for _ in range(80))
    assert taken == ("n" * 15 + "o") * 2 + "n" * 10 + "o" * 38


async def test_a_queue_for_urgent_keys_alone_keeps_the_others_until_all_are_taken(clock: Clock) -> None:
    queue = WorkQueue(clock, only_urgent=True)
    queue.add(A)
    assert queue.poll() == (None, None)
    taken = asyncio.create_task(queue.take())
    queue.add(B, urgent=True)
    assert await taken == B
    queue.done(B, again_seconds=0.0)
    assert queue.poll() == (None, None)
    taken = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.open_slow_lane()
    assert {await taken, queue.poll()[0]} == {A, B}


def test_what_was_added_during_the_work_comes_after_it(queue: WorkQueue) -> None:
    queue.add(A)
    queue.poll()
    queue.add(A)
    queue.done(A)
    assert queue.poll() == (A, None)


def test_a_key_that_nothing_asks_for_again_is_done(queue: WorkQueue) -> None:
    queue.add(A)
    queue.poll()
    queue.done(A)
    assert queue.poll() == (None, None)
    assert len(queue) == 0


def test_a_delayed_key_waits_for_its_time(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A, 5.0)
    assert queue.poll() == (None, 5.0)
    clock.now += 4.0
    assert queue.poll() == (None, 1.0)
    clock.now += 1.0
    assert queue.poll() == (A, None)


def test_an_event_makes_a_delayed_key_due_at_once(queue: WorkQueue) -> None:
    queue.add(A, 60.0)
    queue.add(A)
    assert queue.poll() == (A, None)
    assert queue.poll() == (None, None)


def test_a_later_wish_never_delays_a_key_that_is_due(queue: WorkQueue) -> None:
    queue.add(A)
    queue.add(A, 60.0)
    assert queue.poll() == (A, None)


def test_another_look_comes_after_its_delay(queue: WorkQueue, clock: Clock) -> None:
    queue.add(A)
    queue.poll()
    queue.done(A, 2.0)
    assert queue.poll() == (None, 2.0)
    clock.now += 2.0
    assert queue.poll() == (A, None)


def test_the_backoff_doubles_to_its_limit(queue: WorkQueue, clock: Clock) -> None:
    delays = []
    for _ in range(12):
        queue.add(A)
        queue.poll()
        delays.append(queue.retry(A))
        clock.now += delays[-1]
        queue.poll()
        queue._release(A)
    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == LAST_BACKOFF_SECONDS


def test_the_backoff_begins_anew_after_a_success(queue: WorkQueue) -> None:
    for _ in range(3):
        queue.add(A)
        queue.poll()
        queue.retry(A)
    queue.add(A)
    queue.poll()
    queue.done(A)
    queue.add(A)
    queue.poll()
    assert queue.retry(A) == FIRST_BACKOFF_SECONDS


@settings(derandomize=True)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 40))
def test_jitter_keeps_a_backoff_between_half_and_whole(jitter: float, failures: int) -> None:
    jittered, whole = WorkQueue(Clock(), lambda: jitter), WorkQueue(Clock(), lambda: 1.0)
    for _ in range(failures):
        jittered.retry(A)
        whole.retry(A)
    limit = whole.retry(A)
    assert limit / 2 <= jittered.retry(A) <= limit <= LAST_BACKOFF_SECONDS


def test_an_event_during_a_failing_pass_does_not_skip_the_backoff(queue: WorkQueue) -> None:
    queue.add(A)
    queue.poll()
    queue.add(A)
    queue.retry(A)
    assert queue.poll() == (None, FIRST_BACKOFF_SECONDS)


def test_an_event_after_a_failure_ends_the_wait(queue: WorkQueue) -> None:
    queue.add(A)
    queue.poll()
    queue.retry(A)
    queue.add(A)
    assert queue.poll() == (A, None)


def test_a_failing_key_does_not_stop_others(queue: WorkQueue) -> None:
    queue.add(A)
    queue.poll()
    queue.retry(A)
    queue.add(B)
    assert queue.poll() == (B, None)


def test_keys_come_in_the_order_in_which_they_are_due(queue: WorkQueue, clock: Clock) -> None:
    queue.add(B, 1.0)
    queue.add(A, 2.0)
    clock.now += 3.0
    assert [queue.poll()[0], queue.poll()[0]] == [B, A]


async def test_a_worker_that_waits_takes_a_key_as_soon_as_it_comes(queue: WorkQueue) -> None:
    worker = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    queue.add(A)
    assert await worker == A


async def test_two_workers_that_wait_share_two_keys(queue: WorkQueue) -> None:
    workers = [asyncio.create_task(queue.take()) for _ in range(2)]
    await asyncio.sleep(0)
    queue.add(A)
    queue.add(B)
    assert set(await asyncio.gather(*workers)) == {A, B}


async def test_a_worker_wakes_up_when_another_finishes_a_key_that_was_added_meanwhile(queue: WorkQueue) -> None:
    queue.add(A)
    assert await queue.take() == A
    worker = asyncio.create_task(queue.take())
    queue.add(A)
    await asyncio.sleep(0)
    assert not worker.done()
    queue.done(A)
    assert await worker == A

"""work_queue.py under any order of calls: hypothesis plays events, workers and the clock, beside a model of what the queue promises.

The promises: never two workers on one key; one pending entry a key; an added key is never lost; a failing key never delays another; a bounded backoff;
of sixteen turns, urgent keys have fifteen where others wait too.
"""

import asyncio
from typing import Any

from finetune_operator.subject import Key
from finetune_operator.work_queue import FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS, URGENT_TURNS, WorkQueue
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

KEYS = st.sampled_from([Key("ml", name) for name in "abc"])
# Quarters are exact in binary, so that the model's sums are the queue's.
SECONDS = st.sampled_from([0.25, 1.0, 30.0, 90.0])
JITTERS = st.sampled_from([0.0, 0.25, 0.5, 0.75])
STEPS = settings(max_examples=100, stateful_step_count=50, derandomize=True, database=None)


class _Calls(RuleBasedStateMachine):
    """Everything but how keys are taken.

    Attributes:
        due: the model: when each pending key is due.
        urgent: the pending keys that were added as such.
        turns: how many of them were taken since one of the others was.
        held: the keys that a worker has.
        failures: how often each key has failed in a row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.jitter = 0.0
        self.queue = WorkQueue(lambda: self.now, lambda: self.jitter)
        self.due: dict[Key, float] = {}
        self.urgent: set[Key] = set()
        self.turns = 0
        self.held: set[Key] = set()
        self.failures: dict[Key, int] = {}

    def settle(self) -> None:
        """What comes after every call."""

    def expect(self, key: Key, due: float, *, urgent: bool = False) -> None:
        if key in self.due and self.due[key] <= due:
            return
        self.due[key] = due
        (self.urgent.add if urgent and key not in self.held else self.urgent.discard)(key)

    @initialize(key=KEYS, failures=st.integers(0, 9))
    def a_key_has_failed_before(self, key: Key, failures: int) -> None:
        for _ in range(failures):
            self.queue.add(key)
            assert self.queue.poll() == (key, None)
            self.due[key] = self.now + self.queue.retry(key)
        self.failures[key] = failures
        self.settle()

    @rule(key=KEYS)
    def an_event_names_a_key(self, key: Key) -> None:
        self.queue.add(key)
        self.expect(key, self.now)
        self.settle()

    @rule(key=KEYS)
    def a_key_is_new(self, key: Key) -> None:
        self.queue.add(key, urgent=True)
        self.expect(key, self.now, urgent=True)
        self.settle()

    @rule(key=KEYS, seconds=SECONDS)
    def a_key_is_wanted_later(self, key: Key, seconds: float) -> None:
        self.queue.add(key, seconds)
        self.expect(key, self.now + seconds)
        self.settle()

    @rule(seconds=SECONDS)
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.settle()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), again=st.none() | SECONDS)
    def a_pass_succeeds(self, data: st.DataObject, again: float | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        self.queue.done(key, again)
        self.release(key)
        self.failures.pop(key, None)
        if again is not None:
            self.expect(key, self.now + again)
        self.settle()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), jitter=JITTERS)
    def a_pass_fails(self, data: st.DataObject, jitter: float) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        self.jitter = jitter
        backoff = self.queue.retry(key)
        self.release(key)
        whole = min(FIRST_BACKOFF_SECONDS * 2 ** self.failures.get(key, 0), LAST_BACKOFF_SECONDS)
        assert whole / 2 <= backoff <= whole
        self.failures[key] = self.failures.get(key, 0) + 1
        self.due[key] = self.now + backoff  # of this key alone; also when an event named it during the pass
        self.settle()

    def take(self, key: Key) -> None:
        """A worker got this key."""
        assert key not in self.held, "two workers on one key"
        assert self.due.pop(key) <= self.now, "before its time"
        self.turns = self.turns + 1 if key in self.urgent else 0
        self.urgent.discard(key)
        self.held.add(key)

    def release(self, key: Key) -> None:
        self.held.remove(key)

    @property
    def free(self) -> list[tuple[float, Key]]:
        """Pending keys that no worker has, in the order in which they are due."""
        return sorted((due, key) for key, due in self.due.items() if key not in self.held)

    @property
    def next(self) -> Key | None:
        """Whose turn it is now."""
        ready = [key for due, key in self.free if due <= self.now]
        urgent = [key for key in ready if key in self.urgent]
        others = [key for key in ready if key not in self.urgent]
        first, second = (urgent, others) if self.turns < URGENT_TURNS else (others, urgent)
        return next(iter([*first, *second]), None)

    @invariant()
    def each_pending_key_stands_once(self) -> None:
        assert len(self.queue) == len(self.due)

    @invariant()
    def each_key_has_waited_since_it_was_due(self) -> None:
        assert sorted(self.queue.waiting_seconds()) == sorted(self.now - due for due in self.due.values() if due <= self.now)

    def teardown(self) -> None:
        """Whatever happened: when all goes well from now on, every key that is pending is worked on, once."""
        for key in sorted(self.held):
            self.queue.done(key)
        self.now += 100.0
        for _ in range(len(self.due)):
            key, _ = self.queue.poll()
            assert key is not None, f"lost: {', '.join(map(str, self.due))}"
            del self.due[key]
        assert self.queue.poll() == (None, None)


class Polled(_Calls):
    """Workers that ask whenever they like."""

    @rule()
    def a_worker_asks(self) -> None:
        free, expected = self.free, self.next
        key, wait_seconds = self.queue.poll()
        if expected is not None:
            assert (key, wait_seconds) == (expected, None)
            self.take(expected)
        else:
            assert key is None
            assert wait_seconds == (free[0][0] - self.now if free else None)


class _Loop(asyncio.SelectorEventLoop):
    """An event loop in the machine's time."""

    def __init__(self, machine: _Calls) -> None:
        self._machine = machine
        super().__init__()

    def time(self) -> float:
        return self._machine.now


class Taken(_Calls):
    """Two workers that wait in take(), on an event loop whose time the machine moves."""

    WORKERS = 2
    ROUNDS = 12  # more rounds of the loop than any chain of wake-ups has

    def __init__(self) -> None:
        super().__init__()
        self.loop: Any = _Loop(self)
        self.waiting: set[asyncio.Task[Key]] = set()
        self.settle()

    def settle(self) -> None:
        while len(self.waiting) + len(self.held) < self.WORKERS:
            self.waiting.add(self.loop.create_task(self.queue.take()))
        self.turn()
        for task in [task for task in self.waiting if task.done()]:
            self.waiting.remove(task)
            self.take(task.result())

    def turn(self) -> None:
        """Lets the loop run until everybody waits."""
        for _ in range(self.ROUNDS):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    @invariant()
    def no_key_that_is_due_waits_while_a_worker_does(self) -> None:
        assert not self.waiting or not self.free or self.free[0][0] > self.now

    def teardown(self) -> None:
        for task in self.waiting:
            task.cancel()
        self.turn()
        self.loop.close()
        super().teardown()


def test_the_queue_keeps_its_promises_to_workers_that_ask() -> None:
    run_state_machine_as_test(Polled, settings=STEPS)


def test_the_queue_wakes_workers_that_wait_for_every_key_in_time() -> None:
    run_state_machine_as_test(Taken, settings=STEPS)

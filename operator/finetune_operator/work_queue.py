"""Which job is looked at next: one pending entry a key, a delay or a jittered backoff before it, more turns for new ones, never two workers on one key.

events.py and the resync add keys, the workers of reconcile.py take them. Time comes from outside, so tests need no waiting.
"""

import asyncio
import heapq
import random
from collections.abc import Callable

from finetune_operator.subject import Key

FIRST_BACKOFF_SECONDS = 0.5
LAST_BACKOFF_SECONDS = 60.0
URGENT_TURNS = 15  # of sixteen, where others wait too: a flood of new jobs gets its Jobs first, and leaves the others a turn


class WorkQueue:
    """Keys and when each is due.

    Args:
        clock: gives seconds.
        jitter: gives a number between 0 and 1.
        only_urgent: keys that are not urgent wait for open_slow_lane().
    """

    def __init__(self, clock: Callable[[], float], jitter: Callable[[], float] = random.random, *, only_urgent: bool = False) -> None:
        self._clock = clock
        self._jitter = jitter
        self._only_urgent = only_urgent
        self._due: dict[Key, float] = {}
        self._lanes: dict[bool, list[tuple[float, Key]]] = {True: [], False: []}  # heaps by when a key is due, of urgent ones and of others
        self._turns = 0  # that urgent keys have had since one of the others had one
        self._active: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: Key) -> bool:
        """Whether another look at a key is wanted."""
        return key in self._due

    def add(self, key: Key, delay_seconds: float = 0.0, *, urgent: bool = False) -> None:
        """Makes a key due after the delay, or earlier when it already is; an urgent one has nearly every turn."""
        due = self._clock() + delay_seconds
        if key in self._due and self._due[key] <= due:
            return
        self._due[key] = due
        if key not in self._active:
            heapq.heappush(self._lanes[urgent], (due, key))
            self._changed.set()

    def poll(self) -> tuple[Key | None, float | None]:
        """Takes a key that is due; it counts as being worked on.

        Returns:
            (key, None), or (None, seconds until a key is due; None when nothing waits).
        """
        now = self._clock()
        lanes = [True] if self._only_urgent else list(self._lanes)
        fronts = {urgent: due for urgent in lanes if (due := self._front(urgent)) is not None}
        ready = [urgent for urgent, due in fronts.items() if due <= now]
        if not ready:
            return None, min(fronts.values()) - now if fronts else None
        urgent = ready[0] if len(ready) == 1 else self._turns < URGENT_TURNS
        self._turns = self._turns + 1 if urgent else 0
        _, key = heapq.heappop(self._lanes[urgent])
        del self._due[key]
        self._active.add(key)
        return key, None

    def _front(self, urgent: bool) -> float | None:
        """When the first key of a lane is due; None for an empty one. Entries are dropped whose key is being worked on or is due at another time."""
        lane = self._lanes[urgent]
        while lane and (lane[0][1] in self._active or self._due.get(lane[0][1]) != lane[0][0]):
            heapq.heappop(lane)
        return lane[0][0] if lane else None

    def open_slow_lane(self) -> None:
        """From now on keys that are not urgent are taken too."""
        self._only_urgent = False
        self._changed.set()

    def waiting_seconds(self) -> list[float]:
        """How long each key that is due has waited for a worker."""
        now = self._clock()
        return [now - due for due in self._due.values() if due <= now]

    async def take(self) -> Key:
        """Waits for a key that is due, and takes it."""
        while True:
            key, wait_seconds = self.poll()
            if key is not None:
                self._changed.set()
                return key
            self._changed.clear()
            try:
                async with asyncio.timeout(wait_seconds):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def done(self, key: Key, again_seconds: float | None = None) -> None:
        """Ends the work on a key; `again_seconds` asks for another look."""
        self._failures.pop(key, None)
        self._release(key)
        if again_seconds is not None:
            self.add(key, again_seconds)

    def retry(self, key: Key) -> float:
        """Ends failed work on a key, which comes back after a backoff or when an event names it. Returns the backoff in seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        backoff_seconds = min(FIRST_BACKOFF_SECONDS * 2.0 ** min(failures, 10), LAST_BACKOFF_SECONDS) * (0.5 + self._jitter() / 2)
        self._due.pop(key, None)
        self._release(key)
        self.add(key, backoff_seconds)
        return backoff_seconds

    def _release(self, key: Key) -> None:
        self._active.discard(key)
        if key in self._due:
            heapq.heappush(self._lanes[False], (self._due[key], key))
            self._changed.set()

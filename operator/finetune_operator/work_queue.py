"""A queue of keys: one pending entry a key, one worker a key at a time, jittered exponential backoff. Knows nothing of Kubernetes.

Events and timers put keys in; reconcile.py takes them out. A key that is put in while it is worked on is worked on once more.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

_FIRST_BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF_SECONDS = 60.0


def backoff_seconds(failures: int, jitter: float) -> float:
    """Seconds to wait after so many failures in a row.

    Args:
        failures: 1 or more.
        jitter: 0 to 1; half of the wait is spread by it, so that keys that failed together don't come back together.
    """
    full = min(_LONGEST_BACKOFF_SECONDS, _FIRST_BACKOFF_SECONDS * 2.0 ** min(failures - 1, 16))
    return full * (0.5 + 0.5 * jitter)


class WorkQueue(Generic[Key]):
    """Keys that wait, keys that are worked on, and keys that come back later."""

    def __init__(self) -> None:
        self._ready: asyncio.Queue[Key] = asyncio.Queue()
        self._waiting: set[Key] = set()
        self._working: set[Key] = set()
        self._again: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}

    def add(self, key: Key) -> None:
        """The key is to be looked at as soon as a worker is free."""
        if key in self._working:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_later(self, key: Key, seconds: float) -> None:
        """The key is to be looked at after a while; an earlier appointment is kept."""
        loop = asyncio.get_running_loop()
        known = self._timers.get(key)
        if known is not None and not known.cancelled() and known.when() <= loop.time() + seconds:
            return
        if known is not None:
            known.cancel()
        self._timers[key] = loop.call_later(seconds, self._due, key)

    async def work(self, handle: Callable[[Key], Awaitable[None]], on_error: Callable[[Key, Exception], None]) -> None:
        """Takes keys for ever; a key whose handling raises comes back after its backoff, and never stops the others."""
        while True:
            key = await self._ready.get()
            self._waiting.discard(key)
            self._working.add(key)
            try:
                await handle(key)
                self._failures.pop(key, None)
            except Exception as error:  # noqa: BLE001 whatever one object does, the next one is handled
                on_error(key, error)
                self._failures[key] = self._failures.get(key, 0) + 1
                self.add_later(key, backoff_seconds(self._failures[key], random.random()))  # noqa: S311 jitter, not a secret
            finally:
                self._working.discard(key)
                if key in self._again:
                    self._again.discard(key)
                    self.add(key)

    def _due(self, key: Key) -> None:
        self._timers.pop(key, None)
        self.add(key)

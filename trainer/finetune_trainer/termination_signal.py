"""SIGTERM: how Kubernetes says that a pod must go. Outside of training it stops the run at once; training finishes its step first.

Used by cli.py and reporting/session.py (`stopping_at_once`), stages/train.py, phases.py and pipeline.py. Only the main thread of a process can take signals; elsewhere
both do nothing.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """SIGTERM came. No library's `except Exception` may swallow it; the pipeline turns it into errors.Checkpointed."""


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Raises Terminated wherever the block is when the signal comes."""

    def stop(*_: Any) -> None:
        raise Terminated

    with _handling(stop):
        yield


@contextmanager
def stopping_later(remember: Callable[[], None]) -> Iterator[None]:
    """Calls `remember` when the signal comes, and goes on."""
    with _handling(lambda *_: remember()):
        yield


@contextmanager
def _handling(handler: Callable[..., None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

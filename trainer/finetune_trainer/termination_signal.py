"""SIGTERM: how Kubernetes says that a pod must go. Outside of training it stops the run at once; training finishes its step first, for Ctrl-C (SIGINT), too.

Used by cli.py and reporting/session.py (`stopping_at_once`), stages/train.py, phases.py and pipeline.py. Only the main thread of a process can take signals; elsewhere
both do nothing.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any


class Terminated(BaseException):
    """SIGTERM came. No library's `except Exception` may swallow it; the pipeline turns it into errors.Checkpointed."""


@contextmanager
def stopping_at_once(*, for_interrupts: bool = False) -> Iterator[None]:
    """Raises Terminated wherever the block is when the signal comes, or with `for_interrupts` Ctrl-C."""

    def stop(*_: Any) -> None:
        raise Terminated

    with _handling(signal.SIGTERM, stop), _handling(signal.SIGINT, stop) if for_interrupts else nullcontext():
        yield


@contextmanager
def stopping_later(remember: Callable[[], None]) -> Iterator[None]:
    """Calls `remember` when the signal comes, or Ctrl-C, and goes on; a second Ctrl-C is a KeyboardInterrupt."""

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        remember()

    with _handling(signal.SIGTERM, lambda *_: remember()), _handling(signal.SIGINT, interrupt):
        yield


def nothing_left_to_stop() -> None:
    """From now on the signal does nothing, until the process ends: what it was started for is done."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _done)


def _done(*_: Any) -> None:
    """A handler of its own: an ignored signal would be ignored by every program that is started, too."""


@contextmanager
def _handling(number: signal.Signals, handler: Callable[..., None]) -> Iterator[None]:
    ignored = signal.getsignal(number) is signal.SIG_IGN  # as a shell has it for what a script starts in the background
    if ignored or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        if signal.getsignal(number) is not _done:
            signal.signal(number, before)

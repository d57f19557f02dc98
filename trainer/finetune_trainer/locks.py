"""Locks between processes, and folders that one process makes for all.

No marker ever stands in place of a lock: nobody would remove that of a killed pod. Where a file system knows no locks, all are let through, and what they do
there must harm nobody. Used by pipeline.py for the working directory and by sources/ for the cache.
"""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout


def take(path: Path, *, timeout_seconds: float) -> FileLock:
    """The lock, to be released by the caller; `is_locked` is false where the file system knows no locks. It ends with its process.

    Args:
        timeout_seconds: to wait for another process; negative to wait for its end.

    Raises:
        Timeout: another process has it.
    """
    lock = FileLock(path, timeout=timeout_seconds, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise
    except (OSError, NotImplementedError):  # which one depends on the file system; one that is full or read-only shows with the first file
        pass
    return lock


def make_once(target: Path, make: Callable[[Path], None], note: Callable[[str], None]) -> Path:
    """The folder `target`: made beside it and renamed, by one process while others wait; without locks by each, and the first one's stays.

    Args:
        make: fills a folder, which is there if an attempt before this one was broken off in it.
        note: is told that another process is waited for.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = _take_or_wait(target, note)
    try:
        if not target.is_dir():
            _make(target, make, alone=lock.is_locked)
    finally:
        lock.release()
    return target


def _take_or_wait(target: Path, note: Callable[[str], None]) -> FileLock:
    path = target.with_name(f"{target.name}.lock")
    try:
        return take(path, timeout_seconds=0)
    except Timeout:
        note(f"Waiting for another process, which is making {target}.")
        return take(path, timeout_seconds=-1)


def _make(target: Path, make: Callable[[Path], None], *, alone: bool) -> None:
    # Not the process's number: every pod's is 1, and pods on the host's network share its name.
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    if alone:
        _take_over(target, partial)
    try:
        make(partial)
        _put_in_place(partial, target)
    finally:
        if not alone:  # nobody could tell later whether it is still being written
            shutil.rmtree(partial, ignore_errors=True)


def _take_over(target: Path, partial: Path) -> None:
    """What is left here under the lock is of a process that is gone: one is gone on with, of any more the room is given back."""
    for left in target.parent.glob(f".{target.name}.*.partial"):
        if partial.exists():
            shutil.rmtree(left)
        else:
            left.rename(partial)


def _put_in_place(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(partial)  # another process was first, where there are no locks

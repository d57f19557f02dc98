"""Writes folders and files so that a reader, or a restart after a kill, sees all of them or nothing.

Used wherever something is written that a later run could take for a result. Knows nothing of what it writes.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; on success its files are synced and it takes `target`'s place. Nothing else of it stays, whatever the block raises."""
    partial, older = _asides(target)
    remove_leftovers(target)  # first: a model that a kill left here would take the room of the new one
    partial.mkdir(parents=True)
    try:
        yield partial
        sync_tree(partial)
        if target.exists():
            target.rename(older)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(older, ignore_errors=True)
    sync(target.parent)


def remove_leftovers(target: Path) -> None:
    """Removes what an attempt to write this folder that was killed has left beside it."""
    for aside in _asides(target):
        shutil.rmtree(aside, ignore_errors=True)


def _asides(target: Path) -> tuple[Path, Path]:
    """Where a folder is written, and where the older one lies while it is replaced."""
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.replaced")


def write_text(target: Path, text: str) -> None:
    """Replaces a file's content in one step; on return it is on the disk under its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(target)
    sync(target.parent)


def sync_tree(folder: Path) -> None:
    """Has every file below a folder, and every list of names, written to the disk."""
    for path in folder.rglob("*"):
        if path.is_file() or path.is_dir():
            sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Has a file's content, or a folder's list of names, written to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

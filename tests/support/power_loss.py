"""What a loss of power would leave: records what was written to the disk (fsync), and which name was given when. Used by tests of what must not be lost."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Disk:
    """The order of things since the recording began.

    Attributes:
        events: ("sync", path) and ("rename", new path).
        unsynced: for each new path, what would not be whole behind it: of a folder all that lies below and itself, of a file all files beside and below.
    """

    events: list[tuple[str, Path]] = field(default_factory=list)
    unsynced: dict[Path, set[Path]] = field(default_factory=dict)
    _synced: dict[Path, str] = field(default_factory=dict)

    def note_sync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        self._synced[path] = _state(path)
        self.events.append(("sync", path))

    def note_rename(self, old: Path, new: Path) -> None:
        found = {old, *old.rglob("*")} if old.is_dir() else {path for path in old.parent.rglob("*") if path.is_file()}
        self.unsynced[new] = {path for path in found if self._synced.get(path) != _state(path)}
        self._synced = {new / path.relative_to(old) if path.is_relative_to(old) else path: state for path, state in self._synced.items()}
        self.events.append(("rename", new))

    def kept_since(self, new: Path) -> set[Path]:
        """Whose lists of names (or content) were written to the disk after a path was given."""
        last = max(index for index, event in enumerate(self.events) if event == ("rename", new))
        return {path for what, path in self.events[last:] if what == "sync"}


@contextmanager
def recorded_disk() -> Iterator[Disk]:
    """Records this process within the block."""
    disk, sync = Disk(), os.fsync

    def fsync(handle: int) -> None:
        sync(handle)
        disk.note_sync(handle)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for name in ("rename", "replace"):
            patch.setattr(os, name, _noted(disk, getattr(os, name)))
        yield disk


def _noted(disk: Disk, give_name: object) -> object:
    def noted(old: str | Path, new: str | Path, **named: int) -> None:
        disk.note_rename(Path(old), Path(new))
        give_name(old, new, **named)  # type: ignore[operator]

    return noted


def _state(path: Path) -> str:
    """A folder's names, or a file's content."""
    return ", ".join(sorted(os.listdir(path))) if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

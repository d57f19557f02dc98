"""Checkpoints: complete or ignored. A checkpoint counts only with its seal, which is written last and names every file's digest.

transformers writes the files (adapter, optimizer, schedule, sampler position, RNG); phases.py seals them, stages/train.py asks for the newest.
It writes them in place, and that is as good as aside and renamed: all of them are on the disk before the seal, and the seal itself is written aside, synced
and renamed. A kill or a loss of power at any moment leaves a folder with its seal and every byte, or one without a seal that nobody resumes from.
A checkpoint of another trainDigest is never resumed from.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer import atomic

SEAL = "sealed.json"
_PREFIX = "checkpoint-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        step: optimizer steps done.
        facts: what the run knew at that step besides weights, such as the losses at the switch.
    """

    folder: Path
    step: int
    facts: dict[str, Any]


def folder_of(outputs: Path, step: int) -> Path:
    """Where transformers writes the checkpoint of a step."""
    return outputs / f"{_PREFIX}{step}"


def seal(folder: Path, train_digest: str, facts: dict[str, Any]) -> None:
    """Marks a checkpoint as complete, once its files are on the disk; nothing is written to it afterwards."""
    atomic.sync_tree(folder)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
    files = {str(path.relative_to(folder)): _digest(path) for path in paths}
    atomic.write_text(folder / SEAL, json.dumps({"trainDigest": train_digest, "facts": facts, "files": files}, indent=1))
    atomic.sync(folder.parent)


def newest(outputs: Path, train_digest: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The complete checkpoint of this training with the most steps; damaged ones are passed over with a warning."""
    for folder in sorted(_folders(outputs), key=step_of, reverse=True):
        problem, sealed = _read_seal(folder)
        if problem:
            warn(f"Checkpoint {folder.name} is passed over: {problem}.")
        elif sealed["trainDigest"] == train_digest:
            return Checkpoint(folder, step_of(folder), sealed["facts"])
    return None


def remove_all_but(kept: Checkpoint | None, outputs: Path) -> list[str]:
    """Removes the checkpoints that nothing can resume from any more, and returns their names.

    Left where they are, transformers would count them among those it keeps, and delete new ones in their place.
    """
    others = [folder for folder in _folders(outputs) if kept is None or folder != kept.folder]
    for folder in others:
        shutil.rmtree(folder)
    return sorted(folder.name for folder in others)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint's seal is there and every file is what it says."""
    return not problem_of(folder)


def problem_of(folder: Path) -> str:
    """Why a checkpoint can't be gone on from; empty when it can."""
    return _read_seal(folder)[0]


def _folders(outputs: Path) -> list[Path]:
    return [folder for folder in outputs.glob(f"{_PREFIX}*") if folder.is_dir() and folder.name.removeprefix(_PREFIX).isdigit()]


def _read_seal(folder: Path) -> tuple[str, dict[str, Any]]:
    """(what is wrong, or nothing; the seal)."""
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files, _, _ = dict(sealed["files"]), dict(sealed["facts"]), str(sealed["trainDigest"])
    except FileNotFoundError:
        return "it was never completed", {}
    except (ValueError, KeyError, TypeError):
        return "its seal can't be read", {}
    for name, digest in files.items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            return f"{name} is damaged", {}
    return "", sealed


def step_of(folder: Path) -> int:
    """The optimizer steps that a checkpoint folder's name says."""
    return int(folder.name.removeprefix(_PREFIX))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

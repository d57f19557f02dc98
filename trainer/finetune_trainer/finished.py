"""What a stage has finished is not done again: its result is kept in the working directory, with a digest of its inputs.

Used by pipeline.py for the stages behind training; training itself goes on from its checkpoints. A result of other inputs counts for nothing, and what
a stage wrote counts only as long as it is what it was.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from finetune_api.status import Stage

from finetune_trainer import atomic
from finetune_trainer.destinations.layout import is_shipped

FOLDER = "stages"
REPORT_FORMAT = 1  # of report.json; what another version of the trainer wrote is made again
Result = TypeVar("Result")


@dataclass(frozen=True)
class FinishedStages:
    """The results in one working directory that belong to one set of inputs.

    Attributes:
        folder: where they are kept.
        inputs: digest of everything they were made from.
    """

    folder: Path
    inputs: str

    def once(self, stage: Stage, kind: type[Result], work: Callable[[], Result], made: Sequence[Path] = ()) -> Result:
        """The result of a stage: read, or else worked for and kept; what later stages made of the one before counts no more then.

        Args:
            stage: which one.
            kind: a dataclass of plain JSON values.
            work: does the stage.
            made: the folders that the stage wrote or looked at; when a file in them is gone or has changed since, it is done again.
        """
        marker = self._marker(stage)
        known = self._read(marker, kind, made)
        if known is not None:
            return known
        self.undo_from(stage)
        result = work()
        kept = {"inputs": self.inputs, "made": tree_digest(made), "result": asdict(result)}  # type: ignore[call-overload]
        atomic.write_text(marker, json.dumps(kept, indent=1))
        return result

    def undo_from(self, stage: Stage) -> None:
        """From now on this stage and those behind it are not done."""
        order = list(Stage)
        for undone in order[order.index(stage) :]:
            self._marker(undone).unlink(missing_ok=True)

    def _marker(self, stage: Stage) -> Path:
        return self.folder / f"{stage.value.lower()}.json"

    def _read(self, marker: Path, kind: type[Result], made: Sequence[Path]) -> Result | None:
        try:
            kept = json.loads(marker.read_text(encoding="utf-8"))
            same = kept["inputs"] == self.inputs and kept["made"] == tree_digest(made)
            return kind(**kept["result"]) if same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def digest_of(*inputs: str | Path) -> str:
    """64 hex digits over texts and the contents of files."""
    joined = hashlib.sha256()
    for item in inputs:
        content = item.read_bytes() if isinstance(item, Path) else item.encode()
        joined.update(hashlib.sha256(content).digest())
    return joined.hexdigest()


def tree_digest(folders: Sequence[Path]) -> str:
    """64 hex digits over names and contents of all files in these folders that can be shipped; a folder that is not there is an empty one."""
    joined = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and is_shipped(path.relative_to(folder))):
            with path.open("rb") as stream:
                joined.update(f"{folder.name}/{path.relative_to(folder)}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return joined.hexdigest()

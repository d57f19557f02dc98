"""What a stage has finished is not done again: its result is kept in the working directory, with a digest of its inputs.

Used by pipeline.py for the stages behind training; training itself goes on from its checkpoints. A result of other inputs counts for nothing.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from finetune_api.status import Stage

from finetune_trainer import atomic

FOLDER = "stages"
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

    def once(self, stage: Stage, kind: type[Result], work: Callable[[], Result], made: Path | None = None) -> Result:
        """The result of a stage: read, or else worked for and kept; what later stages made of the one before counts no more then.

        Args:
            stage: which one.
            kind: a dataclass of plain JSON values.
            work: does the stage.
            made: what the stage wrote; when that is gone, it is done again.
        """
        marker = self._marker(stage)
        known = self._read(marker, kind) if made is None or made.exists() else None
        if known is not None:
            return known
        order = list(Stage)
        for done_again in order[order.index(stage) :]:
            self._marker(done_again).unlink(missing_ok=True)
        result = work()
        atomic.write_text(marker, json.dumps({"inputs": self.inputs, "result": asdict(result)}, indent=1))  # type: ignore[call-overload]
        return result

    def _marker(self, stage: Stage) -> Path:
        return self.folder / f"{stage.value.lower()}.json"

    def _read(self, marker: Path, kind: type[Result]) -> Result | None:
        try:
            kept = json.loads(marker.read_text(encoding="utf-8"))
            return kind(**kept["result"]) if kept["inputs"] == self.inputs else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def digest_of(*inputs: str | Path) -> str:
    """64 hex digits over texts and the contents of files."""
    joined = hashlib.sha256()
    for item in inputs:
        content = item.read_bytes() if isinstance(item, Path) else item.encode()
        joined.update(hashlib.sha256(content).digest())
    return joined.hexdigest()

"""The run context: what every stage may look at, and where things lie. Made once by the pipeline, handed from left to right.

Each stage takes it with the results of earlier stages and returns one frozen result of its own; nobody writes to it.
Must not import torch: `finetune validate` and preflight's cheap checks run without it.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_api import names
from finetune_api.job import JobDescription
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Progress, Stage


class Reporter(Protocol):
    """Where a run says what it is doing: progress bar or log lines, `/progress`, `/metrics` and the termination message."""

    def enter(self, stage: Stage) -> None:
        """A stage begins."""

    def step(self, progress: Progress) -> None:
        """An optimizer step is done."""

    def note(self, sentence: str, **facts: object) -> None:
        """Something the user should know, such as dropped rows or an ignored credential."""

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Adds the time of the block to a part of the stage, for hints about slow runs."""


@dataclass(frozen=True)
class RunContext:
    """One run: the job, its folders, its reporter."""

    job: JobDescription
    workdir: Path
    cache: Path
    reporter: Reporter

    @property
    def spec(self) -> FineTuneJobSpec:
        """What the user wrote."""
        return self.job.spec

    @property
    def outputs(self) -> Path:
        """Checkpoints."""
        return self.workdir / names.OUTPUTS

    @property
    def adapter(self) -> Path:
        """The LoRA adapter, as peft loads it."""
        return self.workdir / names.ADAPTER

    @property
    def quantized(self) -> Path:
        """The quantized model, as transformers with torchao loads it."""
        return self.workdir / names.QUANTIZED

    @property
    def proof(self) -> Path:
        """Token ids and logits of the trained model, and digests of its weights: what the exported folder is held against."""
        return self.workdir / names.PROOF

    @property
    def report(self) -> Path:
        """Everything measured, as JSON."""
        return self.workdir / names.REPORT


def user_cache() -> Path:
    """Where a laptop keeps what is fetched or converted once; not made here."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"

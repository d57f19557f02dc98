"""Run contexts for tests of the trainer without a run: context() makes one that records its notes, write_artifacts() fills its folders.

refused() holds the message of a failure to what every message owes its reader: the type, one sentence, what to mend, no credential.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from finetune_api.job import JobDescription
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Progress, Stage
from finetune_trainer.context import RunContext
from finetune_trainer.errors import FineTuneError

CONFIG = b'{"model_type": "llama"}'
WEIGHTS = bytes(range(256)) * 200  # more than the test Hub keeps as a plain file
MODEL_FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "tokenizer.json": b'{"version": "1.0"}'}


@dataclass
class RecordingReporter:
    """Keeps what it is told."""

    notes: list[str] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    progress: list[Progress] = field(default_factory=list)

    def enter(self, stage: Stage) -> None:
        self.stages.append(stage)

    def step(self, progress: Progress) -> None:
        self.progress.append(progress)

    def note(self, sentence: str, **facts: object) -> None:
        self.notes.append(sentence)

    def timed(self, part: str) -> AbstractContextManager[None]:
        return nullcontext()


def run_spec(
    model: str = "builtin://smollm2-135m",
    dataset: str = "builtin://python-docs",
    *destinations: dict[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """A spec dict with these sources and destinations; `more` are whole parts such as storage."""
    return {
        "model": {"source": model},
        "dataset": {"source": dataset},
        "outputs": {"destinations": list(destinations) or [{"uri": "file:///published"}]},
        **more,
    }


def context(folder: Path, spec: dict[str, Any], *, in_cluster: bool = False) -> RunContext:
    """A run of this spec with its working directory and cache under `folder`."""
    metadata = {"name": "bot", "namespace": "team", "uid": "1"} if in_cluster else {"name": "bot"}
    job = JobDescription.of(metadata, FineTuneJobSpec.model_validate(spec), in_cluster=in_cluster)
    for name in ("work", "cache"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return RunContext(job, folder / "work", folder / "cache", RecordingReporter())


def notes(ctx: RunContext) -> list[str]:
    """What the run has told its user."""
    assert isinstance(ctx.reporter, RecordingReporter)
    return ctx.reporter.notes


PROOF = {"weights_equal": True, "max_logit_difference": 0.0, "kernel": "torchao's reference kernels on cpu", "holds": True}


def report_of(ctx: RunContext, **changes: Any) -> dict[str, Any]:
    """A report as a finished run has it; `changes` replace whole parts."""
    return {
        "formatVersion": 1,
        "job": ctx.job.name,
        "sources": {"model": "hf://acme/base@0123", "dataset": "s3://data/rows.jsonl?etag=ab"},
        "losses": {"base": 3.14159, "tuned": 2.25, "nearest": 2.75, "ptq": 2.5, "quantized": 2.31, "recovered": None},
        "qat": {"scheme": "int8-int4", "layers": 14, "coverage": 1.0},
        "proof": PROOF,
        "seed": 42,
        "versions": {"torch": "2.13.0"},
    } | changes


def write_artifacts(ctx: RunContext, report: dict[str, Any], *, model: dict[str, bytes] | None = None) -> None:
    """Adapter, quantized model, proof and report where a run leaves them; `model` replaces the quantized model's files."""
    adapter = {"adapter_config.json": b'{"r": 32}', "adapter_model.safetensors": b"adapter" * 100, "README.md": b"peft's empty card"}
    for folder, files in ((ctx.adapter, adapter), (ctx.quantized, model or MODEL_FILES)):
        write_files(folder, files)
    write_files(ctx.proof, {"reference.safetensors": b"logits", "expected.json": b"{}"})
    ctx.report.write_text(json.dumps(report), encoding="utf-8")


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    """Writes files by relative path and returns the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of everything in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def refused(kind: type[FineTuneError], *words: str, hidden: tuple[str, ...] = ()) -> Iterator[None]:
    """The block fails with this error: one sentence that has these words and none of `hidden`."""
    with pytest.raises(FineTuneError) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.endswith(".")
    assert "\n" not in message
    assert "Traceback" not in message
    for word in words:
        assert word in message
    for secret in hidden:
        assert secret not in message

"""Whole jobs on a tiny model, small enough for a test: `tiny_job` writes model, rows and YAML; `run` does what `finetune run` does, in this process."""

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.job import JobDescription
from finetune_api.validation import parse_job, verdicts
from finetune_trainer import cli, pipeline
from support.finetunejobs import merged
from support.tiny_model import save_tiny_model, sums, write_jsonl

STEPS = 4  # 40 rows, a fifth held out, batches of 8; the switch to QAT is after the second


def tiny_job(folder: Path, changes: dict[str, Any] | None = None, rows: list[dict[str, Any]] | None = None) -> Path:
    """The path of job.yaml in `folder`; `changes` are merged into the spec."""
    if not (folder / "model").exists():
        save_tiny_model(folder / "model")
    write_jsonl(folder / "rows.jsonl", sums(40) if rows is None else rows)
    spec = {
        "model": {"source": f"file://{folder}/model"},
        "dataset": {"source": f"file://{folder}/rows.jsonl", "evaluation": {"percent": 20}},
        "lora": {"rank": 4},
        "quantization": {"scheme": "int8-int4", "qatPercent": 50},  # as many steps before the switch as behind it
        "training": {"batchSize": 8, "maxLength": 64, "learningRate": "1e-3", "checkpointEvery": 1},
        "outputs": {"artifacts": ["adapter"], "destinations": [{"uri": f"file://{folder}/published"}]},
    }
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny"},
        "spec": merged(spec, changes or {}),
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def description(path: Path) -> JobDescription:
    """What the trainer is given for a job file; AssertionError with the verdicts when it is wrong."""
    text = path.read_text()
    assert not (problems := verdicts(text, local=True)), problems
    parsed = parse_job(text)
    return JobDescription.of(parsed.metadata, parsed.spec, in_cluster=False)


def run(path: Path, workdir: Path) -> dict[str, Any]:
    """Runs the job and returns its report."""
    return pipeline.run(description(path), workdir, path.parent / "cache")


def finetune(*arguments: str) -> int:
    """The exit code of the `finetune` command, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["finetune", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    return int(end.value.code or 0)

"""Out of memory in a training, for real: a process whose limit is set at the first step goes on with less, or says what it would have needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api.exits import ExitCode
from support.tiny_jobs import tiny_job
from support.tiny_model import save_tiny_model

ROWS = [{"instruction": f"{index} " * 150, "output": "y" * 40} for index in range(10, 26)]
CHANGES: dict[str, Any] = {"training": {"maxLength": 512, "checkpointEvery": 1}, "dataset": {"evaluation": {"percent": 0}}}
MIB = 2**20


def wide_job(folder: Path) -> Path:
    """16 rows of about 500 tokens, two steps of 8; 8 rows at once need some 300 MB, a single one a seventh of it."""
    save_tiny_model(folder / "model", hidden_size=256, intermediate_size=1024)
    return tiny_job(folder, CHANGES, rows=ROWS)


def train(job: Path, workdir: Path, room: int, step: int = 0) -> tuple[int, dict[str, Any]]:
    """Exit code, and what support/short_of_memory.py says."""
    command = [sys.executable, "-m", "support.short_of_memory", str(job), str(workdir), str(room), str(step)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout, done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def weights(workdir: Path) -> bytes:
    return (workdir / "lora_model" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [0, 1])
def test_half_the_rows_at_once_train_the_same_batch_from_the_last_checkpoint(step: int, tmp_path: Path) -> None:
    job = wide_job(tmp_path)
    code, said = train(job, tmp_path / "short", 140 * MIB, step)
    assert code == 0, said
    told = [note for note in said["notes"] if note.startswith("Out of memory with micro-batches of")]
    assert told
    assert told[0].startswith("Out of memory with micro-batches of 8 rows: going on with 4, 2 of them a step")
    assert any(f"Going on from the checkpoint of step {step}." in note for note in said["notes"]) == (step > 0)
    assert said["summary"].startswith("2/2, micro-batch ")
    assert said["micro_batch"] < 8
    assert (said["steps"], said["start_files"]) == (2, [])
    if step == 0:
        _, other = train(job, tmp_path / "small", 0, -said["micro_batch"])
        assert other["micro_batch"] == said["micro_batch"]
        assert weights(tmp_path / "short") == weights(tmp_path / "small")


def test_a_single_row_that_is_too_much_ends_with_the_estimate_and_three_ways_out(tmp_path: Path) -> None:
    code, said = train(wide_job(tmp_path), tmp_path / "work", 8 * MIB)
    assert code == ExitCode.CAPACITY
    for words in (
        "micro-batch of a single row",
        "training.maxLength",
        "model.dtype to bfloat16",
        "more memory",
        "Estimated: a micro-batch of 1 row",
    ):
        assert words in said["error"]

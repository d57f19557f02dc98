"""`finetune estimate`: the parts, this machine and the GPUs, from the configuration alone."""

from pathlib import Path

import pytest
from finetune_api.exits import ExitCode
from finetune_trainer.memory.gpus import GPU_BYTES
from support.tiny_jobs import finetune, tiny_job


def estimate(job: Path, *options: str) -> int:
    return finetune("estimate", str(job), "--cache", str(job.parent / "cache"), *options)


def test_every_part_and_every_gpu_is_shown_without_weights_or_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    assert estimate(job) == 0
    said = capfd.readouterr().out
    for words in ("one row of 64 tokens needs", "weights", "adapter", "optimizer", "activations", "peak", "this machine", *GPU_BYTES):
        assert words in said
    assert not (tmp_path / "work-tiny").exists()


def test_one_gpu_alone_can_be_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert estimate(tiny_job(tmp_path), "--gpu", "nvidia-l4") == 0
    said = capfd.readouterr().out
    assert "nvidia-l4" in said
    assert "this machine" not in said
    assert "nvidia-b200" not in said


def test_a_gpu_that_is_not_in_the_table_is_refused_with_those_that_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert estimate(tiny_job(tmp_path), "--gpu", "rtx-9000") == ExitCode.SPEC
    assert "known are nvidia-tesla-t4" in capfd.readouterr().err

"""Out of memory in a training: the run goes on with fewer rows at once, or says what it would have needed. The limit is the kernel's own."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.exits import ExitCode
from finetune_trainer import plan
from finetune_trainer.memory import shrink
from finetune_trainer.phases import Phases
from finetune_trainer.plan import Plan
from finetune_trainer.reporting.progress import ProgressMeter
from finetune_trainer.teacher import Adapter
from hypothesis import given
from hypothesis import strategies as st
from support.run_contexts import context, notes, run_spec
from support.tiny_jobs import run, tiny_job
from support.tiny_model import save_tiny_model

MIB = 2**20
LONGEST = 512
ROWS = [{"instruction": f"{index} " * 150, "output": "y" * 40} for index in range(10, 26)]


def wide_job(folder: Path, batch: int) -> Path:
    """16 rows of about 500 tokens; 8 rows at once need some 800 MB, half of them half of it."""
    save_tiny_model(folder / "model", hidden_size=256, intermediate_size=1024)
    changes: dict[str, Any] = {"training": {"maxLength": LONGEST, "batchSize": batch}, "dataset": {"evaluation": {"percent": 0}}}
    return tiny_job(folder, changes, rows=ROWS)


def short_of_memory(job: Path, room: int) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, structured lines and stderr of `finetune run`."""
    command = [sys.executable, "-m", "support.short_of_memory", str(room), "run", str(job)]
    folders = ["--workdir", str(job.parent / "work"), "--cache", str(job.parent / "cache")]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=False, env=paths)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def test_half_the_rows_at_once_train_the_same_batch_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines, errors = short_of_memory(wide_job(tmp_path, batch=8), 500 * MIB)
    assert code == 0, errors
    told = [line["message"] for line in lines if line["event"] == "note"]
    (shrunk,) = [sentence for sentence in told if sentence.startswith("Out of memory")]
    assert shrunk.startswith("Out of memory with micro-batches of 8 rows (")
    assert shrunk.endswith("going on with 4, at most 2 of them a step, and nothing kept for speed.")
    summaries = [line["summary"] for line in lines if line["event"] == "step"]
    assert summaries == [f"{done}/2, micro-batch 4 after out of memory" for done in (1, 2)]
    assert not (tmp_path / "work" / shrink.FILE).exists()
    monkeypatch.setattr(plan, "MICRO_BATCH_TOKENS", 4 * LONGEST)
    run(tmp_path / "job.yaml", tmp_path / "other")
    adapters = [(tmp_path / work / "lora_model" / "adapter_model.safetensors").read_bytes() for work in ("work", "other")]
    assert adapters[0] == adapters[1]


def test_the_next_attempt_goes_on_from_the_last_checkpoint_with_what_was_left_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, original, summaries = tiny_job(tmp_path), ProgressMeter.step_done, []

    def step_done(self: ProgressMeter, step: int, *args: Any) -> None:
        original(self, step, *args)
        summaries.append(self._reporter.progress.summary)  # type: ignore[attr-defined]
        if len(summaries) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ProgressMeter, "step_done", step_done)
    with pytest.raises(shrink.OutOfMemory, match="going on with 4"):
        run(job, tmp_path / "work")
    assert run(job, tmp_path / "work")["training"]["resumedFrom"] == 1
    assert summaries == ["1/4", "2/4", *(f"{step}/4, micro-batch 4 after out of memory" for step in (2, 3, 4))]


def test_quantization_behind_the_last_step_has_a_second_attempt_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With qatPercent 0 scales and rounding are chosen there, and weight codes kept for the held-out rows."""
    kept: list[bool] = []

    def fitting(phases: Phases, adapter: Adapter) -> None:
        kept.append(phases.plan.keeps_codes)
        if phases.plan.keeps_codes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(phases, adapter)

    original = Phases._fit
    monkeypatch.setattr(Phases, "_fit", fitting)
    job = tiny_job(tmp_path, {"quantization": {"qatPercent": 0}})
    with pytest.raises(shrink.OutOfMemory, match="nothing kept for speed"):
        run(job, tmp_path / "work")
    assert run(job, tmp_path / "work")["training"]["resumedFrom"] == 4
    assert kept == [True, False]


def test_where_a_single_row_is_too_much_the_run_ends_with_the_estimate_and_three_ways_out(tmp_path: Path) -> None:
    code, lines, errors = short_of_memory(wide_job(tmp_path, batch=2), 8 * MIB)
    assert code == ExitCode.CAPACITY
    assert "going on with 1, at most 2 of them a step" in str(lines)
    for words in (
        "micro-batch of a single row",
        "training.maxLength",
        "model.dtype to bfloat16",
        "more memory",
        "Estimated: a micro-batch of 1 row",
    ):
        assert words in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "work" / shrink.FILE).exists()


@given(batch=st.integers(1, 4096), data=st.data())
def test_every_attempt_is_smaller_keeps_the_batch_and_is_what_the_next_one_finds(
    batch: int, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ctx = context(tmp_path_factory.mktemp("run"), run_spec())
    micro = data.draw(st.sampled_from(plan.divisors(batch)))
    steps, sizes = Plan(10, 5, micro, batch // micro, 1, keeps_codes=data.draw(st.booleans())), [micro]
    smaller = steps.micro_batch > 1 or steps.keeps_codes
    while isinstance(ended := shrink.give_up_or_shrink(ctx, steps, "no memory", "a lot"), shrink.OutOfMemory):
        steps = steps.with_cut(shrink.remembered(ctx))
        assert (steps.batch, steps.reduced) == (batch, True)
        assert str(steps.micro_batch) in str(ended)
        sizes.append(steps.micro_batch)
    assert sizes[-1] == 1
    assert (len(sizes) > 1) == smaller, "the same attempt once more would end the same way"
    assert all(after <= before // 2 or (before == 1 and smaller) for before, after in pairwise(sizes))
    assert len(notes(ctx)) == len(sizes) - 1 <= batch.bit_length()
    assert "Estimated: a lot." in str(ended)
    assert shrink.remembered(ctx) == {}


@pytest.mark.parametrize("left", ["", "no JSON", "[1]", '{"trainDigest": "of another training", "micro_batch": 2}'])
def test_what_another_training_left_and_what_cannot_be_read_counts_for_nothing(left: str, tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec())
    (ctx.workdir / shrink.FILE).write_text(left)
    assert shrink.remembered(ctx) == {}

"""What an attempt measured: how many micro-batches a step took, and how many it would have taken, had memory been plenty."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finetune_trainer.example import Example
from finetune_trainer.plan import Plan, plan
from finetune_trainer.results.hints import Measured
from finetune_trainer.results.measured import measured
from support.run_contexts import context, run_spec

LONGEST = 256  # four of them are what gains speed on a CPU
ROWS = [Example((1,) * length, (1,) * length) for length in (9, LONGEST, 40)] * 8


def measured_of(folder: Path, cut: Any, *, resumed_from: int = 0, device: str = "cpu") -> Measured:
    """Of an attempt whose plan is the one that plenty of memory makes on a CPU, cut otherwise."""
    ctx = context(folder, run_spec(training={"batchSize": 8}))
    trained = SimpleNamespace(
        model=SimpleNamespace(dtype=torch.float32), plan=cut(plan(ctx.spec, len(ROWS), LONGEST)), resumed_from=resumed_from
    )
    return measured(ctx, {}, {}, SimpleNamespace(train=ROWS), trained, device)  # type: ignore[arg-type]


def by_estimate(fresh: Plan) -> Plan:
    return fresh.with_micro_batch(1)


def after_out_of_memory(fresh: Plan) -> Plan:
    return replace(fresh.with_micro_batch(1), reduced=True)


@pytest.mark.parametrize(
    ("cut", "resumed_from", "found"),
    [
        (lambda fresh: fresh, 0, (2, 2)),
        (by_estimate, 0, (8, 2)),
        (after_out_of_memory, 0, (8, 2)),
        (after_out_of_memory, 3, (8, 2)),
        (by_estimate, 3, (8, 8)),  # the checkpoint's machine may have been one where more rows gain nothing
    ],
    ids=["plenty", "estimated to be too much", "ran out", "ran out before", "as the checkpoint has it"],
)
def test_fewer_micro_batches_would_do_where_memory_is_known_to_have_made_them(
    cut: Any, resumed_from: int, found: tuple[int, int], tmp_path: Path
) -> None:
    run = measured_of(tmp_path, cut, resumed_from=resumed_from)
    assert (run.micro_batches, run.enough) == found


def test_a_checkpoint_of_a_cpu_that_goes_on_on_a_gpu_says_nothing_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    run = measured_of(tmp_path, lambda fresh: fresh, resumed_from=3, device="cuda")
    assert run.micro_batches == run.enough == 2

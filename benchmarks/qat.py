"""Exact QAT against plain peft LoRA: time and peak memory of a training step in three shapes, in float32 and bfloat16 (`make bench-qat`).

SmolLM2-135M, rank 32, all linears, AdamW, weight codes kept as the trainer keeps them. Each arm runs beside a process of plain LoRA, a step here and a
step there, so that a machine that gets slower hurts both alike. Ends with one JSON line per figure. `--arm` is what the processes run.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

RANK, ROWS, TOKENS = 32, 4, 256
WARM_STEPS = 2
DTYPES = ("float32", "bfloat16")
FULL_INPUTS = {"float32": (1.0, 0.85), "bfloat16": (1.0, 0.95)}  # activations are kept in one byte instead of four or two
WEIGHT_ONLY = dict.fromkeys(DTYPES, (1.05, 1.02))


@dataclass(frozen=True)
class Shape:
    """A training step of ROWS rows of TOKENS tokens.

    Attributes:
        arms: what is held against plain LoRA, with the bars of time and memory for each dtype; None without.
        micro_batches: how many the rows are cut into.
        checkpointed: whether activations are computed again in the backward pass.
    """

    arms: dict[str, dict[str, tuple[float, float]] | None]
    micro_batches: int = 1
    checkpointed: bool = False


SHAPES = {
    "plain": Shape({"int8-int4": FULL_INPUTS, "int8": WEIGHT_ONLY, "int4": WEIGHT_ONLY, "split": None}),
    "checkpointed": Shape({"int8-int4": FULL_INPUTS}, checkpointed=True),
    "micro-batches": Shape({"int8-int4": dict.fromkeys(DTYPES, (1.05, 1.0))}, micro_batches=ROWS),
}
Case = tuple[str, str, str]
"""Shape, dtype and arm."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each arm, behind two warm ones; the median counts")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--arms", nargs="+", help="which to hold against plain LoRA; all of the shape otherwise")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--arm", nargs=3, metavar=("SHAPE", "DTYPE", "ARM"), help="what the processes run: a step for each line of their input"
    )
    chosen = parser.parse_args()
    if chosen.arm:
        for measured in measure(*chosen.arm, asked=sys.stdin):
            print(json.dumps(measured), flush=True)
        return
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}", file=sys.stderr)
    for shape in chosen.shapes:
        for dtype in chosen.dtypes:
            for arm in SHAPES[shape].arms:
                if not chosen.arms or arm in chosen.arms:
                    compare((shape, dtype, arm), chosen.steps)


def compare(case: Case, steps: int) -> None:
    """Steps of the arm and of plain LoRA in turn; shows every pair as it comes, and ends with the figures."""
    with _process(case) as ours, _process((*case[:2], "lora")) as theirs:
        pairs = []
        for step in range(WARM_STEPS + steps):
            pairs.append((_step(ours), _step(theirs)))
            shown = ", ".join(f"{found['seconds']:.3f} s {found['bytes'] / 1e9:.2f} GB" for found in pairs[-1])
            print(f"{' '.join(case)}, LoRA: step {step + 1}: {shown}", file=sys.stderr)
    _print_figures(case, pairs[WARM_STEPS:])


def measure(shape: str, dtype: str, arm: str, asked: Iterable[str]) -> Iterator[dict[str, float]]:
    """One step of one arm for each item of `asked`: its seconds, and the peak resident set of this process until then in bytes."""
    from finetune_trainer.reporting.quiet import quiet_bars, quiet_libraries

    quiet_libraries()
    quiet_bars()
    import torch

    torch.manual_seed(0)
    model = _model(SHAPES[shape], dtype, arm)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-4)
    if arm not in ("lora", "split"):
        _follow(model, optimizer, keep_codes=SHAPES[shape].micro_batches > 1)
    input_ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    for _ in asked:
        started = time.perf_counter()
        for batch in input_ids.chunk(SHAPES[shape].micro_batches):
            (model(input_ids=batch, labels=batch, use_cache=False).loss / SHAPES[shape].micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        yield {"seconds": seconds, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def _model(shape: Shape, dtype: str, arm: str) -> Any:
    import torch
    from finetune_api.spec import QuantizationSpec
    from finetune_trainer.context import user_cache
    from finetune_trainer.qat.prepare import prepare
    from finetune_trainer.sources import builtin
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(builtin.fetch_model(user_cache(), print), dtype=getattr(torch, dtype))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    if shape.checkpointed:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    if arm == "split":
        _fake_quantize_apart(model)
    elif arm != "lora":
        prepare(model, QuantizationSpec(scheme=arm), enabled=True)
    return model


def _follow(model: Any, optimizer: Any, *, keep_codes: bool) -> None:
    """Weight codes are kept from micro-batch to micro-batch, until the optimizer has changed the weights."""
    from finetune_trainer.qat.prepare import follow_optimizer, mode_of

    follow_optimizer(model, optimizer)
    mode_of(model).keep_codes = keep_codes


def _fake_quantize_apart(model: Any) -> None:
    """torchao's own QAT on every linear: base weights and LoRA factors, each by itself."""
    import torch
    from torch import nn
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    grid = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, QATConfig(grid, step="prepare"), lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)


@contextmanager
def _process(case: Case) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-W", "ignore::FutureWarning", __file__, "--arm", *case]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def _step(process: subprocess.Popen[str]) -> dict[str, float]:
    if process.stdin is None or process.stdout is None:
        raise ValueError("a process without pipes")
    print(file=process.stdin, flush=True)
    answered = process.stdout.readline()
    if not answered:
        sys.exit("A process ended before its step; what it said stands above.")
    return dict(json.loads(answered))


def _print_figures(case: Case, pairs: Sequence[tuple[dict[str, float], dict[str, float]]]) -> None:
    shape, dtype, arm = case
    bars = (SHAPES[shape].arms.get(arm) or {}).get(dtype, (None, None))
    for name, key, unit, bar, counted in (("step", "seconds", "s", bars[0], pairs), ("peak RSS", "bytes", "bytes", bars[1], pairs[-1:])):
        for of, values in zip((arm, "lora"), zip(*((one[key], other[key]) for one, other in counted), strict=True), strict=True):
            _print_figure(f"{shape} {dtype} {of} {name}", values, unit, None)
        _print_figure(f"{' '.join(case)} {name}, LoRA = 1", [one[key] / other[key] for one, other in counted], "ratio", bar)


def _print_figure(figure: str, values: Sequence[float], unit: str, bar: float | None) -> None:
    value = statistics.median(values)
    spread = [round(min(values), 4), round(max(values), 4)]
    holds = None if bar is None else value <= bar
    print(json.dumps({"figure": figure, "value": round(value, 4), "unit": unit, "bar": bar, "holds": holds, "spread": spread}))


if __name__ == "__main__":
    main()

"""Exact QAT against plain peft LoRA and torchao's split fake quantization: time and peak memory of a training step (`make bench-qat`).

SmolLM2-135M, rank 32, all linears, int8-int4, one micro-batch of 4 x 256 tokens, AdamW. Each measurement is a process of its own; the arms are
interleaved, so that a machine that gets slower hurts them alike. Ends with one JSON line per figure. `--arm` is what the processes run.
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
from pathlib import Path
from typing import Any

ARMS = ("lora", "split", "exact")
DTYPES = ("float32", "bfloat16")
ROWS, TOKENS, RANK = 4, 256, 32
WARM_STEPS, TIMED_STEPS = 2, 6
BARS = {("time", "float32"): 1.02, ("memory", "float32"): 0.85}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each arm; the median counts")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="which to measure; lora is what the others are held against")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--arm", choices=ARMS)
    parser.add_argument("--dtype", choices=DTYPES)
    chosen = parser.parse_args()
    if chosen.arm:
        print(json.dumps(measure(chosen.arm, chosen.dtype)))
    else:
        compare(chosen.rounds, ["lora", *(arm for arm in chosen.arms if arm != "lora")], chosen.dtypes)


def compare(rounds: int, arms: list[str], dtypes: list[str]) -> None:
    """Runs the arms in turn, shows every measurement as it comes and ends with the figures."""
    measured: dict[tuple[str, str], list[dict[str, float]]] = {(dtype, arm): [] for dtype in dtypes for arm in arms}
    print(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}", file=sys.stderr)
    for turn in range(rounds):
        for dtype, arm in measured:
            result = _in_a_process(arm, dtype)
            measured[dtype, arm].append(result)
            print(f"{turn + 1}/{rounds} {dtype} {arm}: {result['seconds']:.3f} s a step, {result['bytes'] / 1e9:.2f} GB", file=sys.stderr)
    for dtype in dtypes:
        for arm in arms:
            _print_absolute(dtype, arm, measured[dtype, arm])
        for arm in arms[1:]:
            for name, key in (("time", "seconds"), ("memory", "bytes")):
                _print_ratio(name, dtype, arm, _values(measured[dtype, arm], key), _values(measured[dtype, "lora"], key))


def measure(arm: str, dtype: str) -> dict[str, float]:
    """Median seconds of a step and peak resident set of this process, for one arm."""
    from finetune_trainer.reporting.quiet import quiet_bars, quiet_libraries

    quiet_libraries()
    quiet_bars()
    import torch

    torch.manual_seed(0)
    model = _model(arm, dtype)
    factors = [item for item in model.parameters() if item.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=1e-4)
    if arm == "exact":
        from finetune_trainer.qat.prepare import follow_optimizer

        follow_optimizer(model, optimizer)
    input_ids = torch.randint(0, model.config.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        started = time.perf_counter()
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds[WARM_STEPS:]), "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}


def _model(arm: str, dtype: str) -> Any:
    import torch
    from finetune_api.spec import QuantizationSpec
    from finetune_trainer.qat.prepare import prepare
    from finetune_trainer.sources import builtin
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(builtin.fetch_model(_cache()), dtype=getattr(torch, dtype))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.train()
    if arm == "exact":
        prepare(model, QuantizationSpec(), enabled=True)
    if arm == "split":
        _fake_quantize_apart(model)
    return model


def _fake_quantize_apart(model: Any) -> None:
    """torchao's own QAT on every linear: base weights and LoRA factors, each by itself."""
    import torch
    from torch import nn
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.qat import QATConfig

    grid = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32))
    quantize_(model, QATConfig(grid, step="prepare"), lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name)


def _in_a_process(arm: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore::FutureWarning", __file__, "--arm", arm, "--dtype", dtype]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _values(results: list[dict[str, float]], key: str) -> list[float]:
    return [result[key] for result in results]


def _print_absolute(dtype: str, arm: str, results: list[dict[str, float]]) -> None:
    for figure, key, unit in (("step", "seconds", "s"), ("peak RSS", "bytes", "bytes")):
        _print_figure(f"{arm} {dtype} {figure}", _values(results, key), unit, None)


def _print_ratio(name: str, dtype: str, arm: str, values: list[float], lora: list[float]) -> None:
    bar = BARS.get((name, dtype)) if arm == "exact" else None
    _print_figure(f"{arm} {dtype} {name}, LoRA = 1", [value / against for value, against in zip(values, lora, strict=True)], "ratio", bar)


def _print_figure(figure: str, values: list[float], unit: str, bar: float | None) -> None:
    value = statistics.median(values)
    spread = [round(min(values), 4), round(max(values), 4)]
    holds = None if bar is None else value <= bar
    print(json.dumps({"figure": figure, "value": round(value, 4), "unit": unit, "bar": bar, "holds": holds, "spread": spread}))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"


if __name__ == "__main__":
    main()

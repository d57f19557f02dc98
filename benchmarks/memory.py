"""The memory estimate against what a training process really grows by (`make bench-memory`).

Each case is two processes: one estimates, from the configuration alone; one trains a few steps with SFTTrainer's own loss and AdamW, and reads its
peak resident set from the kernel, less what it was before the model was loaded. SmolLM2-135M and a 2-layer, 1,024-wide Llama; int8-int4, rank 32,
float32, every step under exact QAT. Ends with one JSON line per row; `--results` keeps them in benchmarks/results/memory.json and puts them into
docs/memory.md. `--case` is what the processes run.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
PAGE = ROOT / "docs" / "memory.md"
MODELS = ("SmolLM2-135M", "Llama, 2 x 1,024")
SHAPES = ((1, 512, False), (4, 256, False), (1, 1024, True))
STEPS = 2
BAR = 0.10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", action="store_true", help="keep the rows in benchmarks/results and docs/memory.md")
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(MODELS) * len(SHAPES)), help="which rows, from 0")
    parser.add_argument("--case", type=int)
    parser.add_argument("--what", choices=("estimated", "measured"))
    chosen = parser.parse_args()
    if chosen.what:
        print(json.dumps(_estimated(chosen.case) if chosen.what == "estimated" else _measured(chosen.case)))
        return
    rows = [compare(case) for case in chosen.cases]
    if chosen.results:
        keep(rows)


def compare(case: int) -> dict[str, Any]:
    """One row of the table."""
    estimated, measured = (_in_a_process(case, what) for what in ("estimated", "measured"))
    model, (rows, tokens, checkpointed) = _case(case)
    error = estimated["peak"] / measured["bytes"] - 1
    row = {
        "model": model,
        "rows": rows,
        "tokens": tokens,
        "checkpointed": checkpointed,
        "estimated": estimated,
        "measured": measured["bytes"],
        "error": round(error, 4),
        "bar": BAR,
        "holds": abs(error) <= BAR,
    }
    print(json.dumps(row), flush=True)
    return row


def keep(rows: list[dict[str, Any]]) -> None:
    """Writes the rows where the docs take them from, and into the docs."""
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"command": "make bench-memory ARGS=--results", "rows": rows}, indent=1) + "\n")
    PAGE.write_text(with_table(PAGE.read_text(), rows))


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the rows between its marks."""
    return re.sub(r"(<!-- rows -->\n).*(<!-- end of rows -->)", lambda marks: marks[1] + table(rows) + marks[2], page, flags=re.DOTALL)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = (
        "| model | micro-batch | weights | adapter | optimizer | activations | estimated peak | measured | difference |\n"
        + "|---" * 9
        + "|\n"
    )
    return head + "".join(_line(row) for row in rows)


def _line(row: dict[str, Any]) -> str:
    shape = f"{row['rows']} x {row['tokens']:,}" + (", checkpointed" if row["checkpointed"] else "")
    parts = " | ".join(f"{row['estimated'][part] / 1e9:.2f}" for part in ("weights", "adapter", "optimizer", "activations", "peak"))
    return f"| {row['model']} | {shape} | {parts} | {row['measured'] / 1e9:.2f} | {row['error']:+.1%} |\n"


def _case(case: int) -> tuple[str, tuple[int, int, bool]]:
    return MODELS[case // len(SHAPES)], SHAPES[case % len(SHAPES)]


def _estimated(case: int) -> dict[str, int]:
    _quiet()
    import torch
    from finetune_trainer.memory.dry_run import Step, empty_model
    from finetune_trainer.memory.estimate import estimate_of

    name, (rows, tokens, checkpointed) = _case(case)
    step = Step(rows, tokens, quantized=True, checkpointed=checkpointed)
    found = estimate_of(empty_model(_config(name), _spec(), torch.float32), [step])
    return {part: getattr(found, part) for part in ("weights", "adapter", "optimizer", "activations", "peak")}


def _measured(case: int) -> dict[str, int]:
    _quiet()
    import torch
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(0)
    name, (rows, tokens, checkpointed) = _case(case)
    folder = _folder(name)
    before = _resident("VmRSS")
    model, optimizer = _prepared(folder, checkpointed)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    input_ids = torch.randint(0, model.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        output = model(input_ids=input_ids, labels=input_ids, fused_lm_head=True, use_cache=False)
        (-output.log_probs.sum() / input_ids.numel()).backward()
        del output
        optimizer.step()
        optimizer.zero_grad()
    return {"bytes": _resident("VmHWM") - before}


def _prepared(folder: Path, checkpointed: bool) -> Any:
    """The model as stages/load.py and stages/train.py make it, every step under exact QAT, and its optimizer."""
    import torch
    from finetune_trainer.adapter import add_adapter
    from finetune_trainer.qat.prepare import follow_optimizer, prepare
    from finetune_trainer.stages.load import load_base

    model = add_adapter(load_base(folder, "float32", trust_remote_code=False), _spec().lora).train()
    prepare(model, _spec().quantization, enabled=True)
    if checkpointed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-4, fused=True)
    follow_optimizer(model, optimizer)
    return model, optimizer


def _spec() -> Any:
    from finetune_api.spec import FineTuneJobSpec

    source = {"model": {"source": "builtin://smollm2-135m"}, "dataset": {"source": "builtin://python-docs"}}
    return FineTuneJobSpec.model_validate(source | {"outputs": {"destinations": [{"uri": "file:///nowhere"}]}})


def _config(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(_folder(name))


def _folder(name: str) -> Path:
    """The model on the disk; the wide one is made once, with random weights."""
    from finetune_trainer.sources import builtin
    from transformers import LlamaConfig, LlamaForCausalLM

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-operator"
    if name == MODELS[0]:
        return builtin.fetch_model(cache)
    folder = cache / "bench" / "llama-2x1024"
    if not (folder / "config.json").exists():
        settings = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 32000}
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def _quiet() -> None:
    from finetune_trainer.reporting.quiet import quiet_bars, quiet_libraries

    quiet_libraries()
    quiet_bars()


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _in_a_process(case: int, what: str) -> dict[str, int]:
    command = [sys.executable, "-W", "ignore::FutureWarning", __file__, "--case", str(case), "--what", what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    return dict(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()

"""The memory estimate against what a training process really grows by (`make bench-memory`): six rows, each measured in a process of its own.

SmolLM2-135M and a 2-layer, 1,024-wide Llama; int8-int4, rank 32, float32. Every phase of a job, from the product's own parts: steps of plain LoRA, the
switch with the choice of the rounding and its held-out rows, and steps under exact QAT with a teacher, each of two micro-batches. What is compared is the peak resident set, read from the
kernel for each phase, less what the process had before it loaded the model. Behind them the product's own conversion, of which no estimate is made: its peak
is compared with the size of the model. Rows that are in benchmarks/results/memory.json are not measured again.
"""

import argparse
import gc
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "memory.json"
MODELS = ("SmolLM2-135M", "Llama, 2 x 1,024")
SHAPES = ((1, 512, False), (4, 256, False), (1, 1024, True))
STEPS, ACCUMULATION = 2, 2  # of each phase; micro-batches of a step
PHASES = ("tune", "switch", "adapt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", type=int, default=range(len(MODELS) * len(SHAPES)), help="which rows, from 0")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument("--case", type=int, help="what the processes run: prints one row")
    chosen = parser.parse_args()
    if chosen.case is not None:
        print(json.dumps(_row(chosen.case)))
        return
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    for case in chosen.cases:
        name = name_of(case)
        if name not in known or chosen.fresh:
            known[name] = _in_a_process(case) | {"commit": _commit()}
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(
                json.dumps({"rows": {name_of(item): known[name_of(item)] for item in range(6) if name_of(item) in known}}, indent=1) + "\n"
            )
        print(json.dumps({name: known[name]}), flush=True)


def name_of(case: int) -> str:
    """Of the row in results and docs."""
    model, (rows, tokens, checkpointed) = _case(case)
    return f"{model}: {rows} x {tokens:,}{' checkpointed' if checkpointed else ''}"


def _case(case: int) -> tuple[str, tuple[int, int, bool]]:
    return MODELS[case // len(SHAPES)], SHAPES[case % len(SHAPES)]


def _row(case: int) -> dict[str, Any]:
    """Both sides. The measured one comes first: what the estimate leaves behind would serve it."""
    from finetune_trainer.reporting.quiet import quiet_bars, quiet_libraries
    from finetune_trainer.results.report import versions

    quiet_libraries()
    quiet_bars()
    name, (rows, tokens, checkpointed) = _case(case)
    folder = _folder(name)
    measured, conversion = _measured(folder, rows, tokens, checkpointed=checkpointed)
    estimated = _estimated(folder, rows, tokens, checkpointed=checkpointed)
    return {"estimated": estimated, "measured": measured, "conversion": conversion, "versions": versions(), "machine": platform.machine()}


def _estimated(folder: Path, rows: int, tokens: int, *, checkpointed: bool) -> dict[str, dict[str, int]]:
    """The parts of each phase's peak."""
    from dataclasses import asdict

    import torch
    from finetune_trainer.memory.dry_run import HeldOutBatch, Step, empty_model
    from finetune_trainer.memory.estimate import Kind, Lengths, needed_by
    from transformers import AutoConfig

    class Phase(Kind):
        """One phase of a job, which looks at all of them."""

        def traced(self, rows: int) -> list[Step | HeldOutBatch]:
            found = super().traced(rows)
            if self.rounds:  # the switch
                return [item for item in found if isinstance(item, HeldOutBatch)]
            return [item for item in found if isinstance(item, Step)]

    model = empty_model(AutoConfig.from_pretrained(folder), _spec(), torch.float32)

    def phase(name: str) -> dict[str, int]:
        at_switch = name == "switch"
        lengths = Lengths(tokens, tokens if at_switch else 0)
        kind = Phase(False, checkpointed, name != "adapt", name == "adapt", True, at_switch, at_switch, ACCUMULATION * rows, lengths)
        found = needed_by(model, kind)(rows, True)
        return {**asdict(found), "peak": found.peak}

    return {name: phase(name) for name in PHASES}


def _measured(folder: Path, rows: int, tokens: int, *, checkpointed: bool) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that each phase's peak lies above what the process had before; those of the model and of the conversion's peak."""
    import torch
    from finetune_trainer import (
        adapter,  # noqa: F401 what _prepared imports counts as there before
        heap,
    )
    from finetune_trainer.batch import pad
    from finetune_trainer.example import Example
    from finetune_trainer.held_out import TOKENS_AT_ONCE, measure
    from finetune_trainer.qat.gptq import TOKENS, calibration_rows, choose_rounding
    from finetune_trainer.qat.prepare import free_codes, mode_of, set_fake_quantization
    from finetune_trainer.stages import convert, load  # noqa: F401
    from finetune_trainer.teacher import adapter_values, in_place, teacher_hidden
    from finetune_trainer.token_loss import output_head, predict, summed_loss
    from transformers import AutoTokenizer
    from transformers.models.llama import modeling_llama  # noqa: F401
    from trl.trainer.utils import add_fused_lm_head  # noqa: F401

    heap.return_large_blocks()  # as a job has it whose memory is not plenty
    tokenizer = AutoTokenizer.from_pretrained(_folder(MODELS[0]))  # a job has it before the model
    torch.manual_seed(0)
    before, peaks, conversion = _resident("VmRSS"), {}, {}
    model, prepared, optimizer = _prepared(folder, checkpointed=checkpointed)
    base, mode = model.get_base_model(), mode_of(model)
    mode.keep_codes = True
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> list[Example]:
        """Rows of different lengths, as real ones are."""
        lengths = [tokens - index for index in range(count)]
        ids = [tuple(torch.randint(0, model.config.vocab_size, (length,), generator=generator).tolist()) for length in lengths]
        return [Example(item, item) for item in ids]

    def tune(batch: dict[str, Any]) -> torch.Tensor:
        return -model(**batch, fused_lm_head=True, use_cache=False).log_probs.sum()

    def adapt(batch: dict[str, Any]) -> torch.Tensor:
        taught = teacher_hidden(model, teacher, batch)
        return summed_loss(output_head(base), predict(base, **batch), taught, 0.5)

    def steps(loss_of: Any) -> None:
        for _ in range(STEPS):
            for _ in range(ACCUMULATION):
                (loss_of(pad(drawn(rows), 0)) / (ACCUMULATION * rows * tokens)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    with _peak_of("tune", peaks, before):
        steps(tune)
    with _peak_of("switch", peaks, before):
        teacher = adapter_values(model)
        with in_place(model, teacher):
            choose_rounding(model, calibration_rows(drawn(max(1, TOKENS // tokens))))
        for fake_quant in (False, True):
            measure(model, drawn(2 * max(1, TOKENS_AT_ONCE // tokens)), fake_quant=fake_quant)
    set_fake_quantization(model, enabled=True)
    with _peak_of("adapt", peaks, before):
        steps(adapt)
    optimizer.state.clear()  # the trainer is gone by now, and the teacher with it
    teacher.clear()
    free_codes(model)
    gc.collect()
    heap.return_holes()  # what training had at once is its own peak, above
    with _peak_of("peak", conversion, before):
        conversion["model"] = _convert(model, prepared, tokenizer)
    return peaks, conversion


def _convert(model: Any, prepared: Any, tokenizer: Any) -> int:
    """Converts a trained model as the pipeline does; the bytes of its base weights."""
    from finetune_api.job import JobDescription
    from finetune_trainer.context import RunContext
    from finetune_trainer.stages import convert
    from finetune_trainer.stages.train import Trained
    from support.run_contexts import RecordingReporter

    with TemporaryDirectory() as name:
        ctx = RunContext(JobDescription.of({"name": "memory"}, _spec(), in_cluster=False), Path(name), Path(name), RecordingReporter())
        return convert.run(ctx, Trained(model, tokenizer, prepared, None, 0, None, None), Path(name)).bytes_before


def _prepared(folder: Path, *, checkpointed: bool) -> Any:
    """The model as stages/load.py and stages/train.py make it, what is quantized of it, and its optimizer."""
    import torch
    from finetune_trainer.adapter import add_adapter
    from finetune_trainer.base_model import load_base
    from finetune_trainer.qat.prepare import follow_optimizer, prepare
    from trl.trainer.utils import add_fused_lm_head

    model = add_adapter(load_base(folder, "float32", trust_remote_code=False), _spec().lora).train()
    prepared = prepare(model, _spec().quantization, enabled=False)
    if checkpointed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-4, fused=True)
    follow_optimizer(model, optimizer)
    return model, prepared, optimizer


def _spec() -> Any:
    from finetune_api.spec import FineTuneJobSpec

    source = {"model": {"source": "builtin://smollm2-135m"}, "dataset": {"source": "builtin://python-docs"}}
    return FineTuneJobSpec.model_validate(source | {"outputs": {"destinations": [{"uri": "file:///nowhere"}]}})


def _folder(name: str) -> Path:
    """The model on the disk; the wide one is made once, with random weights."""
    from finetune_trainer.context import user_cache
    from finetune_trainer.sources import builtin
    from transformers import LlamaConfig, LlamaForCausalLM

    cache = user_cache()
    if name == MODELS[0]:
        return builtin.fetch_model(cache, print)
    folder = cache / "bench" / "llama-2x1024"
    if not (folder / "config.json").exists():
        settings = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 32000}
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


@contextmanager
def _peak_of(phase: str, peaks: dict[str, int], before: int) -> Iterator[None]:
    Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the peak so far
    yield
    peaks[phase] = _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _in_a_process(case: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore::FutureWarning", __file__, "--case", str(case)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _commit() -> str:
    """The commit, with a + where files of the tree have changed since."""
    commit, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "trainer", "crds", "benchmarks/memory.py"))
    )
    return commit + ("+" if changed else "")


if __name__ == "__main__":
    main()

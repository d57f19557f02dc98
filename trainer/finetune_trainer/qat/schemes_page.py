"""docs/schemes.md, generated from the table of schemes and from what benchmarks/schemes.py has measured: `python -m finetune_trainer.qat.schemes_page`.

A test holds the page to both.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from finetune_api.spec import Scheme

from finetune_trainer.qat.fit import LEAST_COVERAGE
from finetune_trainer.qat.schemes import SCHEMES, SchemeInfo

_ROOT = Path(__file__).parents[3]
DOCS_FILE = _ROOT / "docs" / "schemes.md"
RESULTS_FILE = _ROOT / "benchmarks" / "results" / "schemes.json"

_HEAD = f"""<!-- Generated from the table of schemes and from benchmarks/results/schemes.json by `make crd`; do not edit. -->
# Quantization schemes

`quantization.scheme` says how the weights of the linear layers are stored, and whether their inputs are quantized too. All schemes train, convert and are
proved on any machine, a GPU is not needed for that; where the result runs differs. The output head and the embeddings stay as they are.

Layers whose sizes do not fit a scheme stay unquantized and are listed; a scheme that fits less than {LEAST_COVERAGE:.0%} of a model's linear weights is
refused in preflight, with the schemes and group sizes that fit. `int4` takes the group size of 128, 64 and 32 that covers most weights (of equals the largest),
unless `quantization.groupSize` says otherwise.

| scheme | what it is for | runs on |
|---|---|---|
"""
_FORMATS = """
## What is stored

Every scheme has one quantizer, which serves training and export alike and gives the bits of torchao 0.18's own tensor class. Bytes per weight are those of a
1,024 x 1,024 layer in bfloat16, scales included. "Proof" is what the proof on a CPU compares: of the weights always every bit; the logits through
the kernel where one runs there. Where none does, they are those of the dequantized weights, and status says `weights; kernel not run`.

| scheme | weights | layer's input | group | bytes per weight | tensor class (torchao) | proof on a CPU |
|---|---|---|---|---|---|---|
"""
_NOTES = """
- `int4`, `fp8-int4` and `fp8-fp8` are served in bfloat16: set `model.dtype: bfloat16`, which is the default on a GPU. Trained in float32, the default on a CPU,
  the model reads and writes float32, which those kernels do not take.
- A token of zeros, such as padding, stays zero under every scheme.
- What is proved on a CPU is the file. The proof on a GPU also holds each layer's kernel against training, within rounding, and fails the job where they differ; it ran on an
  H200 for every scheme. Uncompiled, `int8`, `int8-int4` and `fp8-fp8` are slower there than 16 bits (up to 33 times, least with many tokens); `int4` gained with 16 tokens only,
  `fp8-int4` with 4,096 only ([BENCHMARKS.md](../BENCHMARKS.md)).
"""

LOSSES = ("base", "tuned", "nearest", "ptq", "quantized")
"""Columns of the table of measurements, by their names in a report."""

_UNMEASURED = "\nSize and held-out loss of each scheme on SmolLM2-135M have not been measured yet: `make bench-schemes` does it.\n"


def known_results() -> dict[str, Any] | None:
    """What benchmarks/schemes.py has measured; None before it has."""
    return json.loads(RESULTS_FILE.read_text(encoding="utf-8")) if RESULTS_FILE.exists() else None


def schemes_markdown(results: dict[str, Any] | None) -> str:
    """The page."""
    purposes = (f"| `{scheme.value}` | {info.purpose} | {info.served_by} |\n" for scheme, info in SCHEMES.items())
    return _HEAD + "".join(purposes) + _FORMATS + "".join(_format_rows()) + _NOTES + (_measured(results) if results else _UNMEASURED)


def bytes_per_weight(info: SchemeInfo, group_size: int | None) -> float:
    """Of a shipped tensor, scales included."""
    weight = torch.zeros(1024, 1024, dtype=torch.bfloat16)
    quantizer = info.quantizer(group_size)
    tensor = info.tensor(quantizer.quantize(weight), quantizer.block(1024))
    parts, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in parts) / weight.numel()


def _format_rows() -> Iterator[str]:
    for scheme, info in SCHEMES.items():
        sizes = sorted({bytes_per_weight(info, group) for group in info.group_sizes or (None,)})
        groups = " or ".join(str(group) for group in info.group_sizes) or "a row"
        proof = "weights and logits" if info.runs_on_cpu else "weights; kernel not run"
        stored = " to ".join(f"{size:.2f}" for size in (sizes[0], sizes[-1])[: len(sizes)])
        yield f"| `{scheme.value}` | {info.weights} | {_input(info)} | {groups} | {stored} | {info.tensor_name} | {proof} |\n"


def _input(info: SchemeInfo) -> str:
    if info.activations is None:
        return "as it is"
    dtype = info.activations.quantize(torch.zeros(1, 2)).codes.dtype
    return f"{str(dtype).removeprefix('torch.').partition('_')[0]} per token"


def _measured(results: dict[str, Any]) -> str:
    float32 = max(row["bytes"]["bytes_before"] for row in results["schemes"].values() if "bytes" in row)
    head = (
        "\n## Measured\n\n"
        f'`make bench-schemes`: {_described(results)}. Held-out loss in nats per token. The tuned model is the same in each run; "nearest" is the tuned model\n'
        "quantized with nearest values, PTQ with scales and rounding chosen, QAT the shipped one behind the last steps, so it has also seen more rows. One seed:\n"
        "differences of 0.01 mean nothing. The model's own weights were once rounded to 4 bits (Q4_1), which flatters 4-bit schemes.\n\n"
        f"| scheme | weight files, MB (float32 without a scheme: {float32 / 1e6:.0f}) | base | tuned | nearest | PTQ | QAT (shipped) | proof |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    rows = (_measured_row(scheme, results["schemes"][scheme.value]) for scheme in SCHEMES if scheme.value in results["schemes"])
    return head + "".join(rows)


def _described(results: dict[str, Any]) -> str:
    spec, steps = results["spec"], {row["steps"] for row in results["schemes"].values() if "steps" in row}
    training = spec["training"]
    return (
        f"`{spec['model']['source']}` on `{spec['dataset']['source']}`, {' or '.join(str(count) for count in sorted(steps))} steps of "
        f"{training['batchSize']} rows of at most {training['maxLength']} tokens, the last {spec['quantization']['qatPercent']} % of the steps under QAT, LoRA of rank {spec['lora']['rank']}, float32 on a CPU"
    )


def _measured_row(scheme: Scheme, row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| `{scheme.value}` | refused: {row['refused'].rpartition('spec.quantization: ')[2]} | | | | | | |\n"
    losses = " | ".join("as PTQ" if row["losses"][name] is None else f"{row['losses'][name]:.3f}" for name in LOSSES)
    return f"| `{scheme.value}` | {row['bytes']['bytes_after'] / 1e6:.0f} | {losses} | {row['verifiedBy']} |\n"


if __name__ == "__main__":
    DOCS_FILE.write_text(schemes_markdown(known_results()), encoding="utf-8")

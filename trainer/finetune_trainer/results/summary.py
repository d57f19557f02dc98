"""What a person sees at the end of a run (losses, sizes, the proof, and where everything lies), and of a preflight (what the run would be)."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api import names
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from finetune_trainer.memory.report import Told
    from finetune_trainer.stages.data import Cuts, Data
    from finetune_trainer.stages.rehearse import Rehearsed

PARTS = ("weights", "adapter", "optimizer", "quantization", "activations", "peak")


def print_summary(report: dict[str, Any], workdir: Path, destinations: list[str]) -> None:
    """Prints the report's figures as a table."""
    _print_table([*_losses(report), *_sizes(report), *_proof(report), *_places(report, workdir, destinations)])


def print_preflight(found: "Rehearsed", destinations: list[str]) -> None:
    """Prints what was checked as a table."""
    data, steps = found.data, found.plan
    adapt = f", the last {steps.steps - steps.switch_step} of them quantization-aware" if steps.switch_step < steps.steps else ""
    _print_table(
        [
            ("model", f"{found.model}: {found.parameters / 1e6:,.0f} million parameters, {found.adapted / 1e6:,.1f} million more to train"),
            (
                "data",
                f"{data.resolved}: {len(data.train)} rows to train on, {len(data.held_out)} held out{_leak(data)}, {_cuts(data.cuts)}",
            ),
            ("training", f"{steps.steps} optimizer steps{adapt}"),
            ("memory", found.needed.sentence if found.needed else "not estimated"),
            ("may write to", ", ".join(destinations)),
            ("preflight", "nothing speaks against this job"),
        ]
    )


def _leak(data: "Data") -> str:
    return f" ({data.also_trained} of them also trained on)" if data.also_trained else ""


def _cuts(cuts: "Cuts") -> str:
    lost = f" ({cuts.tokens} trained tokens lost)" if cuts.tokens else ""
    return f"{cuts.dropped} dropped, {cuts.cut} cut{lost}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def _print_table(rows: list[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in rows:
        table.add_row(Text(label), Text(value))  # as it is: what a model or a file says may look like rich's markup
    console = Console(highlight=False)
    console.print()
    console.print(table)


def _losses(report: dict[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "base": "held-out loss, base model",
        "tuned": "  tuned (LoRA, not quantized)",
        "nearest": "  tuned, then quantized with nearest values",
        "ptq": "  tuned, then quantized (PTQ)",
        "quantized": "  shipped quantized model",
        "adapter": "  its adapter, not quantized",
    }
    losses = report["losses"]
    rows = [(label, f"{losses[name]:.4g}") for name, label in labels.items() if losses.get(name) is not None]
    shares = {"nearest_recovered": "  of the nearest values' damage taken back", "recovered": "  of PTQ's damage taken back"}
    rows += [(label, f"{losses[name]:.0%}") for name, label in shares.items() if losses.get(name) is not None]
    if losses.get("agreement") is not None:
        rows.append(("  same first choice as the tuned model", f"{losses['agreement']:.0%} of the tokens"))
    return rows


def _sizes(report: dict[str, Any]) -> list[tuple[str, str]]:
    sizes, qat = report["bytes"], report["qat"]
    if not sizes or not qat:
        return []
    ratio = sizes["bytes_before"] / sizes["bytes_after"]
    return [
        ("weights before and after", f"{sizes['bytes_before'] / 1e6:.0f} MB -> {sizes['bytes_after'] / 1e6:.0f} MB ({ratio:.1f}x smaller)"),
        ("quantized", f"{qat['layers']} linear layers, {qat['coverage']:.0%} of the linear weights, {qat['scheme']}"),
    ]


def _proof(report: dict[str, Any]) -> list[tuple[str, str]]:
    proof = report["proof"]
    if not proof:
        return []
    largest = f"largest logit difference {proof['max_logit_difference']}"
    weights = (
        f"{proof['weights']} weights equal bit for bit" if proof["weights_equal"] else f"not all of {proof['weights']} weights are equal"
    )
    return [
        (f"proof: shipped {'=' if proof['holds'] else '≠'} trained", f"{weights}, {largest}{_kernel(proof)}"),
        ("the shipped model writes", proof["generated"].replace("\n", " ")[:160] or "nothing"),
    ]


def _kernel(proof: dict[str, Any]) -> str:
    if not proof["kernel"]:
        return " (of the dequantized weights: no kernel of this scheme runs on this machine)"
    if proof["kernel_error"] is None:
        return f" ({proof['kernel']})"
    return f" ({proof['kernel']} adds at most {proof['kernel_error']:.2g} rounding steps)"


def _places(report: dict[str, Any], workdir: Path, destinations: list[str]) -> list[tuple[str, str]]:
    places = [
        ("checkpoints", names.OUTPUTS),
        ("adapter (peft)", names.ADAPTER),
        ("quantized model (torchao)", names.QUANTIZED),
        ("report", names.REPORT),
    ]
    rows = [(label, str(workdir / place)) for label, place in places if (workdir / place).exists()]
    return [
        *rows,
        ("published to", ", ".join(destinations)),
        *(("slow", sentence) for sentence in report.get("hints", ())),
        ("seconds", ", ".join(f"{stage} {value:.0f}" for stage, value in report["seconds"].items())),
    ]


def print_estimate(told: "Told") -> None:
    """Prints an estimate's parts, and which micro-batch fits where."""
    parts = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", *PARTS):
        parts.add_column(title, justify="left" if not title else "right")
    for name, needed in told.one_row.items():
        parts.add_row(name, *(_gigabytes(getattr(needed, part)) for part in PARTS))
    places = Table("place", "memory", "micro-batch", "peak", box=None, padding=(0, 2, 0, 0))
    for place in told.places:
        fitted = ("does not fit", "") if place.needed is None else (str(place.needed.rows), _gigabytes(place.needed.peak))
        places.add_row(place.name, _gigabytes(place.room), *fitted)
    console = Console(highlight=False)
    console.print(
        f"{told.model}: {told.parameters / 1e6:,.0f} million parameters; one row of {told.tokens} tokens needs",
        soft_wrap=True,
        markup=False,
    )
    for table in (parts, places):
        console.print()
        console.print(table)

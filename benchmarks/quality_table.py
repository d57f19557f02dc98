"""The tables of `make bench-quality`, from the cells' JSON files alone. Pure; every interval is a paired bootstrap over held-out rows, 95 % two-sided."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetune_trainer.held_out import RowLosses, mean_loss
from finetune_trainer.stages.evaluate import Interval, difference, is_significant

_RESAMPLES = 1000
PTQ = ("largest", "least squares", "rounding")
GOALS = {"recovered": 0.85, "time": 1.25}


@dataclass(frozen=True)
class Cell:
    """One finished training.

    Attributes:
        losses: rows by model.
        cpu_seconds: of its process in training steps; the machine may have been shared.
    """

    recipe: dict[str, Any]
    losses: dict[str, RowLosses]
    cpu_seconds: float
    agreement: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Exact QAT on one data set, grid and seed, against what plain LoRA and split QAT reach with the same rows and steps.

    Attributes:
        recovered: share of the loss that PTQ with largest-value scales costs plain LoRA; None where that is not significant.
        over_split: interval of exact's loss above split's; None without a split cell.
        time: CPU seconds, plain LoRA's = 1.
    """

    lora: Cell
    exact: Cell
    split: Cell | None
    bits: int
    recovered: float | None
    interval: Interval
    over_split: Interval | None
    time: float


def table(results: Path) -> str:
    """Markdown: what was tried, the grid, and the goals."""
    cells = read(results)
    parts = [tried_table(cells), grid_table(compare(cells)), goals_table(compare(cells))]
    return "\n\n".join(part for part in parts if part) or "No cell is finished."


def read(results: Path) -> dict[str, Cell]:
    """The finished cells by name."""
    found = {}
    for path in sorted(results.glob("*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        losses = {name: list(zip(rows, kept["tokens"], strict=True)) for name, rows in kept["losses"].items()}
        found[path.stem] = Cell(kept["recipe"], losses, kept["cpuSeconds"], kept["agreement"])
    return found


def compare(cells: dict[str, Cell]) -> list[Comparison]:
    """Every exact cell of the grid whose LoRA cell is finished too."""
    found = []
    for name, exact in cells.items():
        place, _, kind = name.rpartition("-")
        lora = cells.get(f"{place.rpartition('-')[0]}-lora")
        if kind != "exact" or lora is None:
            continue
        split, bits, seed = cells.get(f"{place}-split"), int(exact.recipe["bits"]), int(exact.recipe["seed"])
        tuned, ptq, shipped = lora.losses["tuned"], lora.losses[f"ptq {bits} largest"], exact.losses["quantized"]
        damaged = is_significant(difference(ptq, tuned, seed))
        over_split = difference(shipped, split.losses["quantized"], seed) if split else None
        share, interval = recovery(tuned, ptq, shipped)
        time = exact.cpu_seconds / lora.cpu_seconds
        found.append(Comparison(lora, exact, split, bits, share if damaged else None, interval, over_split, time))
    return found


def recovery(tuned: RowLosses, ptq: RowLosses, shipped: RowLosses) -> tuple[float, Interval]:
    """(PTQ - shipped) / (PTQ - tuned) and its interval."""
    losses = torch.tensor([[total for total, _ in rows] for rows in (tuned, ptq, shipped)], dtype=torch.float64)
    drawn = torch.randint(len(tuned), (_RESAMPLES, len(tuned)), generator=torch.Generator().manual_seed(0))
    at = torch.stack([losses.sum(1), *losses[:, drawn].sum(2).T])
    shares = (at[:, 1] - at[:, 2]) / (at[:, 1] - at[:, 0])
    return float(shares[0]), [float(shares[1:].quantile(0.025)), float(shares[1:].quantile(0.975))]


def grid_table(found: list[Comparison]) -> str:
    """One row for each data set, grid and seed."""
    if not found:
        return ""
    head = [
        "data, bits, seed",
        "base",
        "LoRA",
        "its PTQ",
        "least squares",
        "rounding",
        "split QAT",
        "exact",
        "recovered",
        "exact - split",
        "time",
    ]
    return _markdown(head, [_grid_row(item) for item in found])


def goals_table(found: list[Comparison]) -> str:
    """The goals against the mean over seeds of each data set and grid."""
    rows = []
    for place in dict.fromkeys((item.exact.recipe["data"], item.bits) for item in found):
        group = [item for item in found if (item.exact.recipe["data"], item.bits) == place]
        shares = [item.recovered for item in group if item.recovered is not None]
        mean = sum(shares) / len(shares) if shares else None
        better = [item.over_split[1] < 0 for item in group if item.over_split]
        time = sum(item.time for item in group) / len(group)
        rows.append(
            [
                f"{place[0]}, {place[1]} bits, {len(group)} seeds",
                "not significant" if mean is None else f"{mean:.0%} ({_verdict(mean >= GOALS['recovered'])})",
                f"{sum(better)} of {len(better)} ({_verdict(all(better))})" if better else "",
                f"{time:.2f} ({_verdict(time <= GOALS['time'])})",
            ]
        )
    head = ["mean over seeds", "recovered, goal 85 %", "significantly better than split QAT", "time, LoRA = 1, goal 1.25"]
    return _markdown(head, rows) if rows else ""


def tried_table(cells: dict[str, Cell]) -> str:
    """What was tried, in comparison with the first of its kind."""
    tried = {name: cell for name, cell in cells.items() if name.startswith("tried-") and "quantized" in cell.losses}
    lora = cells.get("tried-50-steps-plain-LoRA")
    if not tried or lora is None:
        return ""
    first = cells.get("tried-half-one-cosine", next(iter(tried.values())))
    rows = []
    for name, cell in tried.items():
        share, interval = recovery(lora.losses["tuned"], lora.losses["ptq 4 largest"], cell.losses["quantized"])
        apart = difference(cell.losses["quantized"], first.losses["quantized"], 0)
        at_switch = cell.losses.get("at the switch")
        rows.append(
            [
                name.removeprefix("tried-").replace("-", " "),
                f"{mean_loss(at_switch):.3f}" if at_switch else "",
                f"{mean_loss(cell.losses['quantized']):.3f}",
                f"{share:.0%} {_percent(interval)}",
                "" if cell is first else _signed(apart),
                f"{cell.cpu_seconds / lora.cpu_seconds:.2f}",
            ]
        )
    return _markdown(["tried", "at the switch", "shipped", "recovered", "against the first", "time, LoRA = 1"], rows)


def _grid_row(item: Comparison) -> list[str]:
    lora, recipe = item.lora.losses, item.exact.recipe
    return [
        f"{recipe['data']}, {item.bits}, {recipe['seed']}",
        *(f"{mean_loss(lora[name]):.3f}" for name in ("base", "tuned", *(f"ptq {item.bits} {kind}" for kind in PTQ))),
        f"{mean_loss(item.split.losses['quantized']):.3f}" if item.split else "",
        f"{mean_loss(item.exact.losses['quantized']):.3f}",
        "" if item.recovered is None else f"{item.recovered:.0%} {_percent(item.interval)}",
        _signed(item.over_split),
        f"{item.time:.2f}",
    ]


def _percent(interval: Interval) -> str:
    return f"[{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"


def _signed(interval: Interval | None) -> str:
    return "" if interval is None else f"[{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _verdict(holds: bool) -> str:
    return "holds" if holds else "**missed**"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))

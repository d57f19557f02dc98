"""make bench-quality measures what it says: the rotated model is the same function, the tables do their sums, a stopped cell goes on."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.example import Example
from support.tiny_model import save_tiny_model, tiny_llama

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

import quality_cell
import quality_model
import quality_table
from quality_data import Rows

HELD_OUT = 3


def test_the_rotation_leaves_the_function_and_changes_the_weights() -> None:
    model, ids = tiny_llama(dtype=torch.float64), torch.arange(40)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.linspace(0.5, 2, parameter.numel()))
        before, weight = model(input_ids=ids).logits, model.model.layers[0].mlp.up_proj.weight.clone()
        quality_model.rotate(model)
        after = model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # Llama's norms compute in float32
    assert float((model.model.layers[0].mlp.up_proj.weight.detach() - weight).abs().max()) > 0.01
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def cell(method: str, seed: int = 0, cpu_seconds: float = 100, **losses: float) -> quality_table.Cell:
    rows = {name.replace("_", " "): [(loss * 5 + index % 3, 5) for index in range(20)] for name, loss in losses.items()}
    return quality_table.Cell({"data": "text", "seed": seed, "method": method, "bits": 4}, rows, cpu_seconds, {})


CELLS: dict[str, Any] = {
    "text-0-lora": cell("lora", base=3, tuned=2, ptq_4_largest=2.5, ptq_4_least_squares=2.4, ptq_4_rounding=2.2),
    "text-0-4bit-exact": cell("exact", cpu_seconds=120, quantized=2.05),
    "text-0-4bit-split": cell("split", quantized=2.2),
}


def test_a_comparison_says_how_much_came_back_and_what_it_cost() -> None:
    (found,) = quality_table.compare(CELLS)
    assert found.recovered == pytest.approx(0.9)
    assert found.interval == pytest.approx([0.9, 0.9])
    assert found.time == pytest.approx(1.2)
    assert found.over_split is not None
    assert found.over_split[1] < 0
    goals = quality_table.goals_table([found])
    assert "90% (holds) | 1 of 1 (holds) | 1.20 (holds)" in goals


def test_where_ptq_costs_nothing_nothing_is_recovered() -> None:
    harmless = CELLS | {"text-0-lora": cell("lora", base=3, tuned=2, ptq_4_largest=2, ptq_4_least_squares=2, ptq_4_rounding=2)}
    (found,) = quality_table.compare(harmless)
    assert found.recovered is None
    assert "not significant" in quality_table.goals_table([found])


def test_a_cell_without_its_reference_waits_for_it() -> None:
    assert quality_table.compare({name: found for name, found in CELLS.items() if "lora" not in name}) == []


@pytest.fixture
def tiny_cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tiny model and tiny rows in place of SmolLM2 and text."""

    def rows(_name: str, seed: int, train: int, held_out: int, _tokenizer: object) -> Rows:
        made = tuple(_example(seed + index) for index in range(train + held_out))
        return Rows(made[held_out:], made[:held_out], "digest")

    model = save_tiny_model(tmp_path / "model")
    monkeypatch.setattr(quality_cell, "rotated_model", lambda _: model)
    monkeypatch.setattr(quality_cell, "rows", rows)
    monkeypatch.setattr(quality_cell, "HELD_OUT", HELD_OUT)
    monkeypatch.setattr(quality_cell, "_SAVE_EVERY", 1)


def _example(index: int) -> Example:
    tokens = [(7 * index + place) % 50 + 5 for place in range(8)]
    return Example(tuple(tokens), (-100, -100, *tokens[2:]))


@pytest.mark.usefixtures("tiny_cells")
@pytest.mark.parametrize(
    ("recipe", "models"),
    [
        pytest.param(
            {"method": "lora"},
            {"base", "tuned", *(f"ptq {bits} {kind}" for bits in (4, 3) for kind in quality_table.PTQ)},
            id="lora",
        ),
        pytest.param({"method": "exact", "bits": 3, "switch": 1}, {"at the switch", "quantized"}, id="exact"),
        pytest.param({"method": "exact", "bits": 4, "switch": 1, "rounding": True}, {"at the switch", "quantized"}, id="rounding"),
        pytest.param({"method": "split", "bits": 4}, {"as trained", "quantized"}, id="split"),
    ],
)
def test_a_cell_comes_to_its_end_and_to_the_same_one_after_a_stop(tmp_path: Path, recipe: dict[str, Any], models: set[str]) -> None:
    wanted = quality_cell.Recipe("text", 0, steps=2, **recipe)
    whole = quality_cell.make(wanted, tmp_path / "undisturbed", lambda _: None)
    assert set(whole["losses"]) == models
    assert all(len(losses) == HELD_OUT and min(losses) > 0 for losses in whole["losses"].values())
    with pytest.raises(quality_cell.Paused):
        quality_cell.make(wanted, tmp_path / "stopped", lambda _: None, until=0.0)
    assert quality_cell.make(wanted, tmp_path / "stopped", lambda _: None)["losses"] == whole["losses"]


@pytest.mark.usefixtures("tiny_cells")
def test_fewer_bits_cost_more(tmp_path: Path) -> None:
    losses = quality_cell.make(quality_cell.Recipe("text", 0, "lora", steps=1), tmp_path, lambda _: None)["losses"]
    away = {bits: sum(abs(one - two) for one, two in zip(losses[f"ptq {bits} largest"], losses["tuned"], strict=True)) for bits in (3, 4)}
    assert away[3] > away[4] > 0

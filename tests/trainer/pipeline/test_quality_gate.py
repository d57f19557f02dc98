"""The gate's decisions, from measured losses and intervals alone."""

from typing import Any

import pytest
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.held_out import HeldOut, by_row, mean_loss
from finetune_trainer.quality_gate import shortfall
from finetune_trainer.stages.evaluate import agreement, difference, is_significant, recovered
from support.run_contexts import run_spec

MEASURED = {"base": 3.0, "tuned": 2.0, "ptq": 2.5, "quantized": 2.1, "shipped_over_ptq": [-0.5, -0.3], "shipped_over_base": [-1.0, -0.8]}


@pytest.mark.parametrize(
    ("limit", "changes", "expected"),
    [
        (None, {}, ""),
        ("5.1", {}, ""),
        ("4.9", {}, "quality.maxLossIncreasePercent allows 4.9 %"),
        (None, {"shipped_over_ptq": [0.01, 0.2]}, "above what quantization after training would have shipped (2.5)"),
        (None, {"shipped_over_ptq": [-0.01, 0.2]}, ""),
        (None, {"shipped_over_base": [0.01, 0.2]}, "above the base model's (3)"),
        (None, {"shipped_over_base": [0.0, 0.2]}, ""),
        (None, {"quantized": None, "shipped_over_ptq": None, "shipped_over_base": [0.01, 0.2]}, "(2) is significantly above the base"),
        (
            None,
            {"adapter": 3.1, "adapter_over_base": [0.01, 0.2]},
            "shipped adapter's held-out loss on the base model that is not quantized (3.1)",
        ),
        (None, {"adapter": 2.9, "adapter_over_base": [-0.2, -0.1]}, ""),
        ("1", dict.fromkeys(MEASURED), ""),
    ],
)
def test_the_first_thing_that_falls_short_is_said(limit: str | None, changes: dict[str, Any], expected: str) -> None:
    found = shortfall(spec(limit), MEASURED | changes)
    assert expected in found
    assert bool(found) == bool(expected)


def spec(limit: str | None = None, artifacts: tuple[str, ...] = ("adapter", "quantized")) -> FineTuneJobSpec:
    """Of a job with this gate that ships these."""
    written = run_spec(quality={"maxLossIncreasePercent": limit})
    written["outputs"]["artifacts"] = artifacts
    return FineTuneJobSpec.model_validate(written)


def test_an_adapter_that_is_not_shipped_stops_nothing() -> None:
    """To leave it out is what the sentence advises."""
    losses = MEASURED | {"adapter": 3.1, "adapter_over_base": [0.01, 0.2]}
    assert "leave adapter out of outputs.artifacts" in shortfall(spec(), losses)
    assert shortfall(spec(artifacts=("quantized",)), losses) == ""


ROWS = [(10.0 + index % 3, 5) for index in range(20)]
HIGHER = [(loss + 1.0 + index % 2, tokens) for index, (loss, tokens) in enumerate(ROWS)]


def test_an_interval_lies_around_the_difference_of_the_means() -> None:
    low, high = difference(HIGHER, ROWS, seed=0) or [0.0, 0.0]
    assert 0.2 < low < 0.3 < high < 0.4
    assert is_significant([low, high])
    assert not is_significant(difference(ROWS, HIGHER, seed=0))
    assert not is_significant(difference(ROWS, ROWS, seed=0))


def test_the_parts_of_a_row_are_no_independent_draws() -> None:
    """Four parts of each row that say the same are as sure as one; counted by themselves they would look twice as sure."""
    parts = [[losses[index] for index in range(len(losses)) for _ in range(4)] for losses in (HIGHER, ROWS)]
    rows = [by_row(losses, [4] * len(ROWS)) for losses in parts]
    assert difference(*rows, seed=0) == pytest.approx(difference(HIGHER, ROWS, seed=0))
    (low, high), (low_parts, high_parts) = difference(*rows, seed=0) or (0, 0), difference(*parts, seed=0) or (0, 0)
    assert high_parts - low_parts < 0.7 * (high - low)
    assert mean_loss(by_row(ROWS, [1, 4, 15])) == pytest.approx(mean_loss(ROWS))
    assert by_row(ROWS, [1] * len(ROWS)) == ROWS
    assert difference(by_row(HIGHER, [20]), by_row(ROWS, [20]), seed=0) is None


def test_a_handful_of_rows_shows_nothing() -> None:
    assert difference(HIGHER[:5], ROWS[:5], seed=0) is None
    assert difference(HIGHER[:6], ROWS[:6], seed=0) is not None


def test_recovered_is_said_only_where_ptq_did_damage() -> None:
    halfway = [((high + low) / 2, tokens) for (high, tokens), (low, _) in zip(HIGHER, ROWS, strict=True)]
    assert recovered(ROWS, HIGHER, halfway, seed=0) == pytest.approx(0.5)
    assert recovered(ROWS, ROWS, halfway, seed=0) is None
    assert recovered(HIGHER, ROWS, halfway, seed=0) is None


def test_agreement_counts_equal_first_choices() -> None:
    assert agreement(HeldOut(ROWS, [1, 2, 3, 4]), HeldOut(ROWS, [1, 2, 0, 4])) == 0.75

"""The step plan: whole micro-batches, a switch within the training, a warm-up that ends."""

from typing import Any

import pytest
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.plan import MICRO_BATCH_TOKENS, Plan, largest_divisor, plan
from hypothesis import given
from hypothesis import strategies as st
from support.run_contexts import run_spec

ROWS, LONGEST = st.integers(1, 100_000), st.integers(1, 100_000)
TRAINING = st.fixed_dictionaries({"epochs": st.integers(1, 1000), "batchSize": st.integers(1, 65536)})
PERCENT = st.integers(0, 100)


def planned(training: dict[str, Any] | None = None, percent: int = 50, rows: int = 100, longest: int = 128, scheme: str = "int8") -> Plan:
    spec = run_spec(training=training or {}, quantization={"scheme": scheme, "qatPercent": percent})
    return plan(FineTuneJobSpec.model_validate(spec), rows, longest)


@given(training=TRAINING, rows=ROWS, longest=LONGEST)
def test_micro_batches_make_up_the_batch_exactly(training: dict[str, int], rows: int, longest: int) -> None:
    found = planned(training, rows=rows, longest=longest)
    assert found.micro_batch * found.accumulation == training["batchSize"]


@given(training=TRAINING, rows=ROWS, longest=LONGEST)
def test_a_micro_batch_holds_at_most_its_tokens_or_one_row(training: dict[str, int], rows: int, longest: int) -> None:
    found = planned(training, rows=rows, longest=longest)
    assert found.micro_batch == 1 or found.micro_batch * longest <= MICRO_BATCH_TOKENS


@given(training=TRAINING, rows=ROWS)
def test_every_epoch_sees_every_row(training: dict[str, int], rows: int) -> None:
    epoch = planned(training, rows=rows).steps // training["epochs"]
    assert (epoch - 1) * training["batchSize"] < rows <= epoch * training["batchSize"]


@given(training=TRAINING, rows=ROWS, percent=PERCENT)
def test_the_switch_lies_within_the_training(training: dict[str, int], rows: int, percent: int) -> None:
    found = planned(training, percent, rows)
    assert 0 <= found.switch_step <= found.steps


@pytest.mark.parametrize(
    ("steps", "percent", "quantized"),
    [
        (100, 20, 20),
        (100, 1, 1),
        (101, 20, 21),
        (7, 50, 4),
        (10, 100, 10),
        (10, 99, 9),
        (2, 99, 1),
        (2, 20, 1),
        (1, 20, 1),
        (1, 0, 0),
        (3, 0, 0),
    ],
)
def test_the_quantized_steps_are_their_share_rounded_up_and_leave_one_before_them(steps: int, percent: int, quantized: int) -> None:
    found = planned({"batchSize": 1}, percent, rows=steps)
    assert (found.steps, found.steps - found.switch_step) == (steps, quantized)


@given(training=TRAINING, rows=ROWS, percent=st.integers(1, 99))
def test_some_percent_is_some_of_several_steps_and_never_all(training: dict[str, int], rows: int, percent: int) -> None:
    found = planned(training, percent, rows)
    assert 0 < found.switch_step < found.steps or (found.steps, found.switch_step) == (1, 0)


@given(training=TRAINING, rows=ROWS)
def test_all_percent_quantizes_from_the_first_step(training: dict[str, int], rows: int) -> None:
    assert planned(training, 100, rows).switch_step == 0


@given(training=TRAINING, rows=ROWS)
def test_zero_percent_never_switches(training: dict[str, int], rows: int) -> None:
    found = planned(training, 0, rows)
    assert found.switch_step == found.steps


@given(percent=PERCENT, rows=ROWS)
def test_without_a_scheme_nothing_switches(percent: int, rows: int) -> None:
    found = planned(percent=percent, rows=rows, scheme="none")
    assert found.switch_step == found.steps


@pytest.mark.parametrize("percent", [1, 50, 99, 100])
def test_a_single_step_is_quantized_when_any_is(percent: int) -> None:
    found = planned(percent=percent, rows=1)
    assert (found.steps, found.switch_step) == (1, 0)


@given(training=TRAINING, rows=ROWS)
def test_the_warm_up_has_a_step_and_ends(training: dict[str, int], rows: int) -> None:
    found = planned(training, rows=rows)
    assert 1 <= found.warmup_steps <= found.steps


@given(number=st.integers(1, 70_000), limit=st.integers(1, 70_000))
def test_the_largest_divisor_divides_and_none_between_it_and_the_limit_does(number: int, limit: int) -> None:
    found = largest_divisor(number, limit)
    assert number % found == 0
    assert found <= limit
    assert not [size for size in range(found + 1, min(number, limit) + 1) if number % size == 0]

"""The learning rate rises, falls along a cosine, and falls once more from the switch where a peak is wanted there."""

import pytest
from finetune_trainer.schedule import rate_factor
from hypothesis import given
from hypothesis import strategies as st

COUNTS = st.integers(1, 200)


@given(steps=COUNTS, switch=st.integers(0, 250), warmup=st.integers(0, 20), peak=st.sampled_from([0.0, 0.4, 1.0, 2.0]))
def test_no_step_is_wasted_and_none_goes_above_its_peak(steps: int, switch: int, warmup: int, peak: float) -> None:
    factors = [rate_factor(step, steps, min(switch, steps), warmup, peak) for step in range(steps)]
    assert all(0 < factor <= max(1.0, peak) for factor in factors)


def test_one_cosine_over_both_phases() -> None:
    factors = [rate_factor(step, 10, 5, 2, 0.0) for step in range(10)]
    assert factors[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors == [rate_factor(step, 10, 10, 2, 1.0) for step in range(10)]


def test_the_second_phase_has_a_peak_of_its_own_and_the_first_goes_as_if_there_were_none() -> None:
    factors = [rate_factor(step, 20, 12, 2, 0.4) for step in range(20)]
    assert factors[:12] == [rate_factor(step, 20, 20, 2, 0.0) for step in range(12)]
    assert factors[12:] == [0.4 * rate_factor(step, 8, 8, 0, 0.0) for step in range(8)]

"""Hints about slow runs: only from what was measured, only where it is large, and never for a run that was not slow."""

import pytest
from finetune_trainer.results.hints import CPU_SECONDS, KINDS, LARGE_SHARE, LEAST_SECONDS, Measured, hints
from hypothesis import given
from hypothesis import strategies as st
from support.slow_runs import CASES, QUICK

STAGES = ("Preflight", "Loading", "Training", "Evaluating", "Converting", "Verifying")
SECONDS = st.floats(0, 1e6, allow_nan=False)
MEASURED = st.builds(
    Measured,
    stages=st.dictionaries(st.sampled_from(STAGES), SECONDS),
    parts=st.dictionaries(st.sampled_from(("model", "data", "rounding", "switch", "mirror")), SECONDS),
    steps=st.integers(0, 10**6),
    device=st.sampled_from(("cpu", "cuda")),
    dtype=st.sampled_from(("float32", "bfloat16")),
    computes_bfloat16=st.booleans(),
    threads=st.integers(1, 256),
    cores=st.integers(1, 256),
    micro_batches=st.integers(1, 64),
    enough=st.integers(1, 64),
    in_cluster=st.booleans(),
    keeps_models=st.booleans(),
)


def test_a_run_that_lacks_nothing_gets_no_hint() -> None:
    assert hints(QUICK) == ()


@pytest.mark.parametrize(("run", "sentence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_was_measured_is_said_with_its_mend(run: Measured, sentence: str) -> None:
    assert hints(run) == (sentence,)


def test_every_kind_of_hint_has_a_case() -> None:
    assert {kind for kind in KINDS for _, run, _ in CASES if kind(run)} == set(KINDS)


@given(MEASURED)
def test_no_run_of_less_than_a_minute_is_called_slow(run: Measured) -> None:
    if run.total < LEAST_SECONDS:
        assert hints(run) == ()


@given(MEASURED)
def test_each_time_that_is_blamed_is_a_large_share_of_the_whole(run: Measured) -> None:
    blamed = {
        "held-out": run.stages.get("Evaluating", 0) + run.parts.get("switch", 0),
        "rounding": run.parts.get("rounding", 0),
        "Mirroring": run.parts.get("mirror", 0),
        "Fetching the model": run.parts.get("model", 0),
        "tokenizing": run.parts.get("data", 0),
    }
    for sentence in hints(run):
        for word, seconds in blamed.items():
            assert word not in sentence or seconds >= LARGE_SHARE * run.total


@given(MEASURED)
def test_how_a_run_was_trained_is_blamed_only_where_training_took_most_of_it(run: Measured) -> None:
    training = run.stages.get("Training", 0)
    for sentence in hints(run):
        if sentence.startswith(("Training", "PyTorch", "A step")):
            assert training >= run.total / 2
            assert run.steps
        assert "on the CPU" not in sentence or training >= CPU_SECONDS


@given(MEASURED)
def test_all_that_is_said_fits_into_a_status_and_is_whole_sentences(run: Measured) -> None:
    said = hints(run)
    assert len(set(said)) == len(said)
    assert len(" ".join(said)) <= 1500
    assert all(sentence.endswith(".") and "\n" not in sentence for sentence in said)

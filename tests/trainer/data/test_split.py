"""Which rows are held out: a share, at most so many, drawn with the seed as it always was; what is equal is never on both sides, or it is said."""

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from finetune_trainer.example import IGNORED, Example
from finetune_trainer.split import MOST_ROWS, Row, also_trained, split
from finetune_trainer.stages import data
from hypothesis import given
from hypothesis import strategies as st
from support.run_contexts import context, notes, run_spec
from support.tiny_model import sums, tiny_tokenizer, write_jsonl

SEEDS = st.integers(0, 2**31 - 1)


def row(number: int) -> list[Example]:
    """A row of one example that is its own."""
    return [Example((number, 7), (IGNORED, 7))]


def rows(count: int) -> list[list[Example]]:
    return [row(number) for number in range(count)]


def numbers(side: tuple[Row, ...]) -> list[int]:
    """The first token of each row."""
    return [examples[0].input_ids[0] for examples in side]


@given(count=st.integers(1, 60), percent=st.integers(0, 50), seed=SEEDS)
def test_a_split_is_complete_and_disjoint_and_keeps_the_order(count: int, percent: int, seed: int) -> None:
    train, held_out = map(numbers, split(rows(count), percent, seed))
    assert sorted(train + held_out) == list(range(count))
    assert (train, held_out) == (sorted(train), sorted(held_out))


@given(count=st.integers(1, 60), percent=st.integers(0, 50), seed=SEEDS)
def test_the_same_seed_splits_the_same(count: int, percent: int, seed: int) -> None:
    assert split(rows(count), percent, seed) == split(rows(count), percent, seed)


@given(count=st.integers(2, 60), percent=st.integers(1, 50), seed=SEEDS)
def test_a_split_holds_out_its_share_rounded_up_and_trains_on_some(count: int, percent: int, seed: int) -> None:
    train, held_out = split(rows(count), percent, seed)
    assert len(held_out) - 1 < count * percent / 100 <= len(held_out)
    assert train


def test_other_seeds_split_otherwise() -> None:
    assert len({tuple(numbers(split(rows(40), 20, seed)[1])) for seed in range(10)}) == 10


def test_nothing_is_held_out_of_a_single_row_or_at_zero_percent() -> None:
    assert split(rows(1), 50, 0) == ((row(0),), ())
    assert split(rows(2), 0, 0)[1] == ()


def test_the_draw_is_the_same_for_ever() -> None:
    assert numbers(split(rows(100), 5, 42)[1]) == [3, 14, 35, 81, 94]


@given(counts=st.lists(st.integers(1, 4), min_size=2, max_size=20), seed=SEEDS)
def test_the_examples_of_a_row_stay_together(counts: list[int], seed: int) -> None:
    several = [[Example((index, number), (IGNORED, number)) for number in range(count)] for index, count in enumerate(counts)]
    sides = split(several, 30, seed)
    assert [numbers(side) for side in sides] == [numbers(side) for side in split(rows(len(counts)), 30, seed)]
    assert all(examples == several[number] for side in sides for number, examples in zip(numbers(side), side, strict=True))


@given(copies=st.lists(st.integers(1, 5), min_size=1, max_size=20), percent=st.integers(1, 50), seed=SEEDS, shuffled=st.randoms())
def test_equal_rows_are_on_one_side(copies: list[int], percent: int, seed: int, shuffled: object) -> None:
    drawn = [number for number, count in enumerate(copies) for _ in range(count)]
    shuffled.shuffle(drawn)  # type: ignore[attr-defined]
    train, held_out = map(numbers, split([row(number) for number in drawn], percent, seed))
    assert set(train).isdisjoint(held_out)
    assert Counter(train + held_out) == Counter(drawn)
    assert train
    assert bool(held_out) == (len(copies) > 1)


def test_copies_of_a_row_hold_out_no_more_rows_than_the_share() -> None:
    many = [row(0)] * 500 + rows(501)[1:]
    assert all(len(split(many, 5, seed)[1]) <= 50 for seed in range(50))


def test_where_every_row_has_more_copies_than_the_share_one_is_held_out_with_them() -> None:
    train, held_out = split([row(number) for number in range(4) for _ in range(10)], 5, 0)
    assert (len(train), len(held_out)) == (30, 10)


def test_a_share_is_at_most_so_many_rows() -> None:
    assert len(split(rows(40 * MOST_ROWS // 2), 5, 0)[1]) == MOST_ROWS
    assert len(split(rows(40 * MOST_ROWS // 2), 50, 0)[1]) == MOST_ROWS
    assert len(split([row(number // 2) for number in range(40 * MOST_ROWS)], 5, 0)[1]) == MOST_ROWS


def test_held_out_examples_that_are_trained_on_are_counted() -> None:
    train, held_out = tuple(chain(row(1), row(2))), tuple(chain(row(2), row(3), row(2)))
    assert also_trained(train, held_out) == 2
    assert also_trained(train, (Example((1, 7), (1, 7)),)) == 1  # the same tokens, whatever is trained of them
    assert also_trained(train, ()) == 0


@pytest.mark.parametrize(("same", "told"), [(3, True), (0, False)])
def test_a_held_out_file_with_rows_of_the_dataset_is_taken_whole_and_told(same: int, told: bool, tmp_path: Path) -> None:
    source, held = sums(10)[2:], sums(10)[: 2 + same]
    spec = run_spec(dataset=f"file://{write_jsonl(tmp_path / 'rows.jsonl', source)}")
    spec["dataset"]["evaluation"] = {"source": f"file://{write_jsonl(tmp_path / 'held.jsonl', held)}"}
    ctx = context(tmp_path, spec)
    found = data.make(ctx, tiny_tokenizer())
    assert (len(found.train), len(found.held_out), found.also_trained) == (8, 2 + same, same)
    said = f"{same} of {2 + same} held-out rows are also trained on, so losses look better than they are."
    assert any(said in note for note in notes(ctx)) == told


def test_rows_that_come_twice_are_not_held_out_and_trained_on(tmp_path: Path) -> None:
    spec = run_spec(dataset=f"file://{write_jsonl(tmp_path / 'rows.jsonl', sums(20) * 2)}")
    spec["dataset"]["evaluation"] = {"percent": 20}
    found = data.make(context(tmp_path, spec), tiny_tokenizer())
    assert (len(found.train), len(found.held_out), found.also_trained) == (32, 8, 0)

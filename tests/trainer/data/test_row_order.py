"""Rows of similar length share a batch, and the order is a function of lengths, batch, seed and epoch."""

from itertools import pairwise

import torch
from finetune_trainer.row_order import GroupedByLength, micro_batches, order_of
from hypothesis import given
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(1, 4096), min_size=1, max_size=300)


def computed(lengths: list[int], order: list[int], rows: int) -> int:
    """Tokens that forward passes of so many rows compute, padding included."""
    cut = [order[start : start + rows] for start in range(0, len(order), rows)]
    return sum(len(part) * max(lengths[index] for index in part) for part in cut)


@given(lengths=LENGTHS, batch=st.integers(1, 64), seed=st.integers(0, 2**32 - 1))
def test_every_row_is_read_once_and_the_same_seed_gives_the_same_order(lengths: list[int], batch: int, seed: int) -> None:
    order = order_of(lengths, batch, seed)
    assert sorted(order) == list(range(len(lengths)))
    assert order == order_of(lengths, batch, seed)


@given(lengths=LENGTHS, rows=st.integers(1, 64))
def test_micro_batches_have_every_row_once_and_are_no_more_than_of_the_longest(lengths: list[int], rows: int) -> None:
    longest = max(lengths)
    found = micro_batches(lengths, rows * longest)
    assert sorted(index for part in found for index in part) == list(range(len(lengths)))
    assert all(lengths[part[-1]] == max(lengths[index] for index in part) for part in found)
    assert all(len(part) * lengths[part[-1]] <= rows * longest for part in found)
    assert len(found) <= -(-len(lengths) // rows)


def test_a_row_that_is_too_long_for_any_forward_pass_is_alone() -> None:
    assert micro_batches([9, 2, 2, 2], 4) == [[1, 2], [3], [0]]


def test_padding_costs_little_where_lengths_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.empty(2000).log_normal_(5.3, 0.8, generator=generator).long() + 1).clamp(max=2048).tolist()
    shuffled = torch.randperm(2000, generator=generator).tolist()
    for batch, rows in ((16, 16), (16, 4)):
        ratios = [computed(lengths, order, rows) / sum(lengths) for order in (shuffled, order_of(lengths, batch, 0))]
        assert ratios[0] > 1.8
        assert ratios[1] < 1.2


def test_batches_of_long_rows_do_not_come_before_those_of_short_ones() -> None:
    order = order_of(list(range(1600)), 16, 0)
    longest = [max(order[start : start + 16]) for start in range(0, 1600, 16)]
    rises = sum(after > before for before, after in pairwise(longest))
    assert 30 < rises < 70  # 3 if each of the four groups began with its longest rows


def test_each_epoch_has_its_own_order_whenever_it_begins() -> None:
    sampler = GroupedByLength(list(range(1, 101)), 8, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    resumed = GroupedByLength(list(range(1, 101)), 8, seed=3)
    resumed.set_epoch(1)
    assert list(resumed) == second != first
    assert len(sampler) == 100

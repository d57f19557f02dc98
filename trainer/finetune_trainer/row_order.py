"""Which rows share a step and a forward pass: those of similar length, since each row is computed as long as the longest one beside it."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


def order_of(lengths: Sequence[int], batch: int, seed: int) -> list[int]:
    """Indices of all rows; each slice of `batch` is one optimizer step, and only the last one may be shorter.

    Rows are drawn at random into groups of at most 50 batches, and sorted within a group, as transformers does it. There long batches come before
    short ones; here they come in random order, so that no phase of the training sees short rows alone.

    Args:
        lengths: tokens of each row.
        batch: rows of an optimizer step, however it is cut into micro-batches.
        seed: decides everything.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = get_length_grouped_indices(list(lengths), batch, generator=generator)
    whole = len(rows) // batch
    batches = torch.tensor(rows[: whole * batch], dtype=torch.long).view(whole, batch)
    return [*batches[torch.randperm(whole, generator=generator)].flatten().tolist(), *rows[whole * batch :]]


def micro_batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of rows that share a forward pass, from short to long.

    Args:
        lengths: tokens of each row.
        tokens: that a forward pass computes at most, padding included; a single row may be longer.
    """
    found: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and (len(found[-1]) + 1) * lengths[row] <= tokens:
            found[-1].append(row)
        else:
            found.append([row])
    return found


class GroupedByLength(Sampler[int]):
    """The order of each epoch, a function of seed and epoch alone, so that a resumed epoch goes on in it."""

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self._lengths, self._batch, self._seed, self._epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """The next iteration is this epoch's, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        return iter(order_of(self._lengths, self._batch, self._seed + self._epoch))

"""Which rows of a dataset are held out, and how many of them are trained on nonetheless. Pure, without torch. Called by stages/data.py."""

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence

from finetune_trainer.example import Example

MOST_ROWS = 2000
"""Of a share in percent: each is measured five or six times, and more of them tell hardly more."""


Row = Sequence[Example]
"""The examples of a row, which stay together."""


def split(rows: Sequence[Row], percent: int, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(train, held out): `percent` (at most 50) of the rows drawn with the seed, at least one of two that differ; train is never empty.

    Rows of the same tokens are on one side, even where the share is then not met to the row. Where all rows differ, the draw depends on their number and
    the seed alone: the runs of one dataset compare with each other.
    """
    kinds = _kinds(rows)
    chosen = _chosen(kinds, percent, seed)
    train = tuple(row for row, kind in zip(rows, kinds, strict=True) if kind not in chosen)
    return train, tuple(row for row, kind in zip(rows, kinds, strict=True) if kind in chosen)


def also_trained(train: Sequence[Example], held_out: Sequence[Example]) -> int:
    """How many held-out examples have the tokens of one that is trained on."""
    held = Counter(map(_tokens, held_out))
    return sum(held[tokens] for tokens in held.keys() & set(map(_tokens, train))) if held else 0


def _kinds(rows: Sequence[Row]) -> list[int]:
    """A number for each row, in the order of appearance: the same for rows of the same tokens."""
    known: dict[bytes, int] = {}
    return [known.setdefault(b"".join(map(_tokens, row)), len(known)) for row in rows]


def _tokens(example: Example) -> bytes:
    """A digest, which takes less than the tokens do."""
    return hashlib.blake2b(example.input_ids, digest_size=16).digest()


def _chosen(kinds: Sequence[int], percent: int, seed: int) -> set[int]:
    """The kinds of rows that are drawn one after the other; one that has more rows than are still to be held out is passed over."""
    sizes, chosen = Counter(kinds), set[int]()
    missing = min(math.ceil(len(kinds) * percent / 100), MOST_ROWS) if len(sizes) > 1 else 0
    generator = random.Random(seed)  # noqa: S311 reproducible, not secret
    drawn = [kinds[row] for row in generator.sample(range(len(kinds)), missing)]
    others = [kinds[row] for row in generator.sample(range(len(kinds)), len(kinds))]
    for kind in dict.fromkeys(drawn + others):
        if sizes[kind] <= missing:
            chosen.add(kind)
            missing -= sizes[kind]
    return chosen or set(sorted(drawn, key=sizes.__getitem__)[:1])

"""An example of the training: token ids and labels, kept in four bytes each, and cut to a length. Pure, without torch.

Made by stages/data.py; whoever computes with it makes tensors of it. A Python tuple of ints takes some 50 bytes for each token.
"""

from array import array
from collections.abc import Iterable

IGNORED = -100
_FORMAT = "i"  # 32 bits wherever torch runs


class Example:
    """Token ids, and labels of the same length: the token itself where it is trained, -100 elsewhere. Never changes; equal to one that has the same."""

    __slots__ = ("_input_ids", "_labels")

    def __init__(self, input_ids: Iterable[int], labels: Iterable[int]) -> None:
        self._input_ids, self._labels = array(_FORMAT, input_ids).tobytes(), array(_FORMAT, labels).tobytes()

    @property
    def input_ids(self) -> memoryview:
        """A sequence of ints."""
        return memoryview(self._input_ids).cast(_FORMAT)

    @property
    def labels(self) -> memoryview:
        """A sequence of ints."""
        return memoryview(self._labels).cast(_FORMAT)

    @property
    def trained_tokens(self) -> int:
        """Tokens that count in the loss; the first has no prediction."""
        return sum(label != IGNORED for label in self.labels[1:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Example) and (self._input_ids, self._labels) == (other._input_ids, other._labels)

    def __hash__(self) -> int:
        return hash((self._input_ids, self._labels))

    def __repr__(self) -> str:
        return f"Example({self.input_ids.tolist()}, {self.labels.tolist()})"


def cut(whole: Example, longest: int) -> Example:
    """The first `longest` tokens."""
    return whole if len(whole.input_ids) <= longest else Example(whole.input_ids[:longest], whole.labels[:longest])


def chunks(whole: Example, longest: int, bos_token_id: int | None) -> list[Example]:
    """Consecutive parts of at most `longest` tokens, of which each is trained in one of them.

    The first token of an example has no prediction. In every part it is the beginning-of-sequence token where the whole begins with that, as every text
    does at inference, or else the last token of the part before.

    Args:
        longest: at least 2.
    """
    ids, labels = whole.input_ids, whole.labels
    if len(ids) <= longest:
        return [whole]
    begins = ids[0] == bos_token_id
    starts = range(longest, len(ids), longest - 1)
    later = [
        Example([ids[0] if begins else ids[start - 1], *ids[start : start + longest - 1]], [IGNORED, *labels[start : start + longest - 1]])
        for start in starts
    ]
    return [cut(whole, longest), *later]

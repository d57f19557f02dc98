"""What one model does on the held-out rows: the loss of each, and its first choice at each trained place.

Used by stages/evaluate.py, and by phases.py, which measures at the switch. Never changes a weight or the random state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from peft import PeftModel

from finetune_trainer.batch import pad
from finetune_trainer.errors import QualityError
from finetune_trainer.example import Example
from finetune_trainer.qat.prepare import fake_quantization
from finetune_trainer.row_order import micro_batches
from finetune_trainer.token_loss import output_head, predict, token_losses

TOKENS_AT_ONCE = 2048
FEWEST_ROWS = 6
"""Of fewer not even one sign in all of them would be significant: stages/evaluate.py."""

RowLosses = list[tuple[float, int]]
"""(summed loss in nats, trained tokens) of each held-out example or row, in order."""


@dataclass(frozen=True)
class HeldOut:
    """What one model does on the held-out examples.

    Attributes:
        rows: the losses.
        greedy: the most likely token at each trained place, example after example.
    """

    rows: RowLosses
    greedy: list[int]


def by_row(losses: RowLosses, sizes: Sequence[int]) -> RowLosses:
    """The losses of rows of several examples: what comes from one text or conversation is no independent draw.

    Args:
        losses: of the examples.
        sizes: how many of them each row has.
    """
    remaining = iter(losses)
    parts = (list(islice(remaining, size)) for size in sizes)
    return [(sum(total for total, _ in part), sum(count for _, count in part)) for part in parts]


def mean_loss(rows: RowLosses) -> float:
    """Mean loss per trained token, in nats."""
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


@torch.no_grad()
def measure(model: PeftModel, examples: Sequence[Example], *, fake_quant: bool, keep_codes: bool = True) -> HeldOut:
    """The loss of each example, and the most likely token wherever one is trained.

    Args:
        keep_codes: quantize each weight once for all batches (one byte a weight), or once for each; the result is the same.

    Raises:
        QualityError: a loss is not finite, so that nothing could be compared with it.
    """
    before = model.training
    model.eval()
    results: dict[int, tuple[float, list[int]]] = {}
    try:
        with fake_quantization(model, enabled=fake_quant, keep_codes=keep_codes):
            for batch in micro_batches([len(example.input_ids) for example in examples], TOKENS_AT_ONCE):
                results |= dict(zip(batch, _measure_batch(model, [examples[index] for index in batch]), strict=True))
    finally:
        model.train(before)
    ordered = [results[index] for index in range(len(examples))]
    _require_finite([total for total, _ in ordered])
    rows = [(total, example.trained_tokens) for (total, _), example in zip(ordered, examples, strict=True)]
    return HeldOut(rows, [token for _, tokens in ordered for token in tokens])


def _require_finite(losses: Sequence[float]) -> None:
    for number, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            raise QualityError(
                f"The loss of held-out row {number} of {len(losses)} is {loss}, so the model computes no numbers there; nothing was published. "
                "Lower training.learningRate, set model.dtype to float32, or take another base model."
            )


def _measure_batch(model: PeftModel, examples: Sequence[Example]) -> list[tuple[float, list[int]]]:
    """(summed loss, most likely tokens) of each example."""
    base = model.get_base_model()
    predicted = predict(base, **pad(examples, 0, model.device))
    losses, tokens = token_losses(output_head(base), predicted)
    counts = [example.trained_tokens for example in examples]
    return [(float(loss.sum()), row.tolist()) for loss, row in zip(losses.split(counts), tokens.split(counts), strict=True)]

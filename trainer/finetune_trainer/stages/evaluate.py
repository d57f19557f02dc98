"""Evaluate: held-out losses of base, tuned, PTQ and quantized model, all on the same tokens.

`held_out_losses` also serves train.py, which measures twice at the switch. Never changes a weight or the random state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn import functional as F

from finetune_trainer.context import RunContext
from finetune_trainer.qat.prepare import fake_quantization
from finetune_trainer.stages.data import IGNORED, Data, Example

NOTHING_HELD_OUT = "No held-out data: no loss is measured (dataset.evaluation)."
_TOKENS_AT_ONCE = 2048
_RESAMPLES = 1000


@dataclass(frozen=True)
class Losses:
    """Mean held-out loss per trained token, in nats; None where it was not measured.

    Attributes:
        base: the base model without an adapter.
        tuned: the adapter at the switch (or, without quantization, the final one), not quantized.
        ptq: the adapter at the switch, quantized after training.
        quantized: what is shipped.
        recovered: (PTQ - quantized) / (PTQ - tuned), the share of PTQ's damage that quantization-aware steps took back; only where that
            damage is significant.
    """

    base: float | None = None
    tuned: float | None = None
    ptq: float | None = None
    quantized: float | None = None
    recovered: float | None = None


RowLosses = list[tuple[float, int]]
"""(summed loss in nats, trained tokens) of each held-out example, in order."""


@dataclass(frozen=True)
class SwitchLosses:
    """The losses at the switch from tuning to adapting, for each held-out example."""

    tuned: RowLosses
    ptq: RowLosses


def run(ctx: RunContext, model: PeftModel, data: Data, switch: SwitchLosses | None, *, quantized: bool) -> Losses:
    """Measures what is still to be measured after training.

    Args:
        ctx: the run.
        model: the final model, prepared where it is quantized.
        data: holds the held-out examples.
        switch: what was measured at the switch.
        quantized: whether the job ships a quantized model.
    """
    if not data.held_out:
        ctx.reporter.note(NOTHING_HELD_OUT)
        return Losses()
    with model.disable_adapter():
        base = held_out_loss(model, data.held_out, fake_quant=False)
    if not quantized:
        return Losses(base=base, tuned=held_out_loss(model, data.held_out, fake_quant=False))
    shipped = held_out_loss(model, data.held_out, fake_quant=True)
    if switch is None:
        return Losses(base=base, quantized=shipped)
    tuned, ptq = mean_loss(switch.tuned), mean_loss(switch.ptq)
    damaged = is_significantly_worse(switch.ptq, switch.tuned, ctx.spec.training.seed)
    return Losses(base, tuned, ptq, shipped, (ptq - shipped) / (ptq - tuned) if damaged else None)


def mean_loss(rows: RowLosses) -> float:
    """Mean loss per trained token, in nats."""
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


def is_significantly_worse(worse: RowLosses, better: RowLosses, seed: int) -> bool:
    """Whether one model's loss lies above the other's on the same examples: paired bootstrap over examples, 95 % two-sided.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, percentile interval.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(worse), (_RESAMPLES, len(worse)), generator=generator)
    difference = torch.tensor([one - two for (one, _), (two, _) in zip(worse, better, strict=True)], dtype=torch.float64)
    tokens = torch.tensor([count for _, count in worse], dtype=torch.float64)
    means = difference[drawn].sum(1) / tokens[drawn].sum(1)
    return bool(torch.quantile(means, 0.025) > 0)


def held_out_loss(model: PeftModel, examples: Sequence[Example], *, fake_quant: bool) -> float:
    """Mean loss per trained token over all examples, in nats."""
    return mean_loss(held_out_losses(model, examples, fake_quant=fake_quant))


@torch.no_grad()
def held_out_losses(model: PeftModel, examples: Sequence[Example], *, fake_quant: bool) -> RowLosses:
    """The loss of each example."""
    before = model.training
    model.eval()
    results: dict[int, tuple[float, int]] = {}
    try:
        with fake_quantization(model, enabled=fake_quant, keep_codes=True):
            for batch in _batches(examples):
                results |= dict(zip(batch, _batch_losses(model, [examples[index] for index in batch]), strict=True))
    finally:
        model.train(before)
    return [results[index] for index in range(len(examples))]


def pad(examples: Sequence[Example], pad_token_id: int, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels [rows, longest], padded on the right; padding is never trained."""
    longest = max(len(example.input_ids) for example in examples)
    filled = [(len(example.input_ids), longest - len(example.input_ids), example) for example in examples]
    batch = {
        "input_ids": [[*example.input_ids, *([pad_token_id] * missing)] for _, missing, example in filled],
        "attention_mask": [[1] * length + [0] * missing for length, missing, _ in filled],
        "labels": [[*example.labels, *([IGNORED] * missing)] for _, missing, example in filled],
    }
    return {name: torch.tensor(values, device=device) for name, values in batch.items()}


def _batches(examples: Sequence[Example]) -> list[list[int]]:
    """Indices of examples of similar length, at most a fixed number of tokens at once."""
    batches: list[list[int]] = []
    for index in sorted(range(len(examples)), key=lambda item: len(examples[item].input_ids)):
        if batches and (len(batches[-1]) + 1) * len(examples[index].input_ids) <= _TOKENS_AT_ONCE:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _batch_losses(model: PeftModel, examples: Sequence[Example]) -> list[tuple[float, int]]:
    batch = pad(examples, 0, model.device)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    sums = [
        float(F.cross_entropy(row.float(), target, ignore_index=IGNORED, reduction="sum"))
        for row, target in zip(logits, labels, strict=True)
    ]
    return [(total, example.trained_tokens) for total, example in zip(sums, examples, strict=True)]

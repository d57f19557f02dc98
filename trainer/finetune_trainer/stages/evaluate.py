"""Evaluate: what base, tuned, PTQ and quantized model do on the held-out rows, all on the same tokens, and how sure their differences are.

`measure` also serves phases.py, which measures twice at the switch. Never changes a weight or the random state.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from finetune_api.spec import Artifact
from peft import PeftModel

from finetune_trainer.context import RunContext
from finetune_trainer.errors import QualityError
from finetune_trainer.qat.prepare import fake_quantization
from finetune_trainer.row_order import micro_batches
from finetune_trainer.stages.data import IGNORED, Data, Example
from finetune_trainer.token_loss import output_head, predict, token_losses

if TYPE_CHECKING:
    from finetune_trainer.switch import Switch

NOTHING_HELD_OUT = "No held-out data: no loss is measured (dataset.evaluation)."
TOKENS_AT_ONCE = 2048
_RESAMPLES = 1000
_FEWEST_ROWS = 6


Interval = list[float]
"""Lower and upper end, 95 % two-sided: a list, which JSON gives back as it was."""


@dataclass(frozen=True)
class Losses:
    """Mean held-out loss per trained token, in nats; None where it was not measured.

    Attributes:
        base: the base model without an adapter.
        tuned: the adapter at the switch (or, without quantization, the final one), not quantized.
        nearest: the adapter at the switch, quantized as torchao's quantize_ does: scales of the largest value, each weight to the nearest one.
        ptq: the same with scales and rounding chosen, which is what qatPercent 0 ships; and what `nearest` would be, where that is None.
        quantized: the shipped quantized model.
        adapter: the shipped adapter on the base model that is not quantized: behind quantization-aware steps it is not what it was at the switch.
        recovered: (PTQ - quantized) / (PTQ - tuned), the share of PTQ's damage that quantization-aware steps took back; only where that
            damage is significant.
        nearest_recovered: the same of `nearest`, which the choice of scales and rounding took back a part of.
        agreement: share of the trained places where the quantized model's most likely token is the tuned one's.
        ptq_over_tuned: interval of the difference of two losses, as those below.
        shipped_over_ptq: where quantization-aware steps followed.
        shipped_over_base: of the quantized model, or of the tuned one where nothing is quantized.
        adapter_over_base: of the adapter, where it is shipped and measured apart.
    """

    base: float | None = None
    tuned: float | None = None
    nearest: float | None = None
    ptq: float | None = None
    quantized: float | None = None
    adapter: float | None = None
    recovered: float | None = None
    nearest_recovered: float | None = None
    agreement: float | None = None
    ptq_over_tuned: Interval | None = None
    shipped_over_ptq: Interval | None = None
    shipped_over_base: Interval | None = None
    adapter_over_base: Interval | None = None


RowLosses = list[tuple[float, int]]
"""(summed loss in nats, trained tokens) of each held-out example, in order."""


@dataclass(frozen=True)
class HeldOut:
    """What one model does on the held-out examples.

    Attributes:
        rows: the losses.
        greedy: the most likely token at each trained place, example after example.
    """

    rows: RowLosses
    greedy: list[int]


def run(ctx: RunContext, model: PeftModel, data: Data, switch: "Switch | None", *, quantized: bool, keep_codes: bool) -> Losses:
    """Measures what is still to be measured after training.

    Args:
        ctx: the run.
        model: the final model, prepared where it is quantized.
        data: holds the held-out examples.
        switch: what was measured at the switch.
        quantized: whether the job ships a quantized model.
        keep_codes: whether its quantized weights are kept from batch to batch (one byte a weight).
    """
    if not data.held_out:
        ctx.reporter.note(NOTHING_HELD_OUT)
        return Losses()
    with model.disable_adapter():
        base = measure(model, data.held_out, fake_quant=False)
    shipped = measure(model, data.held_out, fake_quant=quantized, keep_codes=keep_codes)
    seed = ctx.spec.training.seed
    over_base = difference(shipped.rows, base.rows, seed)
    means = {"base": mean_loss(base.rows), "quantized" if quantized else "tuned": mean_loss(shipped.rows)}
    known = Losses(**means, shipped_over_base=over_base)
    if quantized and Artifact.ADAPTER in ctx.spec.wanted_artifacts:
        adapter = measure(model, data.held_out, fake_quant=False)
        known = replace(known, adapter=mean_loss(adapter.rows), adapter_over_base=difference(adapter.rows, base.rows, seed))
    if switch is None or switch.tuned is None or switch.ptq is None:
        return known
    nearest = switch.nearest
    return replace(
        known,
        nearest=mean_loss(nearest.rows) if nearest else None,
        nearest_recovered=recovered(switch.tuned.rows, nearest.rows, shipped.rows, seed) if nearest else None,
        tuned=mean_loss(switch.tuned.rows),
        ptq=mean_loss(switch.ptq.rows),
        recovered=recovered(switch.tuned.rows, switch.ptq.rows, shipped.rows, seed),
        agreement=agreement(shipped, switch.tuned),
        ptq_over_tuned=difference(switch.ptq.rows, switch.tuned.rows, seed),
        shipped_over_ptq=difference(shipped.rows, switch.ptq.rows, seed),
    )


def mean_loss(rows: RowLosses) -> float:
    """Mean loss per trained token, in nats."""
    return sum(total for total, _ in rows) / sum(count for _, count in rows)


def recovered(tuned: RowLosses, ptq: RowLosses, shipped: RowLosses, seed: int) -> float | None:
    """(PTQ - shipped) / (PTQ - tuned); None where PTQ's damage is not significant."""
    if not is_significant(difference(ptq, tuned, seed)):
        return None
    return (mean_loss(ptq) - mean_loss(shipped)) / (mean_loss(ptq) - mean_loss(tuned))


def agreement(one: HeldOut, other: HeldOut) -> float:
    """Share of the trained places where both take the same token for the most likely one, 0 to 1."""
    return sum(first == second for first, second in zip(one.greedy, other.greedy, strict=True)) / len(one.greedy)


def is_significant(interval: Interval | None) -> bool:
    """Whether a difference lies above zero."""
    return interval is not None and interval[0] > 0


def difference(one: RowLosses, other: RowLosses, seed: int) -> Interval | None:
    """How much the first model's mean loss lies above the other's on the same examples: paired bootstrap over examples, 95 % two-sided.

    Args:
        one, other: losses of the same examples.
        seed: of the resampling.

    Returns:
        None for fewer than 6 examples, of which not even one sign in all of them would be significant.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, percentile interval.
    """
    if len(one) < _FEWEST_ROWS:
        return None
    generator = torch.Generator().manual_seed(seed)
    apart = torch.tensor([first - second for (first, _), (second, _) in zip(one, other, strict=True)], dtype=torch.float64)
    tokens = torch.tensor([count for _, count in one], dtype=torch.float64)
    resampled = (torch.randint(len(one), (len(one),), generator=generator) for _ in range(_RESAMPLES))
    means = torch.stack([apart[drawn].sum() / tokens[drawn].sum() for drawn in resampled])
    return [float(means.quantile(0.025)), float(means.quantile(0.975))]


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


def _measure_batch(model: PeftModel, examples: Sequence[Example]) -> list[tuple[float, list[int]]]:
    """(summed loss, most likely tokens) of each example."""
    base = model.get_base_model()
    predicted = predict(base, **pad(examples, 0, model.device))
    losses, tokens = token_losses(output_head(base), predicted)
    counts = [example.trained_tokens for example in examples]
    return [(float(loss.sum()), row.tolist()) for loss, row in zip(losses.split(counts), tokens.split(counts), strict=True)]

"""Evaluate: what base, tuned, PTQ and quantized model do on the held-out rows, all on the same tokens, and how sure their differences are.

What one model does is measured in held_out.py; here the models are held against each other.
"""

from dataclasses import dataclass, replace

import torch
from finetune_api.spec import Artifact
from peft import PeftModel

from finetune_trainer.context import RunContext
from finetune_trainer.held_out import FEWEST_ROWS, HeldOut, RowLosses, by_row, mean_loss, measure
from finetune_trainer.stages.data import Data
from finetune_trainer.switch import Switch

NOTHING_HELD_OUT = "No held-out data: no loss is measured (dataset.evaluation)."
_RESAMPLES = 1000


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


def run(ctx: RunContext, model: PeftModel, data: Data, switch: Switch | None, *, quantized: bool, keep_codes: bool) -> Losses:
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

    def losses(measured: HeldOut) -> RowLosses:
        return by_row(measured.rows, data.held_out_rows)

    with model.disable_adapter():
        base = losses(measure(model, data.held_out, fake_quant=False))
    measured = measure(model, data.held_out, fake_quant=quantized, keep_codes=keep_codes)
    shipped, seed = losses(measured), ctx.spec.training.seed
    means = {"base": mean_loss(base), "quantized" if quantized else "tuned": mean_loss(shipped)}
    known = Losses(**means, shipped_over_base=difference(shipped, base, seed))
    if quantized and Artifact.ADAPTER in ctx.spec.wanted_artifacts:
        adapter = losses(measure(model, data.held_out, fake_quant=False))
        known = replace(known, adapter=mean_loss(adapter), adapter_over_base=difference(adapter, base, seed))
    if switch is None or switch.tuned is None or switch.ptq is None:
        return known
    tuned, ptq, nearest = losses(switch.tuned), losses(switch.ptq), losses(switch.nearest) if switch.nearest else None
    return replace(
        known,
        nearest=mean_loss(nearest) if nearest else None,
        nearest_recovered=recovered(tuned, nearest, shipped, seed) if nearest else None,
        tuned=mean_loss(tuned),
        ptq=mean_loss(ptq),
        recovered=recovered(tuned, ptq, shipped, seed),
        agreement=agreement(measured, switch.tuned),
        ptq_over_tuned=difference(ptq, tuned, seed),
        shipped_over_ptq=difference(shipped, ptq, seed),
    )


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
    """How much the first model's mean loss lies above the other's on the same rows: paired bootstrap over rows, 95 % two-sided.

    Args:
        one, other: losses of the same rows.
        seed: of the resampling.

    Returns:
        None for fewer than 6 rows, of which not even one sign in all of them would be significant.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, percentile interval.
    """
    if len(one) < FEWEST_ROWS:
        return None
    generator = torch.Generator().manual_seed(seed)
    apart = torch.tensor([first - second for (first, _), (second, _) in zip(one, other, strict=True)], dtype=torch.float64)
    tokens = torch.tensor([count for _, count in one], dtype=torch.float64)
    resampled = (torch.randint(len(one), (len(one),), generator=generator) for _ in range(_RESAMPLES))
    means = torch.stack([apart[drawn].sum() / tokens[drawn].sum() for drawn in resampled])
    return [float(means.quantile(0.025)), float(means.quantile(0.975))]

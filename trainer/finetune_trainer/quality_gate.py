"""The gate between a trained model and its destinations: a quantized model that lost too much is not published. Called by pipeline.py."""

from typing import Any

from finetune_trainer.context import RunContext
from finetune_trainer.errors import QualityError


def require_quality(ctx: RunContext, losses: dict[str, Any]) -> None:
    """Holds the quantized model's held-out loss against the tuned one's.

    Args:
        ctx: the run; spec.quality has the limit.
        losses: the report's; nothing is compared where one of the two was not measured.

    Raises:
        QualityError: the limit is passed and onFailure is Fail.
    """
    limit = ctx.spec.quality.max_loss_increase_percent
    increase = loss_increase_percent(losses)
    if limit is None or increase is None or increase <= float(limit):
        return
    sentence = (
        f"The quantized model's held-out loss is {increase:.1f} % above the tuned one's ({losses['quantized']:.4g} against {losses['tuned']:.4g}), "
        f"but quality.maxLossIncreasePercent allows {limit} %; raise quantization.qatPercent or training.epochs, choose a finer scheme, or allow more."
    )
    if ctx.spec.quality.on_failure == "Fail":
        raise QualityError(f"{sentence} Nothing was published.")
    ctx.reporter.note(sentence)


def loss_increase_percent(losses: dict[str, Any]) -> float | None:
    """(quantized - tuned) / tuned in percent; None where one of the two was not measured."""
    tuned, quantized = losses.get("tuned"), losses.get("quantized")
    if tuned is None or quantized is None:
        return None
    return float((quantized - tuned) / tuned * 100) if tuned else float("inf" if quantized > tuned else 0)

"""The gate between a trained model and its destinations: a quantized model that lost too much is not published. Called by pipeline.py."""

from typing import Any

from finetune_api.spec import Artifact, FineTuneJobSpec, QualitySpec

from finetune_trainer.context import RunContext
from finetune_trainer.errors import QualityError


def require_quality(ctx: RunContext, losses: dict[str, Any]) -> None:
    """Holds the shipped model's held-out loss against the limit, PTQ's and the base model's.

    Args:
        ctx: the run; spec.quality says what follows.
        losses: the report's; what was not measured is not compared.

    Raises:
        QualityError: it falls short and onFailure is Fail.
    """
    sentence = shortfall(ctx.spec, losses)
    if not sentence:
        return
    if ctx.spec.quality.on_failure == "Fail":
        raise QualityError(f"{sentence} Nothing was published; quality.onFailure Warn would publish it all the same.")
    ctx.reporter.note(sentence)


def shortfall(spec: FineTuneJobSpec, losses: dict[str, Any]) -> str:
    """What the shipped model falls short of, in one sentence with a mend; empty when of nothing."""
    found = _above_limit(spec.quality, losses) or _worse_than_ptq(losses) or _worse_than_base(losses)
    return found or (_adapter_worse_than_base(losses) if Artifact.ADAPTER in spec.wanted_artifacts else "")


def loss_increase_percent(losses: dict[str, Any]) -> float | None:
    """(quantized - tuned) / tuned in percent; None where one of the two was not measured."""
    tuned, quantized = losses.get("tuned"), losses.get("quantized")
    if tuned is None or quantized is None:
        return None
    return float((quantized - tuned) / tuned * 100) if tuned else float("inf" if quantized > tuned else 0)


def _above_limit(quality: QualitySpec, losses: dict[str, Any]) -> str:
    limit, increase = quality.max_loss_increase_percent, loss_increase_percent(losses)
    if limit is None or increase is None or increase <= float(limit):
        return ""
    return (
        f"The quantized model's held-out loss is {increase:.1f} % above the tuned one's ({losses['quantized']:.4g} against {losses['tuned']:.4g}), "
        f"but quality.maxLossIncreasePercent allows {limit} %; raise quantization.qatPercent or training.epochs, choose a finer scheme, or allow more."
    )


def _worse_than_ptq(losses: dict[str, Any]) -> str:
    if not _lies_above(losses.get("shipped_over_ptq")):
        return ""
    return (
        f"The quantized model's held-out loss ({losses['quantized']:.4g}) is significantly above what quantization after training would have shipped "
        f"({losses['ptq']:.4g}); lower training.learningRate, give the quantization-aware steps more data, or set quantization.qatPercent to 0."
    )


def _worse_than_base(losses: dict[str, Any]) -> str:
    if not _lies_above(losses.get("shipped_over_base")):
        return ""
    shipped = losses["tuned"] if losses.get("quantized") is None else losses["quantized"]
    return (
        f"The shipped model's held-out loss ({shipped:.4g}) is significantly above the base model's ({losses['base']:.4g}), which was not trained at all; "
        "lower training.learningRate, train on more data, or choose a finer scheme."
    )


def _adapter_worse_than_base(losses: dict[str, Any]) -> str:
    if not _lies_above(losses.get("adapter_over_base")):
        return ""
    return (
        f"The shipped adapter's held-out loss on the base model that is not quantized ({losses['adapter']:.4g}) is significantly above the base model's "
        f"({losses['base']:.4g}); lower quantization.qatPercent, or leave adapter out of outputs.artifacts."
    )


def _lies_above(interval: list[float] | None) -> bool:
    return interval is not None and interval[0] > 0

"""Which layers of a model a scheme fits, in groups of which size, and whether that is enough. Pure; called by prepare, in preflight too."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from finetune_api.rules import GROUP_SIZES
from finetune_api.spec import QuantizationSpec, Scheme

from finetune_trainer.errors import SpecError
from finetune_trainer.qat.schemes import SCHEMES

LEAST_COVERAGE = 0.5

Shapes = Mapping[str, tuple[int, int]]
"""(out, in) of each linear layer, the output head aside."""


@dataclass(frozen=True)
class Fit:
    """What a scheme does to a model.

    Attributes:
        group_size: weights that share one scale; None is one scale for each output channel.
        unfit: layers that stay unquantized, with the reason.
        coverage: share of the linear weights that are quantized, 0 to 1.
    """

    scheme: Scheme
    group_size: int | None
    unfit: dict[str, str]
    coverage: float


def fit(scheme: Scheme, group_size: int | None, shapes: Shapes, fused: int = 0) -> Fit:
    """The scheme with this group size on these layers.

    Args:
        fused: weights of linear maps that are no layers, such as a mixture's experts in one tensor; no scheme takes them.
    """
    reasons = {name: _unfit(scheme, group_size, *shape) for name, shape in shapes.items()}
    unfit = {name: reason for name, reason in reasons.items() if reason}
    weights = fused + sum(out * size for out, size in shapes.values())
    quantized = sum(out * size for name, (out, size) in shapes.items() if name not in unfit)
    return Fit(scheme, group_size, unfit, quantized / weights if weights else 0.0)


def best_fit(quantization: QuantizationSpec, shapes: Shapes, fused: int = 0) -> Fit:
    """The group size of the spec, or else the one of the scheme's that covers most weights; of equals the largest.

    Raises:
        SpecError: less than half of the linear weights would be quantized; says which scheme and group size would cover more.
    """
    scheme, wanted = quantization.scheme, quantization.group_size
    found = max(_fits(scheme, (wanted,) if wanted else (), shapes, fused), key=lambda item: item.coverage)
    if found.coverage < LEAST_COVERAGE:
        raise SpecError(_refusal(found, shapes, fused))
    return found


def _fits(scheme: Scheme, group_sizes: tuple[int, ...], shapes: Shapes, fused: int) -> Iterator[Fit]:
    """One for each group size; without any given for each of the scheme's own choice, the largest first."""
    for group_size in group_sizes or SCHEMES[scheme].group_sizes or (None,):
        yield fit(scheme, group_size, shapes, fused)


def _unfit(scheme: Scheme, group_size: int | None, out_features: int, in_features: int) -> str:
    """Why a layer can't be quantized so; empty when it can."""
    multiple = SCHEMES[scheme].multiple_of
    if group_size and in_features % group_size:
        return f"input size {in_features} does not divide into groups of {group_size}"
    if in_features % multiple or out_features % multiple:
        return f"{out_features} x {in_features} are not multiples of {multiple}"
    return ""


def _refusal(found: Fit, shapes: Shapes, fused: int) -> str:
    groups = f" in groups of {found.group_size}" if found.group_size else ""
    missing = (
        "its experts share tensors, or its layers compute in a way of their own"
        if fused
        else "it has no linear layer besides the output head"
    )
    reason = next(iter(found.unfit.values()), missing)
    better = sorted({text for scheme in SCHEMES for text in _better(scheme, found, shapes, fused)})
    mend = f"choose {' or '.join(better)}" if better else "choose scheme none"
    return (
        f"spec.quantization: {found.scheme.value}{groups} would quantize only {found.coverage:.0%} of this model's linear weights, less than half "
        f"(for one: {reason}); {mend}."
    )


def _better(scheme: Scheme, found: Fit, shapes: Shapes, fused: int) -> Iterator[str]:
    """What covers enough: another group size of the same scheme, or another scheme with a group size of its own choice."""
    groups = sorted(GROUP_SIZES.get(scheme, ()), reverse=True)
    enough = [item for item in _fits(scheme, tuple(groups), shapes, fused) if item.coverage >= LEAST_COVERAGE]
    if enough and scheme is found.scheme:
        yield f"groupSize {enough[0].group_size}"
    elif enough:
        yield f"scheme {scheme.value}"

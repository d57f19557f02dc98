"""One layer's weight on its three ways: what training multiplies with, what is shipped, and the formula of both; with any scales, rounding and dtype.

Whatever is drawn here is a short binary fraction, so that float32 adds it up exactly in any order, and the formula has the bits of the fused operations.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from finetune_api.spec import Scheme
from finetune_trainer.qat.export import exported_tensor
from finetune_trainer.qat.linear import ExactLoraLinear, ExactMode, ExactState, RoundingOffset, adapted_weight
from finetune_trainer.qat.quantizers import WeightQuantizer
from finetune_trainer.qat.schemes import SCHEMES as TABLE
from finetune_trainer.qat.tensors import dequantized
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.exact_models import DTYPES, SCHEMES
from torch import Tensor, nn

GROUP, RANK, SCALING = 32, 4, 2.0


def fractions(*shape: int, largest: int, step: float, drawn: torch.Generator) -> Tensor:
    """Random multiples of a power of two."""
    return torch.randint(-largest, largest + 1, shape, generator=drawn) * step


def exact_lora(weight: Tensor, a: Tensor, b: Tensor, scheme: Scheme) -> ExactLoraLinear:
    """A layer with this weight and adapter, as prepare.py makes it, in small groups where the scheme has groups."""
    outputs, inputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=False, dtype=weight.dtype)
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["0"])
    layer = get_peft_model(nn.Sequential(linear), config).base_model.model[0]  # type: ignore[arg-type, index, union-attr]
    with torch.no_grad():
        for parameter, value in ((linear.weight, weight), (layer.lora_A["default"].weight, a), (layer.lora_B["default"].weight, b)):
            parameter.copy_(value)
    layer.__class__ = ExactLoraLinear
    layer.exact = ExactState(ExactMode(), TABLE[scheme].quantizer(GROUP if TABLE[scheme].group_sizes else None), TABLE[scheme].activations)
    return layer


@contextmanager
def quantized_weights() -> Iterator[list[Tensor]]:
    """Every weight that goes into a quantizer within the block."""
    seen: list[Tensor] = []
    quantize = WeightQuantizer.quantize

    def noted(self: WeightQuantizer, weight: Tensor, clip_ratio: Tensor | None = None) -> object:
        seen.append(weight.clone())
        return quantize(self, weight, clip_ratio)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightQuantizer, "quantize", noted)
        yield seen


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=25)
@given(
    rows=st.integers(1, 6),
    groups=st.integers(1, 3),
    power=st.integers(-20, 6),
    shrunk=st.booleans(),
    nudged=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_trained_with_is_what_is_shipped_and_the_formula(
    dtype: torch.dtype, scheme: Scheme, rows: int, groups: int, power: int, shrunk: bool, nudged: bool, seed: int
) -> None:
    drawn, inputs, unit = torch.Generator().manual_seed(seed), groups * GROUP, 2.0**power
    weight = fractions(rows, inputs, largest=127, step=unit / 64, drawn=drawn).to(dtype)
    a = fractions(RANK, inputs, largest=8, step=1 / 8, drawn=drawn)
    b = fractions(rows, RANK, largest=8, step=unit / 8, drawn=drawn)
    merged = weight.float() + SCALING * (b @ a)
    layer = exact_lora(weight, a, b, scheme)
    state, quantizer = layer.exact, layer.exact.quantizer
    assert quantizer is not None
    if shrunk:
        state.clip_ratio = quantizer.least_squares_clip_ratio(adapted_weight(layer))
    if nudged:
        block = quantizer.block(inputs)
        units = unit / 2.0 ** torch.randint(6, 10, (rows, inputs // block), generator=drawn)
        parts = torch.randint(-128, 128, (rows, inputs), generator=drawn, dtype=torch.int8)
        state.rounding_offset = RoundingOffset(parts, units)
        merged += parts * units.repeat_interleave(block, dim=1)
    merged = merged.to(dtype)
    formula = quantizer.dequantize(quantizer.quantize(merged, state.clip_ratio))
    with quantized_weights() as seen, torch.no_grad():
        output = layer(torch.eye(inputs, dtype=dtype))
        shipped = dequantized(exported_tensor("layer", layer, scheme))
    assert torch.equal(shipped, formula)
    if state.activations is None:
        assert torch.equal(output.T, formula)
    assert len(seen) == 2
    assert all(torch.equal(item, merged) for item in seen), "a weight is quantized once, and none that was quantized before"

"""float8 (e4m3) for each row: the weights of fp8-fp8, and the activations of fp8-fp8 and fp8-int4.

torchao's own fake quantizers of this grid are not used: their gradient passes through float8 unscaled, and a row of zeros gives NaN.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_trainer.qat.quantizers.activations import ActivationCodes

FLOAT8 = torch.float8_e4m3fn
LEAST_LARGEST = 1e-12
"""A row's largest value counts as at least this, so that a row of zeros stays zero; the exported tensor names it for its activations."""

_MSLK_LEAST_LARGEST = 1.0 / 512.0
LARGEST = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class Float8Grid:
    """Weights as torchao's Float8Tensor with PerRow granularity has them.

    Source: torchao 0.18 `_choose_scale_float8` (the scale is rounded to the weight's dtype, then kept in float32) and `_quantize_affine_float8`.
    """

    @property
    def gains_from_clipping(self) -> bool:
        """A smaller scale clips and makes no step finer: the steps of a floating-point grid follow the value."""
        return False

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return -int(LARGEST), int(LARGEST)

    def quantize(self, grouped: Tensor, clip_ratio: Tensor | None) -> tuple[Tensor, Tensor, None]:
        """float8_e4m3fn codes, float32 scales."""
        largest = grouped.abs().amax(dim=-1)
        largest = largest if clip_ratio is None else (largest * clip_ratio).to(grouped.dtype)
        scale = _torchao_scale(largest)
        return _rounded(grouped, scale.unsqueeze(-1)), scale, None

    def dequantize(self, grouped: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:  # noqa: ARG002 all grids' own
        """`code * scale` in float32, then cast to the weight's dtype."""
        return _scaled(grouped, scale.unsqueeze(-1), dtype)


@dataclass(frozen=True)
class Float8Activations:
    """For each token (the last dimension), as Float8Tensor quantizes the input of its linear layer when it has a lower bound."""

    @torch.no_grad()
    def quantize(self, activation: Tensor) -> ActivationCodes:
        """float8_e4m3fn codes [..., features], float32 scale [..., 1]."""
        scale = _torchao_scale(activation.abs().amax(dim=-1, keepdim=True))
        return ActivationCodes(_rounded(activation, scale), scale)

    @torch.no_grad()
    def dequantize(self, quantized: ActivationCodes, dtype: torch.dtype) -> Tensor:
        """The activation that the codes stand for."""
        return _scaled(quantized.codes, quantized.scale, dtype)


@dataclass(frozen=True)
class MslkFloat8Activations:
    """For each token, as mslk quantizes the input of an Int4Tensor with float8 activations.

    Source: mslk `quantize_fp8_row` (quantize/triton/fp8_quantize.py): scale = max(max|x|, 1/512) / 448 in float32, codes divided by it. mslk itself has
    not been run; FBGEMM 1.6, which it comes from, multiplies by the reciprocal (about 1 code in 1,000 differs) and has 1e-12 for the floor.
    """

    @torch.no_grad()
    def quantize(self, activation: Tensor) -> ActivationCodes:
        """float8_e4m3fn codes [..., features], float32 scale [..., 1]."""
        largest = activation.abs().amax(dim=-1, keepdim=True).to(torch.float32)
        scale = largest.clamp_(min=_MSLK_LEAST_LARGEST).div_(LARGEST)
        return ActivationCodes(_rounded(activation, scale), scale)

    @torch.no_grad()
    def dequantize(self, quantized: ActivationCodes, dtype: torch.dtype) -> Tensor:
        """The activation that the codes stand for."""
        return _scaled(quantized.codes, quantized.scale, dtype)


def _torchao_scale(largest: Tensor) -> Tensor:
    return largest.clamp(min=LEAST_LARGEST).div_(LARGEST).to(torch.float32)


def _rounded(values: Tensor, scale: Tensor) -> Tensor:
    return values.to(torch.float32).div(scale).clamp_(-LARGEST, LARGEST).to(FLOAT8)


def _scaled(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(torch.float32).mul_(scale).to(dtype)

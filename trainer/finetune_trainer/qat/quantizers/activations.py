"""What an activation grid is, and the int8 grid of int8-int4; the float8 grids are in float8.py."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class ActivationCodes(NamedTuple):
    """A quantized activation: what the backward pass keeps of it.

    Attributes:
        codes: [..., features], one byte each: int8, or float8_e4m3fn.
        scale: [..., 1].
        zero_point: int8 [..., 1], the code of 0; None where that is 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


class ActivationQuantizer(Protocol):
    """One quantizer for activations, a scale for each token; a token of zeros stays zero."""

    def quantize(self, activation: Tensor) -> ActivationCodes:
        """The codes of an activation [..., features]."""

    def dequantize(self, quantized: ActivationCodes, dtype: torch.dtype) -> Tensor:
        """The activation that the codes stand for."""


@dataclass(frozen=True)
class Int8Activations:
    """Asymmetric int8 for each token (the last dimension).

    Source: torchao `choose_qparams_affine` with MappingType.ASYMMETRIC: zero is always on the grid.
    """

    @torch.no_grad()
    def quantize(self, activation: Tensor) -> ActivationCodes:
        """int8 codes, scale in the activation's dtype."""
        lowest, highest = activation.amin(dim=-1, keepdim=True).clamp_(max=0), activation.amax(dim=-1, keepdim=True).clamp_(min=0)
        scale = ((highest - lowest) / 255.0).clamp_(min=torch.finfo(activation.dtype).smallest_normal)
        zero_point = (-128 - torch.round(lowest / scale)).clamp_(-128, 127).to(torch.int8)
        codes = (activation * (1.0 / scale)).round_().add_(zero_point).clamp_(-128, 127)
        return ActivationCodes(codes.to(torch.int8), scale, zero_point)

    @torch.no_grad()
    def dequantize(self, quantized: ActivationCodes, dtype: torch.dtype) -> Tensor:
        """The activation that the codes stand for."""
        codes, scale, zero_point = quantized
        values = codes.to(dtype)
        return (values if zero_point is None else values.sub_(zero_point.to(dtype))).mul_(scale)

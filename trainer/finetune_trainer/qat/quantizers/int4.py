"""The grids of torchao's Int4Tensor with plain packing, which keeps two codes in a byte: with a zero point for int4, without one for fp8-int4.

torchao makes these tensors with a CUDA library (mslk) only; what it computes is done here in plain PyTorch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finetune_trainer.qat.quantizers.float8 import FLOAT8, LARGEST

_LEAST_RANGE = 1e-6
_HALF = 8
_BOUNDS = (-_HALF, _HALF - 1)


@dataclass(frozen=True)
class ZeroPointGrid:
    """`code * scale + zero`, 16 steps from the smallest to the largest weight of the group.

    Source: mslk `int4_row_quantize_zp` (scale = (max - min) / 15, zero = min + 8 scale, all in float32, then cast to the weight's dtype) and
    torchao 0.18 `Int4WeightFakeQuantizer`, to whose result this is bit-equal in float32.
    """

    @property
    def gains_from_clipping(self) -> bool:
        """Measured on normal weights: the squared error falls by 6 % in groups of 32, by 10 % in groups of 128."""
        return True

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return _BOUNDS

    def quantize(self, grouped: Tensor, clip_ratio: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """int8 codes from -8 to 7; scale and zero in the weight's dtype."""
        wide = grouped.to(torch.float32)
        lowest, highest = wide.amin(dim=-1), wide.amax(dim=-1)
        if clip_ratio is not None:
            lowest, highest = lowest * clip_ratio, highest * clip_ratio
        scale = (highest - lowest).clamp_(min=_LEAST_RANGE).div_(2 * _HALF - 1)
        codes = (wide - lowest.unsqueeze(-1)).div_(scale.unsqueeze(-1)).round_().clamp_(0, 2 * _HALF - 1).sub_(_HALF)
        zero = lowest + scale * _HALF
        return codes.to(torch.int8), scale.to(grouped.dtype), zero.to(grouped.dtype)

    def dequantize(self, grouped: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`code * scale + zero`, each operation rounded to the weight's dtype."""
        scaled = grouped.to(dtype).mul_(scale.unsqueeze(-1))
        return scaled if zero is None else scaled.add_(zero.unsqueeze(-1))


@dataclass(frozen=True)
class EighthsGrid:
    """`code * scale` as float8, codes from -8 to 7, so that the largest weight, if positive, is clipped by an eighth.

    Source: mslk `int4_row_quantize`, which torchao 0.18 takes for float8 activations: scale = max|w| / 8 in float32, then cast to the weight's
    dtype. (torchao's own fake quantizer rounds the weight to float8 first; its conversion does not.)

    The kernel that serves (FBGEMM's and mslk's `f8i4bf16_rowwise`) multiplies float8 by float8, so it rounds each scaled weight to float8; small weights (below 2**-6)
    get steps of 2**-9. That is inferred: on an H200 its results were as far from `code * scale` as this rounding takes them, and it has not been run against this since.
    """

    @property
    def gains_from_clipping(self) -> bool:
        """Measured on normal weights: the squared error falls by 7 % in groups of 128."""
        return True

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return _BOUNDS

    def quantize(self, grouped: Tensor, clip_ratio: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """int8 codes; scale in the weight's dtype, and zeros, which the tensor class wants written down."""
        wide = grouped.to(torch.float32)
        largest = wide.abs().amax(dim=-1)
        largest = largest if clip_ratio is None else largest * clip_ratio
        scale = largest.clamp_(min=_LEAST_RANGE).div_(_HALF)
        codes = (wide / scale.unsqueeze(-1)).round_().clamp_(-_HALF, _HALF - 1)
        return codes.to(torch.int8), scale.to(grouped.dtype), torch.zeros_like(scale, dtype=grouped.dtype)

    def dequantize(self, grouped: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`code * scale` rounded to the weight's dtype, then to float8."""
        return ZeroPointGrid().dequantize(grouped, scale, zero, dtype).clamp_(-LARGEST, LARGEST).to(FLOAT8).to(dtype)


def pack(codes: Tensor) -> Tensor:
    """Two codes [out, in] from -8 to 7 in each byte, int8 [out, in / 2]: the even one in the low half. Source: mslk `pack_int4`."""
    return (codes[:, ::2] & 0xF).bitwise_or_(codes[:, 1::2] << 4).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """The codes, int8 [out, in]."""
    low, high = (packed << 4) >> 4, packed >> 4  # an arithmetic shift extends the sign
    return torch.stack((low, high), dim=-1).flatten(-2)

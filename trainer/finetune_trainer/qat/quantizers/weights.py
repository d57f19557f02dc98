"""A weight is quantized in groups along its input dimension, each on a grid of its own scale; the grids are in the files beside this one."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Measured on normal and heavy-tailed weights: steps of 0.025 lower the squared error by 1 % more, factors under 0.6 by none
# where all columns count alike. The lower ones are for columns that count differently.
_SHRINK_FACTORS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
_WEIGHTS_AT_ONCE = 2**22


class WeightCodes(NamedTuple):
    """A quantized weight.

    Attributes:
        codes: [out, in], one byte each: int8, or float8_e4m3fn.
        scale: [out, groups].
        zero: [out, groups], what code 0 stands for; None where that is 0.
        dtype: of the weight.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    dtype: torch.dtype


class WeightGrid(Protocol):
    """The values that the weights of one group may take."""

    @property
    def gains_from_clipping(self) -> bool:
        """Whether a scale smaller than the largest weight asks for can lower a group's squared error: the grid is coarse."""

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code."""

    def quantize(self, grouped: Tensor, clip_ratio: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes [out, groups, group], scale and zero [out, groups] of weights [out, groups, group]; `clip_ratio` as in WeightQuantizer."""

    def dequantize(self, grouped: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weights [out, groups, group] that the codes stand for."""


@dataclass(frozen=True)
class WeightQuantizer:
    """A grid, and how many weights along the input dimension share one scale: `group_size`, or a whole row where that is None."""

    grid: WeightGrid
    group_size: int | None

    def block(self, in_features: int) -> int:
        """Weights that share one scale."""
        return self.group_size or in_features

    @torch.no_grad()
    def quantize(self, weight: Tensor, clip_ratio: Tensor | None = None) -> WeightCodes:
        """The codes and scales of a weight [out, in].

        Args:
            clip_ratio: [out, groups] in (0, 1], multiplies each group's range before its scale is made: what lies outside is clipped, what
                lies inside is rounded more finely. None is the range itself.
        """
        codes, scale, zero = self.grid.quantize(self._grouped(weight), clip_ratio)
        return WeightCodes(codes.view(weight.shape), scale, zero, weight.dtype)

    @torch.no_grad()
    def dequantize(self, quantized: WeightCodes) -> Tensor:
        """The weight [out, in] that the codes stand for."""
        codes, scale, zero, dtype = quantized
        return self.grid.dequantize(self._grouped(codes), scale, zero, dtype).view(codes.shape)

    @torch.no_grad()
    def least_squares_clip_ratio(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """The clip_ratio [out, groups], float32, that gives each group the least squared error among a fixed grid of factors; of equals the largest.

        Dear (one quantization for each factor), so it is done once and its result kept; memory is that of a few rows. On an 8-bit grid no
        group gains from clipping, so all factors are 1.
        Source: the grid search of GPTQ's `find_params(mse=True)` (arXiv 2210.17323).

        Args:
            weight: [out, in].
            importance: [in], how much the squared error of each column counts; None is the same for all.
        """
        rows = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
        return torch.cat([self._best_clip_ratio(part, importance) for part in weight.split(rows)])

    def _best_clip_ratio(self, weight: Tensor, importance: Tensor | None) -> Tensor:
        best = torch.ones(weight.shape[0], weight.shape[1] // self.block(weight.shape[1]), device=weight.device)
        if not self.grid.gains_from_clipping:
            return best
        least = self._squared_error(weight, best, importance)
        for factor in _SHRINK_FACTORS:
            error = self._squared_error(weight, torch.full_like(best, factor), importance)
            best = torch.where(error < least, factor, best)
            least = torch.minimum(error, least)
        return best

    def _squared_error(self, weight: Tensor, clip_ratio: Tensor, importance: Tensor | None) -> Tensor:
        """[out, groups], summed in at least float32."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares = self.dequantize(self.quantize(weight, clip_ratio)).to(wide).sub_(weight).square_()
        return self._grouped(squares if importance is None else squares.mul_(importance)).sum(dim=-1)

    def _grouped(self, values: Tensor) -> Tensor:
        return values.view(values.shape[0], -1, self.block(values.shape[1]))

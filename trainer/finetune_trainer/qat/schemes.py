"""The quantization schemes, as one table: grids, group sizes, torchao's tensor class and configuration, where each serves.

Read by fit, prepare, export and verify; docs/schemes.md is generated from it (schemes_page.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from finetune_api.spec import Scheme
from torch import Tensor
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8DynamicActivationInt4WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
)
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow

from finetune_trainer.qat import tensors
from finetune_trainer.qat.quantizers import ActivationQuantizer, WeightCodes, WeightGrid, WeightQuantizer
from finetune_trainer.qat.quantizers.activations import Int8Activations
from finetune_trainer.qat.quantizers.float8 import LEAST_LARGEST, Float8Activations, Float8Grid, MslkFloat8Activations
from finetune_trainer.qat.quantizers.int4 import EighthsGrid, ZeroPointGrid
from finetune_trainer.qat.quantizers.integers import SymmetricGrid


@dataclass(frozen=True)
class SchemeInfo:
    """One row of the table.

    Attributes:
        purpose: what it is for, for a person who has to choose.
        grid: of the weights.
        weights: the same in words.
        activations: of the layer's input; None where it is read as it is.
        group_sizes: weights that share a scale, to choose from where the spec does not say; empty: one scale for each output channel.
        multiple_of: what both sizes of a layer must be multiples of.
        tensor: makes the shipped tensor of a quantized weight and its block.
        tensor_name: its class and packing.
        config: torchao's own configuration for a group size, as config.json of the exported folder names it.
        runs_on_cpu: whether torchao computes the layer on a CPU, too.
        served_by: where the exported model runs.
        served_in: the one dtype that its kernels take; None where any does.
    """

    purpose: str
    grid: WeightGrid
    weights: str
    activations: ActivationQuantizer | None
    group_sizes: tuple[int, ...]
    multiple_of: int
    tensor: Callable[[WeightCodes, int], Tensor]
    tensor_name: str
    config: Callable[[int | None], Any]
    runs_on_cpu: bool
    served_by: str
    served_in: torch.dtype | None = None

    def quantizer(self, group_size: int | None) -> WeightQuantizer:
        """The one quantizer that serves fake quantization and export of a weight."""
        return WeightQuantizer(self.grid, group_size)


SCHEMES: dict[Scheme, SchemeInfo] = {
    Scheme.INT8: SchemeInfo(
        purpose="Half the size of 16 bits at next to no loss. Any machine; on a server's GPU not faster than 16 bits.",
        grid=SymmetricGrid(8),
        weights="8-bit integers, one scale for each output channel",
        activations=None,
        group_sizes=(),
        multiple_of=1,
        tensor=tensors.int8_tensor,
        tensor_name="IntxUnpackedToInt8Tensor",
        config=lambda _: IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0)),
        runs_on_cpu=True,
        served_by="any CPU or GPU",
    ),
    Scheme.INT8_INT4: SchemeInfo(
        purpose="Phones and CPUs: what ExecuTorch packs to 4 bits on the device. The file itself holds a byte for each weight.",
        grid=SymmetricGrid(4),
        weights="4-bit integers, one scale for each group",
        activations=Int8Activations(),
        group_sizes=(32,),
        multiple_of=1,
        tensor=tensors.int8_int4_tensor,
        tensor_name="IntxUnpackedToInt8Tensor",
        config=lambda group: Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(group)),
        runs_on_cpu=True,
        served_by="any CPU (ExecuTorch included) or GPU",
    ),
    Scheme.INT4: SchemeInfo(
        purpose="The smallest file: a quarter of 16 bits. GPU servers that answer few requests at once.",
        grid=ZeroPointGrid(),
        weights="4-bit integers, one scale and one zero point for each group",
        activations=None,
        group_sizes=(128, 64, 32),
        multiple_of=1,
        tensor=tensors.int4_tensor,
        tensor_name="Int4Tensor, plain packing",
        config=lambda group: Int4WeightOnlyConfig(group_size=group),
        runs_on_cpu=False,
        served_by="an NVIDIA GPU of compute capability 9.0 (H100, H200) with the mslk package",
        served_in=torch.bfloat16,
    ),
    Scheme.FP8_INT4: SchemeInfo(
        purpose="The file of int4, and float8 arithmetic: GPU servers that answer many requests at once.",
        grid=EighthsGrid(),
        weights="4-bit integers, one scale for each group, read as float8",
        activations=MslkFloat8Activations(),
        group_sizes=(128,),
        multiple_of=1,
        tensor=tensors.fp8_int4_tensor,
        tensor_name="Int4Tensor, plain packing",
        config=lambda _: Float8DynamicActivationInt4WeightConfig(int4_packing_format="plain"),
        runs_on_cpu=False,
        served_by="an NVIDIA GPU of compute capability 9.0 (H100, H200) with the mslk package",
        served_in=torch.bfloat16,
    ),
    Scheme.FP8_FP8: SchemeInfo(
        purpose="Half the size of 16 bits at next to no loss, with float8 arithmetic. Measured uncompiled on an H200 it is no faster than 16 bits yet.",
        grid=Float8Grid(),
        weights="float8 (e4m3), one scale for each output channel",
        activations=Float8Activations(),
        group_sizes=(),
        multiple_of=16,
        tensor=tensors.fp8_fp8_tensor,
        tensor_name="Float8Tensor, PerRow",
        config=lambda _: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), activation_value_lb=LEAST_LARGEST),
        runs_on_cpu=True,
        served_by="an NVIDIA GPU of compute capability 8.9 or newer (L4, L40S, H100)",
        served_in=torch.bfloat16,
    ),
}

"""torchao's own tensor classes around our codes, and back: what the exported folder's weights are made of. Built in plain PyTorch on any device.

Each builder takes a quantized weight and the number of weights that share a scale; schemes.py says which scheme has which.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import Float8Tensor, Int4Tensor, IntxUnpackedToInt8Tensor, PerRow
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8TensorActivationQuantization

from finetune_trainer.qat.quantizers import ActivationQuantizer, WeightCodes
from finetune_trainer.qat.quantizers.activations import Int8Activations
from finetune_trainer.qat.quantizers.float8 import FLOAT8, LEAST_LARGEST, Float8Activations, MslkFloat8Activations
from finetune_trainer.qat.quantizers.int4 import EighthsGrid, ZeroPointGrid, pack, unpack

QUANTIZED = (IntxUnpackedToInt8Tensor, Int4Tensor, Float8Tensor)


def int8_tensor(quantized: WeightCodes, block: int) -> Tensor:
    """Weight-only int8."""
    return _intx_tensor(quantized, block, torch.int8, None)


def int8_int4_tensor(quantized: WeightCodes, block: int) -> Tensor:
    """A 4-bit grid, one byte each; the layer quantizes its input to int8 for each token."""
    # The plain string, as torchao's own conversion has it: safetensors metadata with the enum's member can't be read back.
    return _intx_tensor(quantized, block, torch.int4, IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN.value)


def int4_tensor(quantized: WeightCodes, block: int) -> Int4Tensor:
    """Two codes in a byte; the layer's input is read as it is."""
    return _packed_tensor(quantized, block, torch.bfloat16)


def fp8_int4_tensor(quantized: WeightCodes, block: int) -> Int4Tensor:
    """Two codes in a byte; the layer quantizes its input to float8 for each token."""
    return _packed_tensor(quantized, block, FLOAT8)


def fp8_fp8_tensor(quantized: WeightCodes, block: int) -> Float8Tensor:
    """float8 for each row; the layer quantizes its input to float8 for each token."""
    return Float8Tensor(
        qdata=quantized.codes,
        scale=quantized.scale,
        block_size=[1, block],
        mm_config=Float8MMConfig(use_fast_accum=True),
        act_quant_kwargs=QuantizeTensorToFloat8Kwargs(float8_dtype=FLOAT8, granularity=PerRow(), hp_value_lb=LEAST_LARGEST),
        dtype=quantized.dtype,
    )


def dequantized(weight: Tensor) -> Tensor:
    """What a shipped weight stands for [out, in]; a plain one stands for itself."""
    if isinstance(weight, Int4Tensor):  # torchao 0.18 has no dequantize for it
        codes = unpack(weight.qdata)
        grouped = codes.view(codes.shape[0], -1, weight.block_size[-1])
        grid = EighthsGrid() if weight.activation_dtype == FLOAT8 else ZeroPointGrid()
        values = grid.dequantize(grouped, weight.scale.t(), weight.zero_point.t(), weight.dtype)
        return values.view(codes.shape)
    return weight.dequantize() if isinstance(weight, QUANTIZED) else weight


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear layer with a shipped weight computes, in the arithmetic of the training; needs no kernel. [..., in] to [..., out]."""
    quantizer = activations_of(weight)
    read = x if quantizer is None else quantizer.dequantize(quantizer.quantize(x), x.dtype)
    return F.linear(read, dequantized(weight), bias)


def activations_of(weight: Tensor) -> ActivationQuantizer | None:
    """How the layer of a shipped weight quantizes its input."""
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        return Int8Activations() if weight.activation_quantization else None
    if isinstance(weight, Int4Tensor):
        return MslkFloat8Activations() if weight.activation_dtype == FLOAT8 else None
    return Float8Activations() if isinstance(weight, Float8Tensor) else None


def _intx_tensor(quantized: WeightCodes, block: int, target: torch.dtype, activations: str | None) -> IntxUnpackedToInt8Tensor:
    return IntxUnpackedToInt8Tensor(
        qdata=quantized.codes,
        scale=quantized.scale,
        zero_point=torch.zeros_like(quantized.scale, dtype=torch.int8),
        target_dtype=target,
        block_size=(1, block),
        dtype=quantized.dtype,
        activation_quantization=activations,
    )


def _packed_tensor(quantized: WeightCodes, block: int, activations: torch.dtype) -> Int4Tensor:
    if quantized.zero is None:
        raise ValueError("an Int4Tensor needs a zero point for each group")
    return Int4Tensor(
        qdata=pack(quantized.codes),
        scale=quantized.scale.t().contiguous(),
        zero_point=quantized.zero.t().contiguous(),
        block_size=[1, block],
        shape=quantized.codes.shape,
        activation_dtype=activations,
    )

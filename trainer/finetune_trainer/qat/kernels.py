"""Which kernel computes a shipped linear layer on this machine, and how far it is from the arithmetic of the training, layer by layer.

A kernel adds up in another order and rounds in other places, so its result can't be the same bits; and one bit is enough for another code of
the next layer's input, so that logits drift apart without any defect. Hence each layer is held against the reference on the same input.
Used by the proof's fresh process (stages/verify_folder.py).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import Float8Tensor, Int4Tensor, IntxUnpackedToInt8Tensor

from finetune_trainer.qat.tensors import QUANTIZED, activations_of, dequantized, reference_linear

REFERENCE = "torchao's reference kernels"
_FLOAT8_CAPABILITY, _MSLK_CAPABILITY = (8, 9), (9, 0)


def kernel_of(model: nn.Module, device: torch.device) -> str:
    """What computes the model's quantized layers on a device, in words; empty where nothing does."""
    weights = {type(layer.weight) for _, layer in quantized_layers(model)}
    if weights <= {IntxUnpackedToInt8Tensor}:
        return REFERENCE
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    # torchao takes mslk's kernels wherever they are and run.
    mslk = capability is not None and capability >= _MSLK_CAPABILITY and find_spec("mslk") is not None
    if weights == {Float8Tensor} and not mslk:
        return "torch._scaled_mm" if capability is None or capability >= _FLOAT8_CAPABILITY else ""
    return "mslk" if mslk and weights in ({Int4Tensor}, {Float8Tensor}) else ""


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of every linear layer whose weight is quantized."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, QUANTIZED):
            yield name, module


@contextmanager
def reference_arithmetic(model: nn.Module) -> Iterator[None]:
    """Within the block the quantized layers compute as training does, without their kernel."""
    layers = [layer for _, layer in quantized_layers(model)]
    for layer in layers:
        layer.forward = partial(_reference_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def kernel_errors(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """For each quantized layer how far its kernel is from the reference on the input that it gets in this batch.

    The unit is one rounding step of the model's dtype, relative to the sum of the absolute products of each output; a few are rounding.
    """
    errors: dict[str, float] = {}
    hooks = [layer.register_forward_hook(partial(_note_error, errors, name)) for name, layer in quantized_layers(model)]
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def _reference_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return reference_linear(x, layer.weight, layer.bias)


def _note_error(errors: dict[str, float], name: str, layer: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
    (x,) = inputs
    quantizer = activations_of(layer.weight)
    read = x if quantizer is None else quantizer.dequantize(quantizer.quantize(x), x.dtype)
    bias = None if layer.bias is None else layer.bias.double().abs()
    size = F.linear(read.double().abs(), dequantized(layer.weight).double().abs(), bias)
    difference = (output.double() - reference_linear(x, layer.weight, layer.bias).double()).abs()
    steps = difference / (size * torch.finfo(x.dtype).eps).clamp(min=torch.finfo(torch.float64).tiny)
    # Of two numbers, one of them NaN, max() gives the first.
    errors[name] = max(errors.get(name, 0.0), float(steps.nan_to_num(nan=math.inf).max()))

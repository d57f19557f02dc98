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

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import Float8Tensor, Int4Tensor, IntxUnpackedToInt8Tensor

from finetune_trainer.qat.tensors import QUANTIZED, activations_of, dequantized, reference_linear

REFERENCE = "torchao's reference kernels"
_FLOAT8_CAPABILITY, _MSLK_CAPABILITY = (8, 9), (9, 0)


def kernel_of(model: nn.Module, device: torch.device) -> str:
    """What computes the model's quantized layers on a device, in words; empty where nothing does, as for float32 on a GPU."""
    layers = [layer for _, layer in quantized_layers(model)]
    weights = {type(layer.weight) for layer in layers}
    if weights <= {IntxUnpackedToInt8Tensor}:
        return REFERENCE
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability and any(layer.weight.dtype != torch.bfloat16 for layer in layers):
        return ""
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
    """For each quantized layer how far its kernel is from the reference on the input that it gets in this batch, as `steps_off` has it."""
    errors: dict[str, float] = {}
    hooks = [layer.register_forward_hook(partial(_note_error, errors, name)) for name, layer in quantized_layers(model)]
    try:
        with torch.no_grad():
            model(**batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return errors


def steps_off(layer: nn.Linear, x: Tensor, output: Tensor) -> float:
    """How far what a kernel gave for x is from the reference, in rounding steps, 0 or more; infinite where it is no number.

    One step of an output y is eps (sqrt(sum p^2) + |y|), with eps of the model's dtype and p its products: about what rounding each product, and y, can cost. It is of
    y's own size, unlike the sum of |p|, which grows with the number of products. Of each output channel the root mean square over all tokens is taken, so
    that one wrong scale shows, and the worst channel counts.

    Args:
        layer: with a shipped weight [out, in].
        x: [..., in], in the model's dtype.
        output: [..., out].
    """
    quantizer = activations_of(layer.weight)
    read = x if quantizer is None else quantizer.dequantize(quantizer.quantize(x), x.dtype)
    products = F.linear(read.double().square(), dequantized(layer.weight).double().square()).sqrt()
    expected = reference_linear(x, layer.weight, layer.bias).double()
    step = (products + expected.abs()) * torch.finfo(x.dtype).eps
    steps = (output.double() - expected) / step.clamp(min=torch.finfo(torch.float64).tiny)
    return float(steps.flatten(end_dim=-2).square().mean(dim=0).sqrt().nan_to_num(nan=math.inf).max())


def _reference_forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return reference_linear(x, layer.weight, layer.bias)


def _note_error(errors: dict[str, float], name: str, layer: nn.Linear, inputs: tuple[Tensor], output: Tensor) -> None:
    errors[name] = max(errors.get(name, 0.0), steps_off(layer, *inputs, output))

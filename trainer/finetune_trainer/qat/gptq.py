"""GPTQ: rounding by what a layer computes, not weight by weight: each weight makes up for the rounding of those before it in its row.

Done once, at the switch to quantization-aware steps. What it changes is kept as a small shift of each weight in front of the one quantizer
(ExactState.rounding_offset), so that training, export and proof stay what they are, and the adapter learns on from there.

Source: GPTQ (arXiv 2210.17323, algorithm 1), in its activation order (the columns with the largest inputs first) and with all scales fixed before: those
of least squared error where each column counts as much as its inputs are large. A pure function of base weights, adapter and rows, so that a
resumed run makes the same; like a training step it is the same to the bit on one machine, not on any.
"""

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import Tensor

from finetune_trainer.batch import pad
from finetune_trainer.example import Example
from finetune_trainer.qat.linear import ExactLinear, RoundingOffset, adapted_weight, base_linear
from finetune_trainer.qat.prepare import drop_caches, exact_layers, fake_quantization
from finetune_trainer.qat.scales import fit_layer, fit_scales

TOKENS = 4096
"""Tokens of the rows that the choice is made from, at most; one row, if it is longer."""

_DAMPING = 0.1  # of the mean square of an input; of 0.01, 0.03, 0.1 and 0.4 the one with the least held-out loss (BENCHMARKS.md)
_UNIFORM_SHARE = (
    0.5  # of the mean square of an input: every column counts so much besides its own, so that none is given up (BENCHMARKS.md)
)
_COLUMNS_AT_ONCE = 64
_PARTS_OF_A_STEP, _LARGEST_OFFSET = 32, 127


def calibration_rows(examples: Sequence[Example]) -> Sequence[Example]:
    """The first rows, as long as all of them, padded, stay within the limit; at least one. `examples` are in random order."""
    longest = 0
    for count, example in enumerate(examples):
        longest = max(longest, len(example.input_ids))
        if count and (count + 1) * longest > TOKENS:
            return examples[:count]
    return examples


def gains_from_a_choice(model: PeftModel) -> bool:
    """Whether its grid is so coarse that scales and rounding are worth choosing; where it isn't, nearest values and scales of the largest are kept."""
    return any(layer.exact.quantizer.grid.gains_from_clipping for _, layer in exact_layers(model))


@torch.no_grad()
def choose_rounding(model: PeftModel, examples: Sequence[Example]) -> None:
    """Chooses scales and rounding of every layer, in one forward pass: each by what the quantized layers before it hand it.

    Layers that no input reaches, and those of a grid too fine to gain from a choice, get the scales of their weights alone (scales.py).

    Args:
        model: prepared; what scales and rounding its layers have already does not matter.
        examples: rows like those that it is for.
    """
    if not gains_from_a_choice(model):
        fit_scales(model)
        return
    waiting = {layer for _, layer in exact_layers(model)}
    batch = pad(examples, 0, model.device)
    mask = batch["attention_mask"].bool()

    def choose_once(layer: ExactLinear, inputs: Tensor) -> None:
        if layer in waiting:  # a shared layer is called again
            waiting.remove(layer)
            _choose(layer, inputs, mask)

    drop_caches(model)
    run_quantized(model, batch["input_ids"], batch["attention_mask"], choose_once)
    for layer in waiting:
        fit_layer(layer)
    drop_caches(model)


@torch.no_grad()
def run_quantized(model: PeftModel, input_ids: Tensor, attention_mask: Tensor | None, act: Callable[[ExactLinear, Tensor], None]) -> None:
    """One forward pass of the quantized model; `act` is called before each exact layer, with its inputs, and the layer computes as it leaves it."""

    def before(layer: ExactLinear, arguments: tuple[Tensor, ...]) -> None:
        act(layer, arguments[0])

    hooks = [layer.register_forward_pre_hook(before) for _, layer in exact_layers(model)]
    try:
        with fake_quantization(model, enabled=True):
            model.get_base_model().base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def scratch_bytes(layer: ExactLinear, tokens: int) -> int:
    """The most that the choice for one layer needs besides its inputs.

    That is two and a quarter times these inputs and a square matrix, or four such matrices, or the layer's weights seven times and their scales.
    """
    outputs, inputs = base_linear(layer).weight.shape
    return 4 * inputs * max(inputs + 9 * tokens // 4, 4 * inputs, 7 * outputs + outputs // 4)


def _choose(layer: ExactLinear, inputs: Tensor, mask: Tensor) -> None:
    """Nearest values where the inputs say nothing."""
    read = inputs[mask] if inputs.shape[:-1] == mask.shape else inputs.flatten(0, -2)  # experts get tokens, not rows
    if layer.exact.activations is not None:
        read = layer.exact.activations.dequantize(layer.exact.activations.quantize(read), read.dtype)
    read = read.to(torch.float32)
    hessian = read.T @ read
    del read
    counts = hessian.diagonal().clone()
    order = counts.argsort(descending=True, stable=True)
    hessian = hessian[order][:, order]
    factor = _cholesky_of_inverse(hessian)
    del hessian
    if factor is None:
        fit_layer(layer)
        return
    quantizer, weight = layer.exact.quantizer, adapted_weight(layer)
    layer.exact.clip_ratio = quantizer.least_squares_clip_ratio(weight, counts + counts.mean() * _UNIFORM_SHARE)
    _, scale, zero, _ = quantizer.quantize(weight, layer.exact.clip_ratio)
    weight, scale = weight.to(torch.float32), scale.to(torch.float32)
    block, bounds = quantizer.block(weight.shape[1]), quantizer.grid.bounds
    moved = compensated(
        weight[:, order], factor, scale, None if zero is None else zero.to(torch.float32), (order // block).tolist(), bounds
    )
    del factor
    layer.exact.rounding_offset = _rounding_offset(moved[:, order.argsort()], weight, scale, block)


def _cholesky_of_inverse(hessian: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the damped matrix's inverse [in, in]; None for inputs of zeros, or that are not finite."""
    damping = hessian.diagonal().mean() * _DAMPING
    lower, failed = torch.linalg.cholesky_ex(hessian.diagonal_scatter(hessian.diagonal() + damping))
    if bool(failed):
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if bool(failed) else factor


def compensated(
    weight: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, groups: Sequence[int], bounds: tuple[int, int]
) -> Tensor:
    """What each weight [out, in] has become when its turn to be rounded comes: itself, and its share of the errors before it.

    Args:
        weight: float32, its columns in the order of their turns.
        factor: upper Cholesky factor [in, in] of the inverse of the inputs' damped X^T X, in that order.
        scale, zero: [out, groups]; the grid's values are code * scale + zero. That fp8-int4 reads them as float8 is left out: it is a quarter of a step at most
            where weights are as small as 0.03, and less where they are larger.
        groups: which of them each column has.
        bounds: smallest and largest code.
    """
    left = weight.T.clone(memory_format=torch.contiguous_format)  # [in, out]: a column of the weight is read at once
    scales, zeros = scale.T.contiguous(), None if zero is None else zero.T.contiguous()
    for start in range(0, len(left), _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, len(left))
        columns = left[start:stop]
        errors = torch.empty_like(columns)
        for index in range(stop - start):
            place = start + index
            column, group = columns[index], groups[place]
            offset = column if zeros is None else column - zeros[group]
            rounded = (offset / scales[group]).round_().clamp_(*bounds).mul_(scales[group])
            errors[index] = (offset - rounded) / factor[place, place]
            columns[index + 1 :].addr_(factor[place, place + 1 : stop], errors[index], alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return left.T


def _rounding_offset(moved: Tensor, weight: Tensor, scale: Tensor, block: int) -> RoundingOffset:
    """The shift in thirty-seconds of a step. A group's smallest and largest weight stay, and no other passes them: the scales are made from these."""
    grouped = weight.view(weight.shape[0], -1, block)
    lowest, highest = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    unit = scale / _PARTS_OF_A_STEP
    room = [((edge - grouped) / unit.unsqueeze(-1)).trunc_().nan_to_num_() for edge in (lowest, highest)]
    parts = ((moved.reshape(grouped.shape) - grouped) / unit.unsqueeze(-1)).nan_to_num_().round_()
    parts = parts.clamp_(*room).clamp_(-_LARGEST_OFFSET, _LARGEST_OFFSET)
    parts[(grouped == lowest) | (grouped == highest)] = 0
    return RoundingOffset(parts.to(torch.int8).view(weight.shape), unit)

"""The exact linear layer: `y = fq(W + s B A + D) fq(x)`, with a straight-through backward pass that never forms a full weight gradient.

prepare.py turns a model's linear layers into these, in place; convert.py exports from the same `merged_weight` through the same quantizer.
Fake quantization is not idempotent: nothing here ever quantizes a weight that was quantized before.

The backward pass is the low-rank straight-through estimator of L4Q (arXiv 2402.04902) and LR-QAT (arXiv 2406.06385): with y = Wq Xq and the
quantizers taken as identity, dX = dY Wq, dA = s (dY B)^T Xq, dB = s dY^T (Xq A^T).
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F

from finetune_trainer.qat.quantizers import ActivationCodes, ActivationQuantizer, WeightCodes, WeightQuantizer


@dataclass
class ExactMode:
    """What all exact layers of one model share.

    Attributes:
        enabled: whether the layers fake-quantize, or compute what they did before.
        keep_codes: keep each layer's weight codes until the next optimizer step (one byte a weight), which pays when several
            micro-batches or evaluation batches use the same weights.
        generation: bumped whenever weights may have changed; fused optimizers and `.data` don't bump a tensor's own version.
        frozen_generation: likewise for layers without an adapter, which no optimizer step changes.
    """

    enabled: bool = True
    keep_codes: bool = False
    generation: int = 0
    frozen_generation: int = 0
    last_input: "SharedInput" = field(default_factory=lambda: SharedInput())

    def drop_caches(self, *, frozen: bool = True) -> None:
        """Weights may have changed (with `frozen` also those without an adapter): forget what was computed from them."""
        self.generation += 1
        self.frozen_generation += int(frozen)
        self.last_input = SharedInput()


class SharedInput:
    """The codes of the activation that was quantized last: q, k and v (gate and up) read the same input and share one copy."""

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._version = -1
        self._codes: ActivationCodes | None = None

    def codes(self, activation: Tensor, quantizer: ActivationQuantizer) -> ActivationCodes:
        """Codes of `activation` [..., in], made once for each tensor; all layers of one model have one quantizer."""
        if activation.is_inference():  # no version counter to trust
            return quantizer.quantize(activation)
        known = self._source is not None and self._source() is activation and self._version == activation._version
        if not known or self._codes is None:
            self._codes = quantizer.quantize(activation)
            self._source, self._version = weakref.ref(activation), activation._version
        return self._codes


class RoundingOffset(NamedTuple):
    """A shift D of each weight in front of the quantizer, which decides its rounding; made by gptq.py.

    Attributes:
        parts: int8 [out, in], in units of its group.
        unit: float32 [out, groups].
    """

    parts: Tensor
    unit: Tensor


@dataclass
class ExactState:
    """What one exact layer knows besides its weights.

    Attributes:
        quantizer: None for an adapted layer that export merges and does not quantize.
        activations: None where the layer reads its input as it is.
        clip_ratio: [out, groups], scales.py's factors for this layer; None for scales of the largest value.
        rounding_offset: gptq.py's choice for this layer; None where each weight goes to the nearest value of the grid.
    """

    mode: ExactMode
    quantizer: WeightQuantizer | None
    activations: ActivationQuantizer | None
    clip_ratio: Tensor | None = None
    rounding_offset: RoundingOffset | None = None
    cached: WeightCodes | None = None
    cached_key: tuple[object, ...] = ()


class ExactLoraLinear(LoraLinear):
    """A peft LoRA layer whose forward pass fake-quantizes the merged weight. Made by `__class__` assignment, so that names stay."""

    exact: ExactState

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As peft's, unless fake quantization is on. Shapes: [..., in] to [..., out]."""
        return exact_linear(self, x) if self.exact.mode.enabled else super().forward(x, *args, **kwargs)


class ExactFrozenLinear(nn.Linear):
    """A linear layer without an adapter that export quantizes too: its fake-quantized weight is constant."""

    exact: ExactState

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 nn.Linear's own name
        """As nn.Linear's, unless fake quantization is on."""
        return exact_linear(self, input) if self.exact.mode.enabled else super().forward(input)


ExactLinear = ExactLoraLinear | ExactFrozenLinear


def base_linear(layer: ExactLinear) -> nn.Linear:
    """The layer that holds the frozen weight and the bias."""
    return layer.get_base_layer() if isinstance(layer, LoraLinear) else layer


def adapter_factors(layer: ExactLinear) -> tuple[Tensor, Tensor, float] | None:
    """A [rank, in], B [out, rank] and s of the active adapter; None without one, or while adapters are disabled."""
    if not isinstance(layer, LoraLinear) or layer.disable_adapters:
        return None
    name = next((name for name in layer.active_adapters if name in layer.lora_A), None)
    return None if name is None else (layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name]))


@torch.no_grad()
def adapted_weight(layer: ExactLinear) -> Tensor:
    """W + s B A [out, in] in the base weight's dtype: what the layer has learnt, before its rounding is chosen."""
    weight = base_linear(layer).weight
    return weight.detach() if adapter_factors(layer) is None else _adapted(layer).to(weight.dtype)


@torch.no_grad()
def merged_weight(layer: ExactLinear) -> Tensor:
    """W + s B A + D [out, in] in the base weight's dtype: merged in float32 (float64 for a float64 model), then cast. Serves training and export."""
    weight, rounding_offset = base_linear(layer).weight, layer.exact.rounding_offset
    if rounding_offset is None:
        return adapted_weight(layer)
    merged = _adapted(layer)
    grouped = merged.view(len(merged), rounding_offset.unit.shape[1], -1)
    grouped.addcmul_(rounding_offset.parts.view(grouped.shape).to(merged.dtype), rounding_offset.unit.to(merged.dtype).unsqueeze(-1))
    return merged.to(weight.dtype)


def _adapted(layer: ExactLinear) -> Tensor:
    """W + s B A in at least float32, in memory of its own."""
    weight, factors = base_linear(layer).weight, adapter_factors(layer)
    wide = torch.promote_types(weight.dtype, torch.float32)
    if factors is None:
        return weight.detach().to(wide, copy=True)
    a, b, scaling = factors
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scaling)


def weight_codes(layer: ExactLinear) -> WeightCodes:
    """Codes of the merged weight, from the cache where `keep_codes` allows it; a frozen layer's are always kept."""
    state, factors = layer.exact, adapter_factors(layer)
    weight = base_linear(layer).weight
    sources = (weight, *factors[:2]) if factors else (weight,)
    generation = state.mode.frozen_generation if isinstance(layer, ExactFrozenLinear) else state.mode.generation
    key = (generation, *((id(item), item._version) for item in sources))
    if state.cached is not None and state.cached_key == key:
        return state.cached
    codes = state.quantizer.quantize(merged_weight(layer), state.clip_ratio)
    keep = state.mode.keep_codes or isinstance(layer, ExactFrozenLinear)
    state.cached, state.cached_key = (codes, key) if keep else (None, ())
    return codes


def fake_quantized_weight(layer: ExactLinear) -> Tensor:
    """fq(W + s B A + D) [out, in]: what the exported tensor dequantizes to; the merged weight itself where export does not quantize it."""
    quantizer = layer.exact.quantizer
    return merged_weight(layer) if quantizer is None else quantizer.dequantize(weight_codes(layer))


def exact_linear(layer: ExactLinear, x: Tensor) -> Tensor:
    """fq(W + s B A) fq(x) + bias, differentiable in x, A and B."""
    state = layer.exact
    activation = state.mode.last_input.codes(x, state.activations) if state.activations else None
    a, b, _ = adapter_factors(layer) or (None, None, 1.0)
    output: Tensor = _StraightThrough.apply(x, a, b, layer, *(activation or ()))
    return output


class _StraightThrough(torch.autograd.Function):
    """Saves the activation's codes (or, without activation quantization, the activation), A and B; makes Wq again in the backward pass.

    The same tensors are saved whether the weight codes came from the cache or not: non-reentrant checkpointing compares them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, layer: ExactLinear, *activation: Tensor | None) -> Tensor:
        ctx.layer = layer
        ctx.quantizer, ctx.dtype = layer.exact.activations if activation else None, x.dtype
        ctx.save_for_backward(a, b, *(activation or (x,)))
        # The bias is frozen, and part of the same call as in the exported model: added apart, it would round differently.
        return F.linear(_read(ctx, activation or (x,)), fake_quantized_weight(layer), base_linear(layer).bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *activation = ctx.saved_tensors
        grad_x = grad_output @ fake_quantized_weight(ctx.layer) if ctx.needs_input_grad[0] else None
        grad_a = grad_b = None
        if a is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            x = _read(ctx, activation)
            grad_a, grad_b = _low_rank_gradients(grad_output, x, a, b, float(_scaling(ctx.layer)))
        return (grad_x, grad_a, grad_b, None, *(None for _ in activation if ctx.quantizer))


def _scaling(layer: ExactLinear) -> float:
    factors = adapter_factors(layer)
    if factors is None:
        raise RuntimeError("adapters were disabled between the forward and the backward pass")
    return factors[2]


def _read(ctx: Any, saved: Sequence[Tensor]) -> Tensor:
    return ctx.quantizer.dequantize(ActivationCodes(*saved), ctx.dtype) if ctx.quantizer else saved[0]


def _low_rank_gradients(grad_output: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """dA = s (dY B)^T X and dB = s dY^T (X A^T), in the adapter's dtype; [tokens, out] and [tokens, in] in, [rank, in] and [out, rank] out."""
    grad = grad_output.reshape(-1, grad_output.shape[-1]).to(a.dtype)
    x = x.reshape(-1, x.shape[-1]).to(a.dtype)
    grad_a = (grad @ b).mul_(scaling).T @ x
    grad_b = grad.T @ (x @ a.T).mul_(scaling)
    return grad_a, grad_b

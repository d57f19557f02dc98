"""One training step, or one batch of held-out rows, on fake tensors: the real model code, losses and backward pass, with shapes and no values.

Any decoder that transformers can build is measured as it is: no formula for an architecture, no weights, no GPU. Called by estimate.py.
For a GPU the step is traced with a CPU's operators, whose attention keeps what a GPU's flash attention keeps.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from finetune_api.spec import FineTuneJobSpec, Scheme
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from finetune_trainer.adapter import add_adapter
from finetune_trainer.base_model import cast_last_hidden_state
from finetune_trainer.failures import first_line, is_out_of_memory
from finetune_trainer.memory.tracking import LiveBytes
from finetune_trainer.qat.gptq import run_quantized, scratch_bytes
from finetune_trainer.qat.linear import ExactLoraLinear, base_linear, weight_codes
from finetune_trainer.qat.prepare import drop_caches, exact_layers, fake_quantization, free_codes, mode_of, prepare
from finetune_trainer.token_loss import Prediction, output_head, summed_loss, token_losses

# The second is its name in the transformers that unsloth asks for.
_CHECKPOINTING = "activation_checkpointing" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient_checkpointing"
_LOSS_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for
_FEW_LAYERS = (2, 4)  # of a deep model are traced, an even number each, since two kinds of attention may take turns; the rest takes as much


class UntraceableError(Exception):
    """This model's code looks at values, such as the experts that a router chooses, so its step can't be traced without weights."""


@dataclass(frozen=True)
class Step:
    """A forward and backward pass.

    Attributes:
        rows: rows of the micro-batch.
        tokens: tokens of each.
        padded: whether the rows differ in length, so that attention keeps a mask [rows, 1, tokens, tokens] for each layer.
        quantized: whether it is a step of exact quantization-aware training.
        checkpointed: whether layers are computed again in the backward pass instead of kept.
        fused_loss: whether trl's loss runs in kernels that need no scratch tensors (a GPU's).
        taught: whether a teacher's forward pass comes first, and the loss is the one with a teacher.
        accumulated: whether micro-batches before it have left their gradients.
    """

    rows: int
    tokens: int
    padded: bool = False
    quantized: bool = False
    checkpointed: bool = False
    fused_loss: bool = False
    taught: bool = False
    accumulated: bool = False


@dataclass(frozen=True)
class HeldOutBatch:
    """A forward pass over held-out rows, without gradients.

    Attributes:
        rows: rows of the batch; several are taken to differ in length.
        tokens: tokens of each.
        quantized: whether weights and activations are fake-quantized.
        rounding: whether the rounding of weights is chosen by them; the rows are training data then.
    """

    rows: int
    tokens: int
    quantized: bool = False
    rounding: bool = False


def empty_model(config: PreTrainedConfig, spec: FineTuneJobSpec, dtype: torch.dtype) -> PeftModel:
    """The job's model with its adapter, prepared for the job's scheme, on the meta device.

    Raises:
        SpecError: the adapter or the scheme does not fit the model.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=spec.model.trust_remote_code)
        cast_last_hidden_state(base)
        model = add_adapter(base, spec.lora)
    if spec.quantization.scheme is not Scheme.NONE:
        prepare(model, spec.quantization, enabled=False)
    add_fused_lm_head(model.get_base_model(), outputs=_LOSS_OUTPUTS)
    return model.train()


def peak_bytes(model: PeftModel, traced: Step | HeldOutBatch) -> int:
    """The most bytes alive meanwhile: weights, adapter, its gradients, and what the passes keep and make. Without optimizer states.

    Args:
        model: from `empty_model`; its parameters are fake tensors within the call, and what they were afterwards.
        traced: what is run.

    Raises:
        UntraceableError: the model's code needs values.
    """
    mode = mode_of(model)
    if mode is not None:
        mode.enabled = traced.quantized
    _checkpoint(model, enabled=isinstance(traced, Step) and traced.checkpointed)
    stack = _layers(model)
    if stack is None:
        return _peak(model, traced)
    peaks = []
    for count in _FEW_LAYERS:
        with stack.shortened(count):
            peaks.append(_peak(model, traced))
    per_layer = (peaks[1] - peaks[0]) // (_FEW_LAYERS[1] - _FEW_LAYERS[0])
    return peaks[1] + (stack.count - _FEW_LAYERS[1]) * per_layer


def _peak(model: PeftModel, traced: Step | HeldOutBatch) -> int:
    is_step = isinstance(traced, Step)
    with _traced(model) as tracker, _fused() if is_step and traced.fused_loss else nullcontext():
        run(model, traced) if is_step else evaluate(model, traced)
    return tracker.peak


@dataclass(frozen=True)
class _Layers:
    """A model's decoder layers, where all are alike, so that each one more takes as much as the one before."""

    holder: nn.Module
    name: str

    @property
    def count(self) -> int:
        return len(self.holder.get_submodule(self.name))  # type: ignore[arg-type]

    @contextmanager
    def shortened(self, count: int) -> Iterator[None]:
        """The model has only the first of them within the block."""
        layers = self.holder.get_submodule(self.name)
        self.holder._modules[self.name] = nn.ModuleList(list(layers.children())[:count])
        try:
            yield
        finally:
            self.holder._modules[self.name] = layers


def _layers(model: PeftModel) -> _Layers | None:
    """None where layers differ, or are so few that all are traced."""
    depth = getattr(model.get_base_model().config, "num_hidden_layers", 0)
    for holder in model.get_base_model().modules():
        for name, found in holder.named_children():
            if isinstance(found, nn.ModuleList) and len(found) == depth > max(_FEW_LAYERS):
                return _Layers(holder, name) if len({_shape(layer) for layer in found}) == 1 else None
    return None


def _shape(layer: nn.Module) -> tuple[object, ...]:
    """What makes layers alike: the same modules with weights of the same sizes."""
    modules = tuple((path, type(module)) for path, module in layer.named_modules())
    return modules, tuple((path, item.shape, item.dtype) for path, item in layer.named_parameters())


def code_bytes(model: PeftModel) -> int:
    """Bytes of the quantized weights of all adapted layers, which are kept from one micro-batch to the next where they fit."""
    mode = mode_of(model)
    if mode is None:
        return 0
    layers = [layer for _, layer in exact_layers(model) if isinstance(layer, ExactLoraLinear)]
    with fake_quantization(model, enabled=True, keep_codes=True), _traced(model) as tracker:
        before = tracker.live
        for layer in layers:
            weight_codes(layer)
        return tracker.live - before


def factor_bytes(model: PeftModel) -> int:
    """Bytes of what scales.py and gptq.py have found, for every layer that is quantized.

    A float32 factor for each group of weights, and where the grid is coarse an int8 shift of each weight and its float32 unit.
    """
    total = 0
    for _, layer in exact_layers(model):
        quantizer, (outputs, inputs) = layer.exact.quantizer, base_linear(layer).weight.shape
        groups = outputs * (inputs // quantizer.block(inputs))
        total += 4 * groups + (outputs * inputs + 4 * groups if quantizer.grid.gains_from_clipping else 0)
    return total


def run(model: PeftModel, step: Step) -> None:
    """The step itself, on whatever tensors the model has: the loss of stages/train.py (trl's own, or the one with a teacher) and its backward pass."""
    input_ids, mask = _batch(step.rows, step.tokens, padded=step.padded)
    if step.accumulated:
        for item in model.parameters():
            item.grad = torch.zeros_like(item) if item.requires_grad else None
    if step.taught:
        loss = _taught_loss(model, input_ids, mask)
    else:
        loss = -model(input_ids=input_ids, attention_mask=mask, labels=input_ids, fused_lm_head=True, use_cache=False).log_probs.sum()
    (loss / step.tokens).backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(model: PeftModel, batch: HeldOutBatch) -> None:
    """The batch itself, as held_out.py measures it, or as gptq.py runs it, with empty memory for what it computes before each layer."""
    base = model.get_base_model()
    input_ids, mask = _batch(batch.rows, batch.tokens, padded=batch.rows > 1)
    if batch.rounding:
        run_quantized(model, input_ids, mask, lambda layer, _: torch.empty(scratch_bytes(layer, input_ids.numel()), dtype=torch.uint8))
        return
    model.eval()
    try:
        token_losses(output_head(base), Prediction(_hidden(base, input_ids, mask), input_ids[:, 1:].flatten()))
    finally:
        model.train()


def _taught_loss(model: PeftModel, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    base = model.get_base_model()
    with torch.no_grad(), fake_quantization(model, enabled=False):
        taught = _hidden(base, input_ids, mask)
    return summed_loss(output_head(base), Prediction(_hidden(base, input_ids, mask), input_ids[:, 1:].flatten()), taught, weight=0.5)


def _batch(rows: int, tokens: int, *, padded: bool) -> tuple[Tensor, Tensor | None]:
    """input_ids and attention_mask, both [rows, tokens]; rows of different lengths have padding, for which attention makes a mask of its own."""
    input_ids, mask = torch.zeros(rows, tokens, dtype=torch.long), torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, -1] = 0
    return input_ids, mask if padded else None


def _hidden(base: PreTrainedModel, input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """What token_loss.predict keeps where every token is trained; which are, only values could tell."""
    hidden = base.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    return hidden.reshape(-1, hidden.shape[-1])


@contextmanager
def _traced(model: PeftModel) -> Iterator[LiveBytes]:
    """Fake tensors within the block, counted; nothing of them is left in the model.

    Raises:
        UntraceableError: the model's code needs values.
    """
    tracker = LiveBytes()
    drop_caches(model)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _GroupedProducts(), tracker, _faked(model):
            yield tracker
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UntraceableError(f"{type(error).__name__}: {first_line(error)}") from error
    finally:
        free_codes(model, frozen=True)
        drop_caches(model)


class _GroupedProducts(TorchDispatchMode):
    """A mixture's experts are multiplied in groups; what stands in for that product on fake tensors takes bfloat16 alone (torch 2.13), the product itself other dtypes too."""

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._grouped_mm.default:
            return func(*args, **(kwargs or {}))
        factors = (item.bfloat16() for item in args[:2])
        return func(*factors, *args[2:], **(kwargs or {})).to(args[0].dtype)


def _checkpoint(model: PeftModel, enabled: bool) -> None:
    base = model.get_base_model()
    checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    if enabled and not checkpointed:
        # No random number is drawn here, and a fake tensor can't hold the generator's state.
        getattr(base, f"{_CHECKPOINTING}_enable")({"use_reentrant": False, "preserve_rng_state": False})
    elif not enabled and checkpointed:
        getattr(base, f"{_CHECKPOINTING}_disable")()


@contextmanager
def _faked(model: nn.Module) -> Iterator[None]:
    """Every parameter and buffer stands on a CPU that is not there; tied ones stay tied."""
    places = [(held, name) for module in model.modules() for held in (module._parameters, module._buffers) for name in held]
    before = [(held, name, held[name]) for held, name in places if held[name] is not None]
    made: dict[int, Tensor] = {}
    for held, name, tensor in before:
        if id(tensor) not in made:
            fake = torch.empty_like(tensor, device="cpu")
            made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        held[name] = made[id(tensor)]
    try:
        yield
    finally:
        for held, name, tensor in before:
            held[name] = tensor


def _fused() -> mock._patch:
    """trl's loss without the scratch tensors of its CPU path: on a GPU a Triton kernel takes their place."""
    return mock.patch.multiple("trl.kernels.chunked_logprob", _forward_tile=_nothing, _backward_tile=_nothing)


def _nothing(*_: object, **__: object) -> None:
    """A kernel that allocates nothing."""

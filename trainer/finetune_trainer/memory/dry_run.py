"""One training step on fake tensors: the real model code, loss and backward pass, with shapes and no values.

Any decoder that transformers can build is measured as it is: no formula for an architecture, no weights, no GPU. Called by estimate.py.
Not yet run on a GPU: for one, the step is traced with a CPU's operators, whose attention keeps what a GPU's flash attention keeps.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest import mock

import torch
from finetune_api.spec import FineTuneJobSpec, Scheme
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig
from trl.trainer.utils import add_fused_lm_head

from finetune_trainer.adapter import add_adapter
from finetune_trainer.failures import first_line, is_out_of_memory
from finetune_trainer.memory.tracking import LiveBytes
from finetune_trainer.qat.prepare import drop_caches, mode_of, prepare

_LOSS_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks for


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
        fused_loss: whether the loss runs in kernels that need no scratch tensors (a GPU's).
    """

    rows: int
    tokens: int
    padded: bool = False
    quantized: bool = False
    checkpointed: bool = False
    fused_loss: bool = False


def empty_model(config: PreTrainedConfig, spec: FineTuneJobSpec, dtype: torch.dtype) -> PeftModel:
    """The job's model with its adapter, prepared for the job's scheme, on the meta device.

    Raises:
        SpecError: the adapter or the scheme does not fit the model.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=spec.model.trust_remote_code)
        model = add_adapter(base, spec.lora)
    if spec.quantization.scheme is not Scheme.NONE:
        prepare(model, spec.quantization, enabled=False)
    add_fused_lm_head(model.get_base_model(), outputs=_LOSS_OUTPUTS)
    return model.train()


def peak_bytes(model: PeftModel, step: Step) -> int:
    """The most bytes alive during a step: weights, adapter, its gradients, and what the passes keep and make. Without optimizer states.

    Args:
        model: from `empty_model`; its parameters are fake tensors within the call, and what they were afterwards.
        step: what is traced.

    Raises:
        UntraceableError: the model's code needs values.
    """
    mode = mode_of(model)
    if mode is not None:
        mode.enabled = step.quantized
    _checkpoint(model, step.checkpointed)
    tracker = LiveBytes()
    drop_caches(model)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), tracker, _faked(model), _fused() if step.fused_loss else nullcontext():
            run(model, step)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UntraceableError(f"{type(error).__name__}: {first_line(error)}") from error
    finally:
        drop_caches(model)
    return tracker.peak


def run(model: PeftModel, step: Step) -> None:
    """The step itself, on whatever tensors the model has: trl's own loss (SFTTrainer.compute_loss) and its backward pass."""
    input_ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
    shape = (step.rows, 1, step.tokens, step.tokens)
    mask = torch.ones(shape, dtype=torch.bool) if step.padded else None
    output = model(input_ids=input_ids, attention_mask=mask, labels=input_ids, fused_lm_head=True, use_cache=False)
    loss = -output.log_probs.sum() / step.tokens
    loss.backward()
    model.zero_grad(set_to_none=True)


def _checkpoint(model: PeftModel, enabled: bool) -> None:
    base = model.get_base_model()
    if enabled and not base.is_activation_checkpointing:
        # No random number is drawn here, and a fake tensor can't hold the generator's state.
        base.activation_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    elif not enabled and base.is_activation_checkpointing:
        base.activation_checkpointing_disable()


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

"""The training loss from hidden states, a few tokens at a time: the full logits of a batch are never in memory, neither the student's nor the teacher's.

(1 - w) * cross entropy + w * KL(teacher || student), over the trained tokens alone; the others are not projected. The gradient is taken
in the forward pass, chunk by chunk, so that no chunk's logits outlive it. Called by stages/train.py. Knows nothing of adapters or phases.
Source of the chunking: Liger Kernel, fused linear cross-entropy (arXiv 2410.10989).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from finetune_trainer.errors import DataError
from finetune_trainer.example import IGNORED

_LOGITS_AT_ONCE = 2**23  # 32 MB in float32
_ALIKE, _ALIKE_IN_16_BITS = 1e-3, 2e-2  # of the largest logit: the order of scale and cast differs

Head = Callable[[Tensor], Tensor]
"""Hidden states [tokens, features] to logits [tokens, vocabulary]."""


@dataclass(frozen=True)
class Prediction:
    """Where a model predicts trained tokens.

    Attributes:
        hidden: [tokens, features], the last hidden state in front of each.
        labels: [tokens], which token comes.
    """

    hidden: Tensor
    labels: Tensor


def predict(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Prediction:
    """Runs the model without its output head, and keeps what predicts a trained token.

    Args:
        model: a causal language model.
        input_ids: [rows, length], as attention_mask and labels.
        attention_mask: 0 for padding.
        labels: the token itself where it is trained, -100 elsewhere.
    """
    hidden = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state[:, :-1]
    following = labels[:, 1:]
    trained = following != IGNORED
    return Prediction(hidden[trained], following[trained])


def output_head(model: PreTrainedModel) -> Head:
    """The frozen output head, with what some architectures do to the logits: Gemma caps them, Cohere and Granite scale them."""
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    scale, cap = _logit_scale(config), getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        scaled = head(hidden) if scale == 1 else head(hidden) * scale
        wide = scaled.to(torch.promote_types(scaled.dtype, torch.float32))
        return wide if cap is None else torch.tanh(wide / cap) * cap

    return logits


@torch.no_grad()
def require_own_logits(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Refuses a model that computes its logits otherwise than `output_head`: every loss would be that of another function.

    Args:
        model: a causal language model.
        input_ids: [1, tokens].

    Raises:
        DataError: such as a cap that is named otherwise than Gemma's, or layers between the last hidden state and the output head.
    """
    was_training = model.training
    model.eval()
    try:
        own = model(input_ids=input_ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[0]
        ours = output_head(model)(hidden).float()
    finally:
        model.train(was_training)
    alike = _ALIKE if model.dtype.itemsize >= torch.float32.itemsize else _ALIKE_IN_16_BITS
    if ours.shape != own.shape or (ours - own).abs().max() > alike * own.abs().max():  # NaN is the loss's business
        raise DataError(
            f"This model can't be trained: {type(model).__name__} makes its logits otherwise than by its output head from its last hidden state, so its loss would be "
            "that of another model; choose another one."
        )


def summed_loss(head: Head, student: Prediction, teacher: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """The loss summed over the trained tokens, in nats, in at least float32; differentiable in the student's hidden states once.

    Args:
        head: without trained parameters; the same for both.
        student: hidden states and labels.
        teacher: [tokens, features], hidden states of the teacher at the same places; None for cross entropy alone.
        weight: of the divergence, 0 to 1.
    """
    loss: Tensor = _Chunked.apply(student.hidden, head, student.labels, teacher, weight)
    return loss


@torch.no_grad()
def token_losses(head: Head, prediction: Prediction) -> tuple[Tensor, Tensor]:
    """(cross entropy in nats, most likely token) of each trained token, both [tokens]."""
    losses, tokens = [prediction.hidden.new_zeros(0)], [prediction.labels[:0]]
    for hidden, labels, _ in _pieces(prediction.hidden, head, prediction.labels, None):
        logits = head(hidden)
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
        tokens.append(logits.argmax(-1))
    return torch.cat(losses), torch.cat(tokens)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, labels: Tensor, teacher: Tensor | None, weight: float) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grads = []
        for piece, names, taught in _pieces(hidden, head, labels, teacher):
            with torch.enable_grad():
                leaf = piece.detach().requires_grad_()
                loss = _loss(head(leaf), names, None if taught is None else head(taught.detach()).detach(), weight)
            if ctx.needs_input_grad[0]:
                grads.append(torch.autograd.grad(loss, leaf)[0])
            total += loss.detach()
        ctx.save_for_backward(torch.cat(grads) if grads else torch.zeros_like(hidden))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return (grad * grad_output.to(grad.dtype), None, None, None, None)


def _pieces(hidden: Tensor, head: Head, labels: Tensor, teacher: Tensor | None) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Cuts the tokens so that a piece's logits stay small."""
    if not len(labels):
        return []
    with torch.no_grad():
        size = max(1, _LOGITS_AT_ONCE // head(hidden[:1]).shape[-1])
    taught = [None] * len(labels.split(size)) if teacher is None else list(teacher.split(size))
    return list(zip(hidden.split(size), labels.split(size), taught, strict=True))


def _loss(logits: Tensor, labels: Tensor, teacher: Tensor | None, weight: float) -> Tensor:
    if teacher is None:
        return F.cross_entropy(logits, labels, reduction="sum")
    log_probabilities = logits.log_softmax(-1)
    divergence = F.kl_div(log_probabilities, teacher.log_softmax(-1), reduction="sum", log_target=True)
    return (1 - weight) * F.nll_loss(log_probabilities, labels, reduction="sum") + weight * divergence


def _logit_scale(config: Any) -> float:
    """As trl's `add_fused_lm_head` reads it from the configurations that have one."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)

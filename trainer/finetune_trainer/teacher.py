"""The adapter at the switch, frozen: the teacher of the quantization-aware steps, at the cost of a few MB.

Its forward pass is the same model's, with its values in place of the adapter's. Called by phases.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor

from finetune_trainer.qat.prepare import fake_quantization
from finetune_trainer.token_loss import predict

Adapter = dict[str, Tensor]
"""Values of all trained parameters, by name."""


def adapter_values(model: PeftModel) -> Adapter:
    """A copy of the adapter as it is."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def in_place(model: PeftModel, adapter: Adapter) -> Iterator[None]:
    """Computes with other values of the adapter within the block, without fake quantization."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = adapter[name]
        with fake_quantization(model, enabled=False, keep_codes=True):
            yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


@torch.no_grad()
def teacher_hidden(model: PeftModel, teacher: Adapter, batch: dict[str, Tensor]) -> Tensor:
    """The teacher's hidden states [trained tokens, features] on a batch."""
    with in_place(model, teacher):
        return predict(model.get_base_model(), **batch).hidden

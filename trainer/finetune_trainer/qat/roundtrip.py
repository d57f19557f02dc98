"""Before the first step: one real layer is exported, written as safetensors, read back and held against what training will use.

A version of torchao or safetensors that loses a bit, or can't read what it wrote, costs seconds here instead of a whole training.
Called by stages/train.py.
"""

import tempfile
from pathlib import Path

import torch
from finetune_api.spec import Scheme
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict

from finetune_trainer.errors import ProofError
from finetune_trainer.qat.export import exported_tensor
from finetune_trainer.qat.linear import base_linear, fake_quantized_weight
from finetune_trainer.qat.prepare import exact_layers
from finetune_trainer.qat.tensors import dequantized

_NAME = "layer.weight"


def require_roundtrip(model: PeftModel, scheme: Scheme) -> None:
    """The smallest quantized layer survives export, save and reload bit for bit.

    Raises:
        ProofError: it does not; nothing was trained yet.
    """
    name, layer = min(exact_layers(model), key=lambda item: base_linear(item[1]).weight.numel())
    try:
        reloaded = _saved_and_reloaded(exported_tensor(name, layer, scheme))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ProofError(
            f"The export of {name} can't be read back ({type(error).__name__}); nothing was trained. Please report this."
        ) from error
    if not torch.equal(dequantized(reloaded).cpu(), fake_quantized_weight(layer).cpu()):
        raise ProofError(f"The export of {name} is not what training would use; nothing was trained. Please report this.")


def _saved_and_reloaded(tensor: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        flat, metadata = flatten_tensor_state_dict({_NAME: tensor})
        save_file(flat, path, metadata=metadata)
        with safe_open(path, framework="pt") as file:
            read, known = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118 not a mapping
    found, _ = unflatten_tensor_state_dict(read, known)
    return found[_NAME]

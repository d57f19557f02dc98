"""Builds the plain transformers model that is shipped: torchao's own tensors, made from the merged weights by the quantizer of the training.

Called by stages/convert.py. Nothing is quantized twice and nothing is measured here.
"""

import copy
import hashlib
import json
from collections.abc import Collection
from typing import Any

import torch
from finetune_api.spec import Scheme
from peft import PeftModel
from torch import Tensor, nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from finetune_trainer import heap
from finetune_trainer.errors import DataError
from finetune_trainer.qat.linear import ExactLinear, base_linear, fake_quantized_weight, merged_weight, weight_codes
from finetune_trainer.qat.prepare import exact_layers, group_size_of, merged_layers, plain_name
from finetune_trainer.qat.schemes import SCHEMES
from finetune_trainer.qat.tensors import QUANTIZED, dequantized


def exported_tensor(name: str, layer: ExactLinear, scheme: Scheme) -> Tensor:
    """The layer's shipped weight [out, in]: torchao's class around the codes that training uses.

    Raises:
        DataError: a scale is not finite: the weight has NaN, infinite or far too large values.
    """
    codes = weight_codes(layer)
    quantizer = layer.exact.quantizer
    if not all(bool(item.isfinite().all()) for item in (codes.scale, codes.zero) if item is not None):
        raise DataError(f"The trained weight of {name} has values that are not finite; lower training.learningRate and train again.")
    return SCHEMES[scheme].tensor(codes, quantizer.block(codes.codes.shape[1]))


def plain_model(
    model: PeftModel, scheme: Scheme, skipped: Collection[str], *, trust_remote_code: bool, consume: bool = False
) -> PreTrainedModel:
    """A model without adapters whose exact layers hold torchao tensors; everything else is shared with `model`, not copied.

    Args:
        model: the prepared model with its final adapter.
        scheme: the one that the model was prepared for.
        skipped: names of linear layers that stay unquantized.
        trust_remote_code: whether the model's own code may run.
        consume: whether each of the model's weights is freed once its exported tensor is there, and that once it is ready to be written;
            otherwise both models are left as they are.
    """
    base = model.get_base_model()
    config = copy.deepcopy(base.config)
    config.use_cache = True  # training switches it off
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=base.dtype, trust_remote_code=trust_remote_code)
    for name, parameter in base.named_parameters():
        if ".lora_" not in name and not _is_head_tied(name, base):
            _assign(plain, plain_name(name.replace(".base_layer", "")), parameter.detach())
    for name, buffer in base.named_buffers():
        path, _, attribute = plain_name(name.replace(".base_layer", "")).rpartition(".")
        setattr(plain.get_submodule(path), attribute, buffer)
    for name, layer in merged_layers(model):
        _assign(plain, f"{name}.weight", merged_weight(layer))
    for name, layer in exact_layers(model):
        _assign(plain, f"{name}.weight", exported_tensor(name, layer, scheme))
        if consume:
            free_weight(layer)
    plain.tie_weights()
    plain.generation_config = base.generation_config
    _mark_quantized(plain, SCHEMES[scheme].config(group_size_of(model)), skipped, consume=consume)
    return plain.eval()


def free_weight(layer: ExactLinear) -> None:
    """Frees what an exact layer computes with; nobody may ask it for anything any more."""
    weight = base_linear(layer).weight
    heap.forget_pages(weight)
    weight.data = weight.new_empty(0)
    layer.exact.cached, layer.exact.rounding_offset, layer.exact.clip_ratio = None, None, None


def weight_digests(model: nn.Module) -> dict[str, str]:
    """sha256 of the values of every parameter, dequantized, and of every buffer that is saved; equal digests are equal bits."""
    weights = {name: tensor_digest(dequantized(parameter.detach())) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return weights | _buffer_digests(model)


def trained_digests(model: PeftModel) -> dict[str, str]:
    """sha256 of the weights that training's forward pass uses, under the names of the exported model."""
    base = model.get_base_model()
    digests = {
        plain_name(name.replace(".base_layer", "")): tensor_digest(parameter.detach())
        for name, parameter in base.named_parameters(remove_duplicate=False)
        if ".lora_" not in name
    }
    digests |= {plain_name(name.replace(".base_layer", "")): digest for name, digest in _buffer_digests(base).items()}
    digests |= {f"{name}.weight": tensor_digest(fake_quantized_weight(layer)) for name, layer in exact_layers(model)}
    digests |= {f"{name}.weight": tensor_digest(merged_weight(layer)) for name, layer in merged_layers(model)}
    return digests


def _buffer_digests(model: nn.Module) -> dict[str, str]:
    saved = set(model.state_dict())
    return {name: tensor_digest(buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved}


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes, which are not copied: an embedding may be the larger half of a model."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype}{tuple(plain.shape)}".encode())
    digest.update(plain.flatten().view(torch.uint8).numpy())  # flat: a single number has no bytes to view
    return digest.hexdigest()


def _is_head_tied(name: str, base: PreTrainedModel) -> bool:
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    return head is not None and head.weight is embeddings.weight and name.endswith("lm_head.weight")


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))


def _mark_quantized(model: PreTrainedModel, quantization: Any, skipped: Collection[str], *, consume: bool) -> None:
    """What save_pretrained needs to write torchao tensors as safetensors, and config.json to read them back."""
    # A list replaces transformers' own default, which skips the output head: name it again.
    config: Any = TorchAoConfig(quantization, modules_to_not_convert=sorted(skipped) or ["lm_head"])
    model.config.quantization_config = config
    make: Any = _ConsumingQuantizer if consume else AutoHfQuantizer.from_config
    model.hf_quantizer = make(config, pre_quantized=False)
    model.is_quantized = True


class _ConsumingQuantizer(TorchAoHfQuantizer):
    """Takes each quantized weight out of the model as it is flattened: torchao clones what it flattens, so that all at once would be there twice."""

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What safetensors writes, as TorchAoHfQuantizer gives it for the whole model."""
        left = model.state_dict()
        names = list(left)
        flat: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for name in names:
            weight = left.pop(name)
            tensors, told = flatten_tensor_state_dict({name: weight})
            flat |= tensors
            metadata |= told
            if isinstance(weight, QUANTIZED):
                _assign(model, name, torch.empty(0, dtype=weight.dtype))
        return flat, metadata | {"tensor_names": json.dumps(names)}

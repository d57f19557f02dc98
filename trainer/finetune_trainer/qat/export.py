"""Builds the plain transformers model that is shipped: torchao's own tensors, made from the merged weights by the quantizer of the training.

Called by stages/convert.py. Nothing is quantized twice and nothing is measured here.
"""

import copy
import hashlib
from typing import Any

import torch
from finetune_api.spec import QuantizationSpec
from peft import PeftModel
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8Tensor,
    IntxUnpackedToInt8TensorActivationQuantization,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig
from transformers.quantizers import AutoHfQuantizer

from finetune_trainer.qat.linear import ExactLinear, merged_weight
from finetune_trainer.qat.prepare import exact_layers, merged_layers, plain_name
from finetune_trainer.qat.schemes import torchao_config


def exported_tensor(layer: ExactLinear) -> IntxUnpackedToInt8Tensor:
    """The layer's shipped weight [out, in]: torchao's class around the codes of the merged weight."""
    quantizer = layer.exact.quantizer
    weight = merged_weight(layer)
    codes, scale = quantizer.quantize(weight, layer.exact.shrink)
    # The plain string, as torchao's own conversion has it: safetensors metadata with the enum's member can't be read back.
    int8 = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN.value
    return IntxUnpackedToInt8Tensor(
        qdata=codes,
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype={4: torch.int4, 8: torch.int8}[quantizer.bits],
        block_size=(1, quantizer.block(weight.shape[1])),
        dtype=weight.dtype,
        activation_quantization=int8 if layer.exact.int8_activations else None,
    )


def plain_model(model: PeftModel, quantization: QuantizationSpec, skipped: dict[str, str], *, trust_remote_code: bool) -> PreTrainedModel:
    """A model without adapters whose exact layers hold torchao tensors; everything else is shared with `model`, not copied.

    Args:
        model: the prepared model with its final adapter; it is left as it is.
        quantization: the scheme.
        skipped: linear layers that stay unquantized.
        trust_remote_code: whether the model's own code may run.
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
        path, _, attribute = name.rpartition(".")
        setattr(plain.get_submodule(path), attribute, buffer)
    for name, layer in merged_layers(model):
        _assign(plain, f"{name}.weight", merged_weight(layer))
    for name, layer in exact_layers(model):
        _assign(plain, f"{name}.weight", exported_tensor(layer))
    plain.tie_weights()
    plain.generation_config = base.generation_config
    _mark_quantized(plain, quantization, skipped)
    return plain.eval()


def weight_digests(model: nn.Module) -> dict[str, str]:
    """sha256 of every parameter's values, dequantized; equal digests are equal bits."""
    return {name: tensor_digest(_dense(parameter.detach())) for name, parameter in model.named_parameters(remove_duplicate=False)}


def trained_digests(model: PeftModel) -> dict[str, str]:
    """sha256 of the weights that training's forward pass uses, under the names of the exported model."""
    base = model.get_base_model()
    digests = {
        plain_name(name.replace(".base_layer", "")): tensor_digest(parameter.detach())
        for name, parameter in base.named_parameters(remove_duplicate=False)
        if ".lora_" not in name
    }
    for name, layer in exact_layers(model):
        quantizer = layer.exact.quantizer
        digests[f"{name}.weight"] = tensor_digest(quantizer.dequantize(quantizer.quantize(merged_weight(layer), layer.exact.shrink)))
    digests |= {f"{name}.weight": tensor_digest(merged_weight(layer)) for name, layer in merged_layers(model)}
    return digests


def tensor_digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    plain = tensor.detach().cpu().contiguous()
    head = f"{plain.dtype}{tuple(plain.shape)}".encode()
    return hashlib.sha256(head + plain.view(torch.uint8).numpy().tobytes()).hexdigest()


def _dense(parameter: Tensor) -> Tensor:
    return parameter.dequantize() if isinstance(parameter, IntxUnpackedToInt8Tensor) else parameter


def _is_head_tied(name: str, base: PreTrainedModel) -> bool:
    head = base.get_output_embeddings()
    return bool(base.config.tie_word_embeddings) and head is not None and name.endswith("lm_head.weight")


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))


def _mark_quantized(model: PreTrainedModel, quantization: QuantizationSpec, skipped: dict[str, str]) -> None:
    """What save_pretrained needs to write torchao tensors as safetensors, and config.json to read them back."""
    # A list replaces transformers' own default, which skips the output head: name it again.
    config: Any = TorchAoConfig(torchao_config(quantization), modules_to_not_convert=sorted(skipped) or ["lm_head"])
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    model.is_quantized = True

"""Tiny models with a LoRA adapter whose factors are not zero, prepared for exact quantization-aware training. Used by tests/trainer/qat."""

from typing import Any

import torch
from finetune_api.spec import LoraSpec, QuantizationSpec, Scheme
from finetune_trainer.adapter import add_adapter
from finetune_trainer.qat.linear import ExactLinear
from finetune_trainer.qat.prepare import exact_layers, prepare
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from support.tiny_model import tiny_llama
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

SCHEMES = tuple(scheme for scheme in Scheme if scheme is not Scheme.NONE)
KERNELS = (Scheme.INT8, Scheme.INT8_INT4)  # what torchao computes by dequantizing, anywhere
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # groups of 128 fit
DTYPES = (torch.float32, torch.bfloat16)


def quantization(scheme: Scheme = Scheme.INT8_INT4, **changes: Any) -> QuantizationSpec:
    """The scheme with its defaults, or with changes of them."""
    return QuantizationSpec(scheme=scheme, **changes)


def lora_model(
    *, dtype: torch.dtype = torch.float32, targets: str = "all-linear", rank: int = 4, seed: int = 0, **changes: Any
) -> PeftModel:
    """A tiny Llama with an adapter as the trainer adds it, but with a random B: a trained adapter. `changes` go to LlamaConfig."""
    base = tiny_llama(seed=seed, **changes)
    for parameter in base.parameters():  # as from_pretrained: buffers such as the rotary frequencies stay float32
        parameter.data = parameter.data.to(dtype)
    return _with_adapter(base, targets, rank, seed)


def lora_opt(*, seed: int = 0, **changes: Any) -> PeftModel:
    """Likewise a tiny OPT, which keeps its dropout as numbers; `changes` go to OPTConfig."""
    settings: dict[str, Any] = {"vocab_size": 260, "hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "max_position_embeddings": 128, "dropout": 0.0, "pad_token_id": 2, "eos_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = OPTForCausalLM(OPTConfig(**(settings | changes)))
    return _with_adapter(base, "all-linear", 4, seed)


def tiny_mixture(**changes: Any) -> PreTrainedModel:
    """A tiny Qwen3 mixture of experts: attention of linear layers, and experts in tensors of their own; `changes` go to Qwen3MoeConfig."""
    settings: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    settings |= {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "pad_token_id": 2,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(settings | changes)))


def _with_adapter(base: PreTrainedModel, targets: str, rank: int, seed: int) -> PeftModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        model = add_adapter(base, LoraSpec(rank=rank, target_modules=targets))
        set_factors(model, seed + 2)
    return model


def exact_model(scheme: Scheme = Scheme.INT8_INT4, **changes: Any) -> PeftModel:
    """`lora_model` after `prepare`, with fake quantization on; wide enough for the scheme's groups."""
    model = lora_model(**((WIDE if scheme is Scheme.FP8_INT4 else {}) | changes))
    prepare(model, quantization(scheme))
    return model


@torch.no_grad()
def set_factors(model: PeftModel, seed: int) -> None:
    """Another random A and B in every layer, in place, large enough to move codes on any grid."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for factor in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.1)


def exact_layer(model: PeftModel, ending: str) -> ExactLinear:
    """The first exact layer whose name ends so."""
    return next(layer for name, layer in exact_layers(model) if name.endswith(ending))


def token_ids(rows: int = 2, tokens: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids [rows, tokens] of the tiny vocabulary."""
    return torch.randint(3, 260, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def logits_of(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits without a gradient, in whatever mode the model is."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits

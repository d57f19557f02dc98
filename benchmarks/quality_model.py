"""SmolLM2-135M off its Q4_1 grid, the same function: its residual stream is rotated, its norms are folded in, its head is untied.

The builtin model was dequantized from 4 bits, so that any 4-bit quantizer with its groups would find that grid again and look too good.
Q = expm(0.3 (S - S^T) / sqrt 2), S normal with variance 1/d: small angles leave the outliers where they are. The copy is made once and cached.
Source of the invariance: SliceGPT (arXiv 2401.15024): RMSNorm without a weight commutes with an orthogonal matrix.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from finetune_trainer.sources import builtin
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

_ANGLE = 0.3
_FACTS = "rotation.json"


def rotated_model(cache: Path) -> Path:
    """The folder of the rotated copy; made in the cache when there is none, with what the rotation changed in rotation.json."""
    target = cache / "quality" / "smollm2-135m-rotated"
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        _make(builtin.fetch_model(cache, print), partial)
        partial.rename(target)
    return target


def rotation_facts(folder: Path) -> dict[str, float]:
    """{loss before, loss after, largest difference of a log-probability} on a fixed text, float64."""
    return dict(json.loads((folder / _FACTS).read_text(encoding="utf-8")))


@torch.no_grad()
def rotate(model: LlamaForCausalLM) -> None:
    """Rotates a Llama in place; the function stays as it is up to rounding. Norms end as ones, the head apart from the embeddings."""
    size = model.config.hidden_size
    normal = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / math.sqrt(size)
    turn = torch.linalg.matrix_exp(_ANGLE * (normal - normal.T) / math.sqrt(2)).to(model.lm_head.weight.dtype)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(_read(model.lm_head.weight, model.model.norm.weight, turn), requires_grad=False)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ turn)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            linear.weight.copy_(_read(linear.weight, layer.input_layernorm.weight, turn))
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(_read(linear.weight, layer.post_attention_layernorm.weight, turn))
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(turn.T @ linear.weight)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1)


def _read(weight: Tensor, norm: Tensor, turn: Tensor) -> Tensor:
    """A weight [out, hidden] that reads the stream behind a norm."""
    return (weight * norm) @ turn


def _make(source: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(source)
    text = tokenizer((__doc__ or "") * 2, return_tensors="pt")["input_ids"]
    before = _log_probabilities(model, text)
    rotate(model)
    after = _log_probabilities(model, text)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "lossBefore": -float(before.mean()),
        "lossAfter": -float(after.mean()),
        "largestDifference": float((before - after).abs().max()),
    }
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


@torch.no_grad()
def _log_probabilities(model: LlamaForCausalLM, text: Tensor) -> Tensor:
    logits = model(input_ids=text, use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, text[0, 1:, None])[:, 0]

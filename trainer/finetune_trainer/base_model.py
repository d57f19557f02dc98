"""The base model from its folder: with its weights, from safetensors alone, or as layers and shapes without a weight.

Runs no code from the model's repository unless it may. CUDA is used where there is one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, __version__
from transformers.utils import ModelOutput

from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.failures import first_line, is_out_of_memory


def load_base(folder: Path, dtype: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The base model on its device, every weight from a safetensors file.

    Raises:
        DataError: no such architecture, a damaged file, or weights that are missing or of another shape.
        SpecError: it needs code of its own and the spec does not allow that.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = training_dtype(dtype, on_gpu=device == "cuda")
    return _from_safetensors(folder, dtype=wanted, trust_remote_code=trust_remote_code).to(device)


def empty_base(folder: Path, *, trust_remote_code: bool) -> PreTrainedModel:
    """The base model from config.json alone, on the meta device: its layers and their shapes, without a weight.

    Raises:
        DataError: no such architecture, a configuration that makes no model, or one that can't be trained.
    """
    config = _config(folder, trust_remote_code=trust_remote_code)
    with refusing(folder), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    _require_body(model, folder)
    return model


def check_weights(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuses the weights that `load_base` refuses, by the names and shapes in the files' headers; no weight is read.

    Raises:
        DataError: a damaged file, or weights that are missing or of another shape.
    """
    _from_safetensors(folder, dtype=torch.float32, trust_remote_code=trust_remote_code, device_map="meta")


def note_untied(model: PreTrainedModel) -> None:
    """Where the files have an output head that is not the embedding, though config.json ties them, transformers loads both; the exported config.json must say so."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False


def cast_last_hidden_state(model: PreTrainedModel) -> None:
    """The last hidden state comes in the output head's dtype, for a loss that takes it from in front of the head: Mamba's is float32, and its own forward pass casts it."""
    dtype = model.get_output_embeddings().weight.dtype

    def cast(_: nn.Module, __: object, output: Any) -> None:
        if isinstance(output, ModelOutput):
            output.last_hidden_state = output.last_hidden_state.to(dtype)

    model.base_model.register_forward_hook(cast)


def _config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    with refusing(folder, f"choose a model whose architecture transformers {__version__} knows, or download this one again"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    own_code = AutoModelForCausalLM.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (own_code and trust_remote_code):
        return config
    if own_code:
        raise SpecError(
            f"The model in {folder} is a causal language model by Python code of its own (auto_map in config.json); "
            "set spec.model.trustRemoteCode to true if you trust it."
        )
    raise DataError(f"The model in {folder} is of the type {config.model_type}, which is no causal language model; choose one that is.")


def _from_safetensors(folder: Path, *, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    config = _config(folder, trust_remote_code=trust_remote_code)
    with refusing(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # for a sentence of our own
            **options,
        )
    if lacking := sorted(info["missing_keys"]):
        raise DataError(f"The model in {folder} lacks {len(lacking)} weights, the first is {lacking[0]}; download it again.")
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise DataError(
            f"The model's weight {name} in {folder} has the shape {_shape(found)}, but config.json makes it {_shape(wanted)}; "
            "download both again from one place."
        )
    _require_body(model, folder)
    return model


def _require_body(model: PreTrainedModel, folder: Path) -> None:
    """Training computes the loss from hidden states, which the model without its output head gives; Llama 4's class names that part wrongly."""
    if model.base_model is model:
        raise DataError(
            f"The model in {folder} can't be trained: transformers {__version__} does not say which part of {type(model).__name__} lies in front of its output head "
            f"(it has no {model.base_model_prefix!r}); choose another model."
        )


def _shape(size: Sequence[int]) -> str:
    return " x ".join(map(str, size))


@contextmanager
def refusing(folder: Path, mend: str = "download it again") -> Iterator[None]:
    """Turns what a loader raises into one sentence about the model's folder.

    Raises:
        DataError: whatever it was, but for memory that ran out.
    """
    try:
        yield
    except ImportError as error:  # such as Gemma 3n, whose other senses need timm and Pillow
        raise DataError(
            f"The model in {folder} needs a Python package that is not installed here ({first_line(error)}); add it to the trainer's image, or choose another model."
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise DataError(f"The model in {folder} does not load ({first_line(error)}); {mend}.") from error


def training_dtype(dtype: str, *, on_gpu: bool) -> torch.dtype:
    """The dtype of the weights: what `model.dtype` says, or bfloat16 on a GPU and float32 on a CPU."""
    return {"auto": torch.bfloat16 if on_gpu else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def recomputes_activations(model: nn.Module, *, on_gpu: bool) -> bool:
    """Whether layers are computed again in the backward pass instead of kept: on a GPU, unless the model's class has no way to (CTRL, the first GPT)."""
    return on_gpu and bool(model.supports_gradient_checkpointing)

"""The unsloth backend: FastLanguageModel loads the weights, and puts the adapter on where nothing is quantized.

A job with a scheme gets peft's own adapter, as native puts it on, and exact quantization-aware training replaces its layers: unsloth's fused
LoRA kernels would go past them, and unsloth's own qat_scheme fake-quantizes base weight and adapter apart, which is another function than the
exported one (on a CPU it does nothing, and does not say so). Whether the exact layers are called is measured on every job (require_effect).

Its CPU path runs in an environment of its own (`make test-unsloth`). Its CUDA kernels have not yet run on a GPU.
"""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from unsloth import FastLanguageModel  # before transformers, peft and trl, which it patches

# isort: split
import torch
from finetune_api.spec import LoraSpec, Scheme
from peft import PeftModel
from transformers import PreTrainedModel

from finetune_trainer import adapter, base_model
from finetune_trainer.backends import Name
from finetune_trainer.base_model import training_dtype

NAME: Name = "unsloth"


def load_base(folder: Path, dtype: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The base model on its device, in 16 or 32 bits, every weight from a safetensors file.

    Raises:
        DataError: no such architecture, a damaged file, or weights that are missing.
    """
    base_model.check_weights(folder, trust_remote_code=trust_remote_code)  # FastLanguageModel says nothing about weights that are missing
    with base_model.refusing(folder), redirect_stdout(StringIO()):
        model, _ = FastLanguageModel.from_pretrained(
            str(folder),
            dtype=training_dtype(dtype, on_gpu=torch.cuda.is_available()),
            max_seq_length=None,  # the model's own; any other would stretch its positions, and with them change the function
            load_in_4bit=False,
            use_gradient_checkpointing=False,
            use_exact_model_name=True,
            use_safetensors=True,
            local_files_only=True,  # and no download of a counter from the Hub
            trust_remote_code=trust_remote_code,
        )
    return model


def add_adapter(base: PreTrainedModel, lora: LoraSpec, scheme: Scheme) -> PeftModel:
    """FastLanguageModel's adapter for scheme none, else peft's own, and for GPT-2's transposed layers, which FastLanguageModel does not know.

    Raises:
        SpecError: a target module that the model does not have, its output head, or one that peft has no adapter for.
    """
    config = adapter.lora_config(base, lora)
    if scheme is not Scheme.NONE or config.fan_in_fan_out:
        return adapter.add_adapter(base, lora)
    with redirect_stdout(StringIO()):
        return FastLanguageModel.get_peft_model(
            base,
            r=config.r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules),
            use_gradient_checkpointing="unsloth" if torch.cuda.is_available() else False,
            random_state=torch.initial_seed(),  # it seeds again; the run's own seed
        )

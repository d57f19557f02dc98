"""The native backend: transformers and peft as they are, on a CPU and on a GPU."""

from finetune_api.spec import LoraSpec, Scheme
from peft import PeftModel
from transformers import PreTrainedModel

from finetune_trainer import adapter
from finetune_trainer.backends import Name
from finetune_trainer.base_model import load_base as load_base

NAME: Name = "native"


def add_adapter(base: PreTrainedModel, lora: LoraSpec, scheme: Scheme) -> PeftModel:  # noqa: ARG001 the same for every scheme
    """peft's own adapter.

    Raises:
        SpecError: a target module that the model does not have, its output head, or one that peft has no adapter for.
    """
    return adapter.add_adapter(base, lora)

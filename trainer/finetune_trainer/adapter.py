"""The LoRA adapter: put on a base model by the backends, saved as plain peft loads it by pipeline.py."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from finetune_api.job import JobDescription
from finetune_api.spec import LoraSpec
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba  # no public name says which layers it refuses
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from finetune_trainer import atomic
from finetune_trainer.destinations.model_card import base_model, hub_revision
from finetune_trainer.errors import SpecError
from finetune_trainer.failures import first_line
from finetune_trainer.language_model import bypassed_linears, foreign_linears


def add_adapter(base: PreTrainedModel, lora: LoraSpec) -> PeftModel:
    """The base model with a LoRA adapter: A random, B zero, no dropout.

    Raises:
        SpecError: a target module that the model does not have, its output head, or one that peft has no adapter for.
    """
    config = lora_config(base, lora)
    try:
        return get_peft_model(base, config)
    except ValueError as error:  # such as a Mamba block's projection, named in the spec
        raise SpecError(
            f"spec.lora.targetModules {lora.target_modules!r} does not suit this model ({first_line(error)}); name the layers that do, such as q_proj,v_proj."
        ) from error


def lora_config(base: PreTrainedModel, lora: LoraSpec) -> LoraConfig:
    """What the spec asks for, in peft's words: no dropout, which no exported model has, and in a multimodal model only the language model.

    "all-linear" leaves out what no adapter fits: the spec names none of them.

    Raises:
        SpecError: a target module that the model does not have, or its output head.
    """
    targets: Any = lora.target_modules
    left_out = foreign_linears(base)
    if targets == "all-linear":
        left_out = sorted({*left_out, *_unsuited(base)})
    else:
        targets = targets.split(",")
        _require_targets(base, targets)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        target_modules=targets,
        exclude_modules=left_out or None,
        task_type="CAUSAL_LM",
    )


def summary(model: PeftModel) -> str:
    """For the user: how much is trained, and which linear layers "all-linear" has left out."""
    config, (trained, every) = model.peft_config["default"], model.get_nb_trainable_parameters()
    layers = sum(isinstance(module, LoraLayer) for module in model.modules())
    kinds = Counter(name.rpartition(".")[2] for name in config.exclude_modules or ())
    left_out = ", ".join(f"{name} ({count})" for name, count in sorted(kinds.items()))
    adapters = f"LoRA of rank {config.r} trains {trained:,} parameters ({trained / every:.1%}) in {layers} layers"
    return f"{adapters}; without an adapter: {left_out}." if left_out else f"{adapters}."


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, job: JobDescription, resolved: str, target: Path) -> None:
    """Writes adapter and tokenizer; the folder appears whole or not at all.

    Args:
        resolved: the base model's source with the commit that was used, which whoever loads the adapter shall get too.

    Raises:
        OSError: no space, or not writable.
    """
    config = model.peft_config["default"]
    here = config.base_model_name_or_path, config.revision
    config.base_model_name_or_path, config.revision = published_base(job), hub_revision(resolved) or None
    try:
        with atomic.folder(target) as folder:
            # Embeddings are never trained. Left to find out by itself, peft would ask the Hub for the base model's size.
            model.save_pretrained(folder, save_embedding_layers=False)
            tokenizer.save_pretrained(folder)
    finally:
        config.base_model_name_or_path, config.revision = here


def published_base(job: JobDescription) -> str:
    """The base model's name for whoever loads the adapter elsewhere: on the Hub, or else the source as written, never a path of a cache."""
    return base_model(job) or job.spec.model.source.removeprefix("file://")


def _unsuited(base: PreTrainedModel) -> list[str]:
    """Names of linear layers that no adapter fits.

    Those that peft refuses, those whose weight the model reads past them, and those that give something else than a linear map, such as Llama 4's router a pair.
    """
    bypassed = set(bypassed_linears(base))
    linears = ((name, module) for name, module in base.named_modules() if isinstance(module, torch.nn.Linear))
    return [name for name, module in linears if name in bypassed or not (_is_taken(base, name) and _is_linear_map(module))]


def _is_taken(base: PreTrainedModel, name: str) -> bool:
    """Whether peft has an adapter for it: not for a Mamba block's projection, whose weight a kernel reads past any adapter."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), base, name.rpartition(".")[2])
    except ValueError:
        return False
    return True


@torch.no_grad()
def _is_linear_map(module: torch.nn.Linear) -> bool:
    if type(module).forward is torch.nn.Linear.forward:
        return True
    try:
        output = module(torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def _require_targets(base: PreTrainedModel, targets: list[str]) -> None:
    head = base.get_output_embeddings()
    known = {name: module for name, module in base.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    bypassed = set(bypassed_linears(base))
    for target in targets:
        found = {name: module for name, module in known.items() if name == target or name.endswith(f".{target}")}
        if any(module is head for module in found.values()):  # trl computes the loss from the head's own weight
            raise SpecError(
                f"spec.lora.targetModules names {target!r}, which is this model's output head, where an adapter would not be trained; leave it out."
            )
        if not bypassed.isdisjoint(found):
            raise SpecError(
                f"spec.lora.targetModules names {target!r}, whose weight this model's code reads by itself, so that an adapter there would change nothing; leave it out."
            )
        if not found:
            linears = sorted({name.rpartition(".")[2] for name, module in known.items() if module is not head})
            raise SpecError(
                f"spec.lora.targetModules names {target!r}, which this model does not have; choose from its linear layers: {', '.join(linears)}."
            )

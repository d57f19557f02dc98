"""Load: the base model and its tokenizer, from safetensors only, and the LoRA adapter on top.

Runs no code from the model's repository unless the spec asks for it. CUDA is used where there is one (not yet run on a GPU).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetune_api.spec import LoraSpec
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from finetune_trainer import sources
from finetune_trainer.context import RunContext
from finetune_trainer.errors import DataError, SpecError


@dataclass(frozen=True)
class Loaded:
    """The model with a fresh adapter, and what it is made of.

    Attributes:
        resolved: the source with its commit or version.
        bytes: size of the base weights as loaded.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    resolved: str


def run(ctx: RunContext) -> Loaded:
    """Fetches and loads.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError: one sentence each.
    """
    fetched = sources.fetch_model(ctx)
    set_seed(ctx.spec.training.seed)
    tokenizer = load_tokenizer(fetched.path, trust_remote_code=ctx.spec.model.trust_remote_code)
    base = load_base(fetched.path, ctx.spec.model.dtype, trust_remote_code=ctx.spec.model.trust_remote_code)
    return Loaded(add_adapter(base, ctx.spec.lora), tokenizer, fetched.resolved)


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the right with a token that is never trained.

    Raises:
        DataError: it does not load.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise DataError(
            f"The tokenizer in {folder} does not load ({_first_line(error)}); the folder needs the files that save_pretrained writes."
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(folder: Path, dtype: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """The base model on its device, every weight from a safetensors file.

    Raises:
        DataError: no such architecture, a damaged file, or weights that are missing.
        SpecError: it needs code of its own and the spec does not allow that.
    """
    _require_own_code_allowed(folder, trust_remote_code=trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = {"auto": torch.bfloat16 if device == "cuda" else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=wanted, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(
            f"The model in {folder} does not load ({_first_line(error)}); it needs config.json and safetensors of a causal language model."
        ) from error
    if info["missing_keys"]:
        raise DataError(
            f"The model in {folder} lacks {len(info['missing_keys'])} weights, the first is {sorted(info['missing_keys'])[0]}; download it again."
        )
    return model.to(device)


def add_adapter(base: PreTrainedModel, lora: LoraSpec) -> PeftModel:
    """The base model with a LoRA adapter: A random, B zero, no dropout.

    Raises:
        SpecError: a target module that the model does not have.
    """
    targets: Any = lora.target_modules
    if targets != "all-linear":
        targets = targets.split(",")
        _require_targets(base, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=0.0,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def _require_targets(base: PreTrainedModel, targets: list[str]) -> None:
    linears = sorted({name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)})
    known = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in known):
            raise SpecError(
                f"spec.lora.targetModules names {target!r}, which this model does not have; its linear layers are {', '.join(linears)}."
            )


def _require_own_code_allowed(folder: Path, *, trust_remote_code: bool) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("auto_map") and not trust_remote_code:
        raise SpecError(
            f"The model in {folder} brings Python code of its own (auto_map in config.json); set spec.model.trustRemoteCode to true if you trust it."
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

"""Load: the base model and its tokenizer, from safetensors only, and the LoRA adapter on top, through the run's backend.

What is refused here is wrong with the model or the machine. base_model.py has what loads it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from finetune_trainer import adapter, base_model
from finetune_trainer.backends import Backend
from finetune_trainer.context import RunContext
from finetune_trainer.errors import CapacityError, DataError, SpecError
from finetune_trainer.failures import first_line, is_out_of_memory
from finetune_trainer.sources import Fetched


@dataclass(frozen=True)
class Loaded:
    """The model with a fresh adapter, and what it is made of.

    Attributes:
        resolved: the source with its commit or version.
        identity: changes with the base model's files and with nothing else.
        license: what the base model's card states.
        backend: what it was loaded through.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    resolved: str
    identity: str
    license: dict[str, Any]
    backend: Backend


def require_gpu(ctx: RunContext) -> None:
    """Refuses, before anything is loaded, a pod that asked for a GPU and sees none: on its CPU it would train for weeks; and anywhere a GPU that PyTorch has no code for.

    A laptop without a GPU takes what it has. The look at the GPU's generation has not yet run on a GPU.

    Raises:
        CapacityError: the driver is too old for PyTorch's CUDA, the device plugin gave no GPU, or it is one that PyTorch is not built for.
    """
    if torch.cuda.is_available():
        _require_code_for_gpu(ctx)
        return
    wanted = ctx.spec.resources.gpus
    if not ctx.job.in_cluster or wanted == 0:
        return
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
    raise CapacityError(
        f"spec.resources.gpus is {wanted}, but PyTorch, which is built for {built}, finds no GPU in this pod; "
        "give the node a newer NVIDIA driver and check its device plugin, or set resources.gpus to 0."
    )


def _require_code_for_gpu(ctx: RunContext) -> None:
    built = [architecture for architecture in torch.cuda.get_arch_list() if architecture.startswith(("sm_", "compute_"))]
    if not built:  # a PyTorch for another maker's GPUs
        return
    capability = torch.cuda.get_device_capability()
    if any(_runs(architecture, capability) for architecture in built):
        return
    mend = (
        "choose a node that has such a GPU (scheduling.nodeSelector)"
        if ctx.job.in_cluster
        else "take such a GPU, or train on the CPU with CUDA_VISIBLE_DEVICES set to nothing"
    )
    raise CapacityError(
        f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}, but PyTorch is built for "
        f"{', '.join(built)} (CUDA {torch.version.cuda}); {mend}."
    )


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, such as sm_90a, runs on a GPU: of its generation where it is compiled, of any later one where it is to be translated."""
    kind, _, number = architecture.partition("_")
    least = divmod(int(number.rstrip("af")), 10)
    return least <= capability and (kind == "compute" or least[0] == capability[0])


def tokenizer_of(ctx: RunContext, folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer alone, so that the data can be looked at before the weights are loaded.

    Raises:
        DataError, SpecError: one sentence each.
    """
    allowed = ctx.spec.model.trust_remote_code
    config = _config_of(folder)
    _require_own_code_allowed(ctx, folder, config)
    _require_original_weights(folder, config)
    return load_tokenizer(folder, trust_remote_code=allowed)


def run(ctx: RunContext, fetched: Fetched, tokenizer: PreTrainedTokenizerBase, backend: Backend) -> Loaded:
    """Loads the weights and adds the adapter.

    Args:
        fetched: the model that the tokenizer is of; fetched anew, a branch might have moved between the two.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError: one sentence each.
    """
    identity = fetched.identify()
    set_seed(ctx.spec.training.seed)
    base = backend.load_base(fetched.path, ctx.spec.model.dtype, trust_remote_code=ctx.spec.model.trust_remote_code)
    base_model.note_untied(base)
    base_model.cast_last_hidden_state(base)
    _require_finite(base)
    size, dtype = base.num_parameters() / 1e6, str(base.dtype).removeprefix("torch.")
    ctx.reporter.note(f"Loaded {size:,.0f} million parameters as {dtype} on the {base.device.type.upper()}.")
    adapted = backend.add_adapter(base, ctx.spec.lora, ctx.spec.quantization.scheme)
    ctx.reporter.note(adapter.summary(adapted))
    return Loaded(adapted, tokenizer, fetched.resolved, identity, fetched.license, backend)


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer as it is published with the model: what training needs of it (train.py pads by itself) is not written into it.

    Raises:
        DataError: it does not load.
        SpecError: it needs code of its own and the spec does not allow that.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise SpecError(
                f"The tokenizer in {folder} needs Python code of its own (auto_map in tokenizer_config.json); "
                "set spec.model.trustRemoteCode to true if you trust it."
            ) from error
        raise DataError(
            f"The tokenizer in {folder} does not load ({first_line(error)}); download it again, with every file that its save_pretrained writes."
        ) from error


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder / 'config.json'} is not a JSON object ({first_line(error)}); download the model again.") from error


def _require_own_code_allowed(ctx: RunContext, folder: Path, config: dict[str, Any]) -> None:
    if not config.get("auto_map") or ctx.spec.model.trust_remote_code:
        return
    kind = config.get("model_type")
    if kind in CONFIG_MAPPING:  # many a model is older than its place in transformers
        ctx.reporter.note(f"The model brings Python code of its own, which is not run: transformers' own {kind} is.")
    else:
        raise SpecError(
            f"The model in {folder} brings Python code of its own (auto_map in config.json); set spec.model.trustRemoteCode to true if you trust it."
        )


def _require_original_weights(folder: Path, config: dict[str, Any]) -> None:
    """What is quantized already is neither merged with an adapter nor quantized a second time."""
    quantization = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if quantization:
        raise DataError(
            f"The model in {folder} is quantized already ({quantization.get('quant_method', 'quantization_config in config.json')}); "
            "set spec.model.source to the model that it was made from, with its original weights."
        )


def _require_finite(model: PreTrainedModel) -> None:
    for name, weight in model.named_parameters():
        # Least and largest, which NaN passes through: a mask of an embedding would be a quarter of it in memory.
        if weight.numel() and not torch.stack([weight.amin(), weight.amax()]).isfinite().all():
            raise DataError(
                f"The model's weight {name} has values that are not finite (NaN or infinite), with which nothing can be trained; "
                "download the model again, or choose another one."
            )

"""Convert: writes model-torchao/ from the final adapter, and the proof's reference from the model in training mode.

The training's model gives up its weights layer by layer, so that memory holds the weights about once. Whatever is written appears at once and whole, or not at all.
"""

import gc
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from finetune_api import names
from peft import PeftModel
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from finetune_trainer import atomic, heap
from finetune_trainer.canonical import sort_metadata
from finetune_trainer.context import RunContext
from finetune_trainer.qat.export import free_weight, plain_model, trained_digests
from finetune_trainer.qat.prepare import drop_caches, exact_layers, free_codes, mode_of
from finetune_trainer.qat.trial import training_logits
from finetune_trainer.sources.model_files import companions
from finetune_trainer.stages.train import Trained

_ROWS, _TOKENS = 2, 32


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        bytes_before: size of the base weights, in the dtype they were trained in.
        bytes_after: size of the exported folder's weight files.
    """

    bytes_before: int
    bytes_after: int


def run(ctx: RunContext, trained: Trained, base_folder: Path) -> Converted:
    """Exports the model and records what it must compute.

    Args:
        base_folder: the base model's, whose licence and processor go along.

    Raises:
        OSError: no space, or not writable.
    """
    prepared, mode = trained.prepared, mode_of(trained.model)
    if prepared is None or mode is None:
        raise ValueError("convert needs a quantization scheme; the pipeline skips it for none")
    mode.keep_codes = False
    free_codes(trained.model)
    gc.collect()  # the trainer and its optimizer hang in reference cycles
    heap.return_holes()
    write_reference(ctx, trained)
    base = trained.model.get_base_model()
    before = sum(item.numel() * item.element_size() for name, item in base.named_parameters() if ".lora_" not in name)
    with atomic.folder(ctx.quantized) as folder:
        plain = plain_model(
            trained.model, ctx.spec.quantization.scheme, prepared.skipped, trust_remote_code=ctx.spec.model.trust_remote_code, consume=True
        )
        # transformers refuses to save a generation configuration that contradicts itself, as many a published one does.
        generation, plain.generation_config = plain.generation_config, GenerationConfig()
        plain.save_pretrained(folder)
        generation.to_json_file(folder / GENERATION_CONFIG_NAME)
        trained.tokenizer.save_pretrained(folder)
        for path in companions(base_folder):
            shutil.copyfile(path, folder / path.name)
        for path in folder.glob("*.safetensors"):
            sort_metadata(path)
    return Converted(before, sum(path.stat().st_size for path in ctx.quantized.glob("*.safetensors")))


def write_reference(ctx: RunContext, trained: Trained) -> None:
    """Records token ids and logits of the prepared model in training mode, and a digest of every weight it uses."""
    input_ids, attention_mask = reference_batch(trained.model.get_input_embeddings().num_embeddings)
    device = trained.model.device
    logits = training_logits(trained.model, input_ids.to(device), attention_mask.to(device)).cpu()
    expected = {
        "weights": trained_digests(trained.model),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "attention": _attention(trained.model.config),
        "dtype": str(trained.model.dtype).removeprefix("torch."),
        "trust_remote_code": ctx.spec.model.trust_remote_code,
    }
    with atomic.folder(ctx.proof) as folder:
        save_file({"input_ids": input_ids, "attention_mask": attention_mask, "logits": logits}, folder / names.PROOF_REFERENCE)
        (folder / names.PROOF_EXPECTED).write_text(json.dumps(expected, indent=1))


def _attention(config: PreTrainedConfig) -> str | dict[str, str]:
    """As from_pretrained takes it; each part of a multimodal model may have another, as GOT-OCR 2's."""
    parts = {part: found._attn_implementation for part in config.sub_configs if (found := getattr(config, part, None)) is not None}
    return {"": config._attn_implementation, **parts} if parts else config._attn_implementation


def make_room(model: PeftModel) -> None:
    """Before the fresh process of verify: it has the GPU's memory to itself, and the host's beside what export left as it was.

    Export has freed the quantized layers' trained weights, unless an attempt before this one exported.
    """
    drop_caches(model)
    for _, layer in exact_layers(model):
        free_weight(layer)
    if model.device.type != "cuda":
        return
    model.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()


def reference_batch(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [2, 32], the same for every run of a model; the second row ends in padding."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, vocabulary, (_ROWS, _TOKENS), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, _TOKENS * 3 // 4 :] = 0
    return input_ids, attention_mask

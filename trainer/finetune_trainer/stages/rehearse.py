"""Rehearse: everything up to the first step, with the layers and shapes of the model instead of its weights. Needs no GPU and little memory.

Called by pipeline.preflight after stages/preflight.py. It calls what load, data and train call, so that they refuse little later that has
passed here: what only weights can show (train's trials on a few tokens), and what only a GPU can, which is said to be unchecked.
"""

from dataclasses import dataclass

import torch
from finetune_api.spec import Scheme
from peft import PeftModel
from transformers import PreTrainedConfig

from finetune_trainer import backends, base_model, sources
from finetune_trainer.adapter import add_adapter
from finetune_trainer.context import RunContext
from finetune_trainer.memory import fit
from finetune_trainer.memory.estimate import Estimate, Lengths
from finetune_trainer.memory.gpus import GPU_BYTES
from finetune_trainer.plan import Plan, plan
from finetune_trainer.qat.prepare import prepare
from finetune_trainer.stages import data, load
from finetune_trainer.stages.data import Data
from finetune_trainer.stages.evaluate import NOTHING_HELD_OUT


@dataclass(frozen=True)
class Rehearsed:
    """What the run would be.

    Attributes:
        model: the model's source with its commit or version.
        parameters: of the base model.
        adapted: of the LoRA adapter, which alone are trained.
        needed: memory for the plan's micro-batch; None for a model that can't be traced.
    """

    model: str
    parameters: int
    adapted: int
    data: Data
    plan: Plan
    needed: Estimate | None


def run(ctx: RunContext) -> Rehearsed:
    """Checks the spec against model and data; ends with the model in its cache where that outlives the pod.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError: one sentence each.
    """
    backends.chosen(ctx)
    _note_unchecked(ctx)
    described = sources.fetch_model(ctx, weights=False)
    tokenizer = load.tokenizer_of(ctx, described.path)
    base = base_model.empty_base(described.path, trust_remote_code=ctx.spec.model.trust_remote_code)
    parameters = base.num_parameters()
    with torch.device("meta"):
        model = add_adapter(base, ctx.spec.lora)
    adapted = model.num_parameters(only_trainable=True)
    _prepare(ctx, model)
    rows = data.make(ctx, tokenizer)
    data.require_known_tokens(rows, model)
    if not rows.held_out:
        ctx.reporter.note(NOTHING_HELD_OUT)
    # Before the weights: what fits nowhere need not be downloaded, and may not even be mapped.
    steps, needed = _require_fit(ctx, base.config, rows)
    if sources.keeps_weights(ctx):
        base_model.check_weights(sources.fetch_model(ctx).path, trust_remote_code=ctx.spec.model.trust_remote_code)
    return Rehearsed(described.resolved, parameters, adapted, rows, steps, needed)


def _prepare(ctx: RunContext, model: PeftModel) -> None:
    if ctx.spec.quantization.scheme is not Scheme.NONE:
        ctx.reporter.note(prepare(model, ctx.spec.quantization).sentence)


def _require_fit(ctx: RunContext, config: PreTrainedConfig, rows: Data) -> tuple[Plan, Estimate | None]:
    """Holds the estimate against the pod that the job asks for, or on a laptop against this machine."""
    place = fit.promised_pod(ctx.spec) if ctx.job.in_cluster else fit.this_machine()
    lengths = Lengths.of(rows.train, rows.held_out)
    steps = plan(ctx.spec, len(rows.train), lengths.trained, on_gpu=place.on_gpu)
    steps, needed = fit.fitted(ctx.spec, config, steps, lengths, place)
    if needed is None:
        ctx.reporter.note(fit.NOT_ESTIMATED)
    elif ctx.job.in_cluster and place.on_gpu:
        fit.require_host_memory(ctx.spec, needed)
    return steps, needed


def _note_unchecked(ctx: RunContext) -> None:
    resources = ctx.spec.resources
    if not ctx.job.in_cluster or not resources.gpus:
        return
    if resources.gpu_type in GPU_BYTES:
        ctx.reporter.note(f"Not checked: driver and kernels of the GPU; its memory ({resources.gpu_type}) is held against the estimate.")
        return
    kind = f"{resources.gpu_type} is unknown; known are {', '.join(GPU_BYTES)}" if resources.gpu_type else "is not set"
    ctx.reporter.note(
        f"Not checked: whether the training fits into the GPU's memory (resources.gpuType {kind}), its driver and its kernels."
    )

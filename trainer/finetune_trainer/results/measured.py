"""What one attempt measured, for results/hints.py: times of the reporter, and what this machine computes with. Imports torch."""

import os

import torch

from finetune_trainer import sources
from finetune_trainer.context import RunContext
from finetune_trainer.plan import plan
from finetune_trainer.results.hints import Measured
from finetune_trainer.stages.data import Data
from finetune_trainer.stages.train import Trained


def measured(ctx: RunContext, stages: dict[str, float], parts: dict[str, float], data: Data, trained: Trained, device: str) -> Measured:
    """Gathers it.

    Args:
        ctx: the run.
        stages: seconds by stage.
        parts: seconds by part of a stage.
        data: the rows that it was trained on.
        trained: the steps and the model.
        device: what it was trained on, which it has left by the time of the proof.
    """
    return Measured(
        stages=stages,
        parts=parts,
        steps=trained.plan.steps - trained.resumed_from,
        device=device,
        dtype=str(trained.model.dtype).removeprefix("torch."),
        computes_bfloat16=_computes_bfloat16(device),
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        micro_batches=trained.plan.accumulation,
        enough=_enough(ctx, data, trained, device),
        in_cluster=ctx.job.in_cluster,
        keeps_models=not ctx.job.in_cluster or sources.keeps_weights(ctx),
    )


def _enough(ctx: RunContext, data: Data, trained: Trained, device: str) -> int:
    """Micro-batches of a step if memory were plenty; a checkpoint's own cut may come from another kind of machine, and says nothing of memory."""
    if trained.resumed_from and not trained.plan.reduced:
        return trained.plan.accumulation
    longest = max(len(example.input_ids) for example in data.train)
    return plan(ctx.spec, len(data.train), longest, on_gpu=device == "cuda").accumulation


def _computes_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 arithmetic, rather than converting every value."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))

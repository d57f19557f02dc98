"""What one attempt measured, for results/hints.py: times of the reporter, and what this machine computes with. Imports torch."""

import os

import torch

from finetune_trainer import sources
from finetune_trainer.context import RunContext
from finetune_trainer.results.hints import Measured
from finetune_trainer.stages.train import Trained


def measured(ctx: RunContext, stages: dict[str, float], parts: dict[str, float], trained: Trained, device: str) -> Measured:
    """Gathers it.

    Args:
        ctx: the run.
        stages: seconds by stage.
        parts: seconds by part of a stage.
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
        in_cluster=ctx.job.in_cluster,
        keeps_models=not ctx.job.in_cluster or sources.keeps_weights(ctx),
    )


def _computes_bfloat16(device: str) -> bool:
    """Whether the device has bfloat16 arithmetic, rather than converting every value."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))

"""How many optimizer steps a training has, when it turns to quantization-aware steps, and how a batch is cut into micro-batches. Pure."""

import math
from dataclasses import dataclass

from finetune_api.spec import FineTuneJobSpec, Scheme

MICRO_BATCH_TOKENS = 1024  # of SmolLM2 in float32: 4 GB at its peak
_WARMUP_SHARE = 0.03


@dataclass(frozen=True)
class Plan:
    """The steps of a training.

    Attributes:
        steps: optimizer steps in all.
        switch_step: steps before exact QAT begins; equal to `steps` when there is none.
        micro_batch: rows of one forward pass; divides the effective batch.
        accumulation: micro-batches of one optimizer step.
        warmup_steps: steps over which the learning rate rises.
    """

    steps: int
    switch_step: int
    micro_batch: int
    accumulation: int
    warmup_steps: int


def plan(spec: FineTuneJobSpec, rows: int, longest: int) -> Plan:
    """Counts steps and chooses the micro-batch.

    Args:
        spec: epochs, effective batch and qatPercent.
        rows: training examples, at least one.
        longest: tokens of the longest one.
    """
    training, quantization = spec.training, spec.quantization
    steps = training.epochs * math.ceil(rows / training.batch_size)
    adapt = 0 if quantization.scheme is Scheme.NONE else math.ceil(steps * quantization.qat_percent / 100)
    micro_batch = largest_divisor(training.batch_size, max(1, MICRO_BATCH_TOKENS // longest))
    return Plan(steps, steps - adapt, micro_batch, training.batch_size // micro_batch, math.ceil(steps * _WARMUP_SHARE))


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (at least 1)."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return max(size for divisor in small for size in (divisor, number // divisor) if size <= limit)

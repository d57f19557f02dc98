"""The learning rate over a training of two phases. Pure; stages/train.py hands it to the trainer as its schedule."""

import math

REWARM = 1.0  # of the first peak; BENCHMARKS.md, "What exact QAT recovers"


def rate_factor(step: int, steps: int, switch: int, warmup: int, rewarm: float) -> float:
    """What the peak learning rate is multiplied with in a step.

    Args:
        step: optimizer steps done, 0 in the first step.
        steps: in all.
        switch: steps before the adapt phase.
        warmup: steps over which the rate rises.
        rewarm: the adapt phase's own peak; 0 for one cosine over both phases.
    """
    if not rewarm or not 0 < switch < steps:
        return _warm_cosine(step, steps, warmup)
    return _warm_cosine(step, switch, warmup) if step < switch else rewarm * _warm_cosine(step - switch, steps - switch, warmup)


def _warm_cosine(step: int, steps: int, warmup: int) -> float:
    """A linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

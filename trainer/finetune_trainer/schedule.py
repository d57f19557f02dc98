"""The learning rate over a training of two phases. Pure; stages/train.py hands it to the trainer as its schedule."""

import math

ADAPT_PEAK = 0.4  # of the first; BENCHMARKS.md, "What exact QAT recovers"


def rate_factor(step: int, steps: int, switch: int, warmup: int, adapt_peak: float) -> float:
    """What the peak learning rate is multiplied with in a step.

    The tune phase follows the cosine that all steps would have; the adapt phase has one of its own, from a lower peak to zero.

    Args:
        step: optimizer steps done, 0 in the first step.
        steps: in all.
        switch: steps before the adapt phase.
        warmup: steps over which the rate rises.
        adapt_peak: where the adapt phase begins; 0 for one cosine over both phases.
    """
    if adapt_peak and 0 < switch <= step:
        return adapt_peak * _cosine(step - switch, steps - switch)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return _cosine(step - warmup, steps - warmup)


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))

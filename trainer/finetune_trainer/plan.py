"""How many optimizer steps a training has, when it turns to quantization-aware steps, and how a batch is cut into micro-batches. Pure."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from finetune_api.spec import FineTuneJobSpec, Scheme

# Beyond these a step gains no speed, and what it needs no longer depends on what else the machine happens to do.
MICRO_BATCH_TOKENS = 1024  # on a CPU
GPU_MICRO_BATCH_TOKENS = 16_384  # on a GPU, where other sizes were not measured
_WARMUP_SHARE = 0.03
_ALL = 100


@dataclass(frozen=True)
class Plan:
    """The steps of a training.

    Attributes:
        steps: optimizer steps in all.
        switch_step: steps before exact QAT begins; equal to `steps` when there is none.
        micro_batch: rows of one forward pass where all are as long as the longest one; of shorter rows it takes more. Divides the effective batch.
        accumulation: micro-batches of one optimizer step, at most.
        warmup_steps: steps over which the learning rate rises.
        keeps_codes: whether quantized weights are kept from one micro-batch to the next, which is faster, and takes one byte a weight.
        reduced: whether the micro-batch was chosen smaller because memory had run out.
    """

    steps: int
    switch_step: int
    micro_batch: int
    accumulation: int
    warmup_steps: int
    keeps_codes: bool = True
    reduced: bool = False

    @property
    def batch(self) -> int:
        """Rows of an optimizer step: the effective batch."""
        return self.micro_batch * self.accumulation

    @property
    def cut(self) -> dict[str, int | bool]:
        """How the batch is cut, for those who go on: another micro-batch adds up gradients in another order."""
        return {"micro_batch": self.micro_batch, "keeps_codes": self.keeps_codes, "reduced": self.reduced}

    def with_cut(self, known: Mapping[str, Any]) -> "Plan":
        """The same steps, cut as `cut` has it; what it does not say is as it is here."""
        cut = {name: known.get(name, value) for name, value in self.cut.items()}
        return replace(self.with_micro_batch(cut.pop("micro_batch")), **cut)

    def with_micro_batch(self, rows: int) -> "Plan":
        """The same steps, cut otherwise; `rows` divides the effective batch."""
        return replace(self, micro_batch=rows, accumulation=self.batch // rows)

    def halved(self) -> "Plan":
        """The same effective batch in micro-batches of half the rows, or of the next fewer that divide it, with nothing kept for speed."""
        fewer = largest_divisor(self.batch, max(1, self.micro_batch // 2))
        return replace(self.with_micro_batch(fewer), keeps_codes=False, reduced=True)

    def fitted(self, fits: Callable[[int], bool]) -> "Plan | None":
        """The plan with the largest micro-batch, of at most its own rows, that fits; None when not even a single row does.

        Args:
            fits: whether so many rows fit; where some do, fewer do too. Asked as seldom as can be.
        """
        if fits(self.micro_batch):
            return self
        sizes = [size for size in divisors(self.batch) if size < self.micro_batch]
        count = bisect_left(sizes, True, key=lambda size: not fits(size))
        return self.with_micro_batch(sizes[count - 1]) if count else None


def plan(spec: FineTuneJobSpec, rows: int, longest: int, *, on_gpu: bool = False) -> Plan:
    """Counts steps and chooses the micro-batch, as large as gains speed; whether it fits is asked elsewhere (memory/fit.py).

    Args:
        spec: epochs, effective batch and qatPercent.
        rows: training examples, at least one.
        longest: tokens of the longest one.
        on_gpu: whether it is for a GPU.
    """
    training, quantization = spec.training, spec.quantization
    steps, quantizes = training.epochs * math.ceil(rows / training.batch_size), quantization.scheme is not Scheme.NONE
    adapt = math.ceil(steps * quantization.qat_percent / 100) if quantizes else 0
    if quantization.qat_percent < _ALL:
        adapt = min(adapt, max(1, steps - 1))  # of a few steps all would be: then there is no tuned model to compare with
    tokens = GPU_MICRO_BATCH_TOKENS if on_gpu else MICRO_BATCH_TOKENS
    micro_batch = largest_divisor(training.batch_size, max(1, tokens // longest))
    return Plan(steps, steps - adapt, micro_batch, training.batch_size // micro_batch, math.ceil(steps * _WARMUP_SHARE), quantizes)


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit` (at least 1)."""
    return max(size for size in divisors(number) if size <= limit)


def divisors(number: int) -> list[int]:
    """All divisors, in ascending order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({size for divisor in small for size in (divisor, number // divisor)})

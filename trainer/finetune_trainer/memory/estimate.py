"""What a training will need, part by part, and the largest micro-batch that fits: pure arithmetic around dry_run.py.

Called by the `finetune estimate` command, by preflight (stages/rehearse.py) and before the first step (stages/train.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from peft import PeftModel

from finetune_trainer.memory.dry_run import Step, peak_bytes
from finetune_trainer.plan import Plan

PROCESS_BYTES = 2**30  # Python, torch and the libraries before a model is loaded: 0.9 GB measured
FILLED = 0.9  # of what there is: allocators leave fragments, and the estimate may be off by a few percent
_MOMENTS = 2  # AdamW's, in the adapter's dtype


@dataclass(frozen=True)
class Estimate:
    """The peak of a training, in bytes. Their sum is what a process grows by, beside PROCESS_BYTES.

    Attributes:
        weights: the base model, once.
        adapter: LoRA's factors.
        optimizer: their gradients and AdamW's two moments.
        activations: all that a forward and backward pass keeps or makes, at the worst moment.
        rows: rows of the micro-batch.
        tokens: tokens of each row.
    """

    weights: int
    adapter: int
    optimizer: int
    activations: int
    rows: int
    tokens: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.adapter + self.optimizer + self.activations

    @property
    def sentence(self) -> str:
        """For the user: the parts and their sum."""
        parts = ", ".join(f"{name} {gigabytes(getattr(self, name))}" for name in ("weights", "adapter", "optimizer", "activations"))
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"a micro-batch of {rows} of {self.tokens} tokens needs {gigabytes(self.peak)} ({parts})"


@dataclass(frozen=True)
class Kind:
    """How the steps of a training run.

    Attributes:
        on_gpu: with activation checkpointing and fused loss kernels.
        tunes: whether it has steps without fake quantization.
        adapts: whether it has steps under exact quantization-aware training.
    """

    on_gpu: bool
    tunes: bool
    adapts: bool

    @classmethod
    def of(cls, plan: Plan, *, on_gpu: bool) -> "Kind":
        """The phases of this plan."""
        return cls(on_gpu, tunes=plan.switch_step > 0, adapts=plan.switch_step < plan.steps)

    def steps(self, rows: int, tokens: int) -> list[Step]:
        """One step of each phase; several rows are taken to differ in length."""
        phases = [quantized for quantized, wanted in ((False, self.tunes), (True, self.adapts)) if wanted]
        return [Step(rows, tokens, rows > 1, quantized, checkpointed=self.on_gpu, fused_loss=self.on_gpu) for quantized in phases]


def estimate_of(model: PeftModel, steps: Sequence[Step]) -> Estimate:
    """The largest of the steps' peaks, in parts.

    Args:
        model: from dry_run.empty_model.
        steps: one of each phase of the training, all of the same shape.
    """
    weights, adapter = (_bytes(model, trained=trained) for trained in (False, True))
    peak = max(peak_bytes(model, step) for step in steps) + _MOMENTS * adapter
    optimizer = (1 + _MOMENTS) * adapter
    return Estimate(weights, adapter, optimizer, max(0, peak - weights - adapter - optimizer), steps[0].rows, steps[0].tokens)


def remembered(model: PeftModel, kind: Kind, tokens: int) -> Callable[[int], Estimate]:
    """The estimate as a function of the micro-batch's rows, each size traced once."""
    return cache(lambda rows: estimate_of(model, kind.steps(rows, tokens)))


def fits(need: int, room: int) -> bool:
    """Whether so many bytes fit, with a margin."""
    return need <= FILLED * room


def gigabytes(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB"


def _bytes(model: PeftModel, *, trained: bool) -> int:
    held = {id(item): item for item in model.parameters() if item.requires_grad is trained}
    if not trained:
        held |= {id(item): item for item in model.buffers()}
    return sum(item.numel() * item.element_size() for item in held.values())

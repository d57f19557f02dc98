"""What a training will need, part by part, and the largest micro-batch that fits: pure arithmetic around dry_run.py.

Called by the `finetune estimate` command, by preflight (stages/rehearse.py) and before the first step (stages/train.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from finetune_api.spec import FineTuneJobSpec, Scheme
from peft import PeftModel

from finetune_trainer.base_model import recomputes_activations
from finetune_trainer.example import Example
from finetune_trainer.held_out import TOKENS_AT_ONCE
from finetune_trainer.memory.dry_run import HeldOutBatch, Step, code_bytes, factor_bytes, peak_bytes
from finetune_trainer.plan import Plan
from finetune_trainer.qat.gptq import TOKENS, gains_from_a_choice

PROCESS_BYTES = 2**30  # Python, torch and the libraries before a model is loaded: 0.9 GB measured
FILLED = 0.9  # of what there is: allocators leave fragments, and the estimate may be off by a few percent
PARTS = ("weights", "adapter", "optimizer", "quantization", "activations")
_MOMENTS = 2  # AdamW's, in the adapter's dtype


@dataclass(frozen=True)
class Estimate:
    """The peak of a training, in bytes. Their sum is what a process grows by, beside PROCESS_BYTES.

    Attributes:
        weights: the base model, once.
        adapter: LoRA's factors, and from the switch on their values there.
        optimizer: their gradients and AdamW's two moments.
        quantization: what is kept beside the weights: a factor for each group's scale, a byte for each weight's rounding, and, where they fit,
            the quantized weights from one micro-batch to the next.
        activations: all that a forward and backward pass keeps or makes, at the worst moment.
        rows: rows of the micro-batch.
        tokens: tokens of each row.
    """

    weights: int
    adapter: int
    optimizer: int
    quantization: int
    activations: int
    rows: int
    tokens: int

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(getattr(self, part) for part in PARTS)

    @property
    def sentence(self) -> str:
        """For the user: the parts and their sum."""
        parts = ", ".join(f"{name} {gigabytes(getattr(self, name))}" for name in PARTS)
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        return f"a micro-batch of {rows} of {self.tokens} tokens needs {gigabytes(self.peak)} ({parts})"


Needed = Callable[[int, bool], Estimate]
"""The estimate as a function of the micro-batch's rows, and of whether quantized weights are kept from one to the next."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest row that is trained on, and of the longest one that is held out (0 without any)."""

    trained: int
    held_out: int

    @classmethod
    def of(cls, train: Sequence[Example], held_out: Sequence[Example]) -> "Lengths":
        """Those of the data."""
        trained, measured = (max((len(example.input_ids) for example in rows), default=0) for rows in (train, held_out))
        return cls(trained, measured)


@dataclass(frozen=True)
class Kind:
    """What a training does, as far as it takes memory.

    Attributes:
        on_gpu: with fused loss kernels.
        checkpointed: with activation checkpointing.
        tunes: whether it has steps without fake quantization.
        adapts: whether it has steps under exact quantization-aware training.
        distills: whether those learn from the adapter at the switch.
        quantizes: whether the held-out rows are measured on the quantized model too.
        rounds: whether the rounding of weights is chosen behind the tuning.
        batch: rows of an optimizer step.
        lengths: tokens of the longest rows.
    """

    on_gpu: bool
    checkpointed: bool
    tunes: bool
    adapts: bool
    distills: bool
    quantizes: bool
    rounds: bool
    batch: int
    lengths: Lengths

    @classmethod
    def of(cls, spec: FineTuneJobSpec, model: PeftModel, plan: Plan, lengths: Lengths, *, on_gpu: bool) -> "Kind":
        """That of this job, its prepared model and its plan."""
        tunes, adapts = plan.switch_step > 0, plan.switch_step < plan.steps
        distills, rounds = spec.quantization.distill and tunes and adapts, tunes and gains_from_a_choice(model)
        quantizes, checkpointed = spec.quantization.scheme is not Scheme.NONE, recomputes_activations(model, on_gpu=on_gpu)
        return cls(on_gpu, checkpointed, tunes, adapts, distills, quantizes, rounds, plan.batch, lengths)

    def traced(self, rows: int) -> list[Step | HeldOutBatch]:
        """One step of each phase, with several rows that differ in length, the pass that chooses the rounding, and a batch of held-out rows."""
        step = Step(
            rows,
            self.lengths.trained,
            padded=rows > 1,
            checkpointed=self.checkpointed,
            fused_loss=self.on_gpu,
            accumulated=rows < self.batch,
        )
        adapting = replace(step, quantized=True, taught=self.distills)
        measured = self.lengths.held_out
        batches = [HeldOutBatch(max(1, TOKENS_AT_ONCE // measured), measured, self.quantizes)] if measured else []
        length = self.lengths.trained
        chosen_by = [HeldOutBatch(max(1, TOKENS // length), length, True, rounding=True)] if self.rounds else []
        return [*([step] if self.tunes else []), *chosen_by, *([adapting] if self.adapts else []), *batches]

    def keeps_codes(self, traced: Step | HeldOutBatch) -> bool:
        """Whether quantized weights are kept there, if they fit: where more than one forward pass reads them."""
        if isinstance(traced, HeldOutBatch):
            return traced.quantized and not traced.rounding
        return traced.quantized and (traced.accumulated or traced.checkpointed)


def needed_by(model: PeftModel, kind: Kind) -> Needed:
    """What a training needs; each size is traced once.

    Args:
        model: from dry_run.empty_model.
        kind: what it does.
    """
    weights, adapter = (_bytes(model, trained=trained) for trained in (False, True))
    peak, factors, codes = cache(lambda traced: peak_bytes(model, traced)), factor_bytes(model), code_bytes(model)

    def at(traced: Step | HeldOutBatch, rows: int, keeps_codes: bool) -> Estimate:
        gradients = adapter if isinstance(traced, Step) else 0
        kept = (factors if traced.quantized else 0) + (codes if keeps_codes and kind.keeps_codes(traced) else 0)
        activations = max(0, peak(traced) - weights - adapter - gradients)
        copies = 2 if traced.quantized else 1
        return Estimate(weights, copies * adapter, gradients + _MOMENTS * adapter, kept, activations, rows, kind.lengths.trained)

    def needed(rows: int, keeps_codes: bool) -> Estimate:
        return max((at(traced, rows, keeps_codes) for traced in kind.traced(rows)), key=lambda found: found.peak)

    return cache(needed)


def largest(plan: Plan, needed: Needed, room: int) -> tuple[Plan, Estimate] | None:
    """The plan with the largest micro-batch that fits, which keeps quantized weights if they fit too; None when not even a single row does."""
    fitting = plan.fitted(lambda rows: fits(needed(rows, False).peak, room))
    if fitting is None:
        return None
    fitting = replace(fitting, keeps_codes=plan.keeps_codes and fits(needed(fitting.micro_batch, True).peak, room))
    return fitting, needed(fitting.micro_batch, fitting.keeps_codes)


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

"""Train: LoRA first (tune), then the last steps under exact quantization-aware training (adapt), on trl's SFTTrainer.

Resumable at any step, bit for bit on a CPU: the phase and the losses at the switch are part of a checkpoint. SIGTERM saves the last
completed step. The CUDA path (bfloat16, gradient checkpointing) has not yet run on a GPU.
"""

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HfDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from finetune_api.spec import FineTuneJobSpec, Scheme
from finetune_trainer import checkpoints
from finetune_trainer.checkpoints import Checkpoint
from finetune_trainer.context import RunContext
from finetune_trainer.errors import Checkpointed, DataError
from finetune_trainer.mirror import Mirror
from finetune_trainer.qat.prepare import Prepared, follow_optimizer, mode_of, prepare, require_effect, set_fake_quantization
from finetune_trainer.reporting.progress import ProgressMeter
from finetune_trainer.stages.data import Data, Example
from finetune_trainer.stages.evaluate import SwitchLosses, held_out_loss, pad
from finetune_trainer.stages.load import Loaded

WARMUP_SHARE = 0.03
MICRO_BATCH_TOKENS = 2048
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Trained:
    """The trained model and what was measured on the way.

    Attributes:
        model: with its final adapter; prepared for exact QAT unless the scheme is none.
        prepared: what is quantized; None for scheme none.
        switch: held-out losses at the switch; None without one.
        steps: optimizer steps in all.
        resumed_from: the step this attempt started at.
        final_loss: training loss of the last step; None when this attempt made none.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared | None
    switch: SwitchLosses | None
    steps: int
    resumed_from: int
    final_loss: float | None


@dataclass(frozen=True)
class Plan:
    """The steps of a training, from the spec and the number of rows.

    Attributes:
        steps: optimizer steps in all.
        switch_step: the first step under exact QAT; equal to `steps` when there is none.
        micro_batch: rows of one forward pass; divides the effective batch.
        accumulation: micro-batches of one optimizer step.
    """

    steps: int
    switch_step: int
    micro_batch: int
    accumulation: int


def plan(spec: FineTuneJobSpec, rows: int, longest: int) -> Plan:
    """Counts steps and chooses the micro-batch.

    Args:
        spec: epochs, effective batch and qatPercent.
        rows: training examples.
        longest: tokens of the longest one.
    """
    training, quantization = spec.training, spec.quantization
    steps = training.epochs * math.ceil(rows / training.batch_size)
    adapt = 0 if quantization.scheme is Scheme.NONE else math.ceil(steps * quantization.qat_percent / 100)
    fitting = max(1, MICRO_BATCH_TOKENS // longest)
    micro_batch = max(size for size in range(1, training.batch_size + 1) if training.batch_size % size == 0 and (size <= fitting or size == 1))
    return Plan(steps, steps - adapt, micro_batch, training.batch_size // micro_batch)


def run(ctx: RunContext, loaded: Loaded, data: Data) -> Trained:
    """Trains, or goes on where the newest complete checkpoint stands.

    Raises:
        Checkpointed: SIGTERM came; the last completed step is saved.
        DataError: a loss or gradient is not finite.
    """
    if not data.train:
        raise DataError(f"{ctx.spec.dataset.source} leaves no row to train on; add rows or lower dataset.evaluation.percent.")
    mirror = Mirror.of(ctx)
    checkpoint = find_checkpoint(ctx, mirror)
    steps = plan(ctx.spec, len(data.train), max(len(example.input_ids) for example in data.train))
    prepared = _prepare(ctx, loaded, data)
    phases = Phases(ctx, loaded.model, data.held_out, steps, mirror, checkpoint)
    trainer = _trainer(ctx, loaded, data, steps, phases)
    with _stop_on_sigterm(phases):
        trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint else None)
    if phases.stopping and trainer.state.global_step < steps.steps:
        raise Checkpointed(f"Stopped by SIGTERM after step {trainer.state.global_step} of {steps.steps}, which is saved; run again to go on.")
    phases.finish()
    return Trained(
        loaded.model, loaded.tokenizer, prepared, phases.switch, steps.steps, checkpoint.step if checkpoint else 0, phases.meter.last_loss
    )


def find_checkpoint(ctx: RunContext, mirror: Mirror | None) -> Checkpoint | None:
    """The newest complete checkpoint of this training, from the working directory or else from the mirror."""
    found = checkpoints.newest(ctx.outputs, ctx.job.train_digest, ctx.reporter.note)
    if found is None and mirror is not None:
        mirror.fetch_latest(ctx.outputs)
        found = checkpoints.newest(ctx.outputs, ctx.job.train_digest, ctx.reporter.note)
    if found:
        ctx.reporter.note(f"Going on from the checkpoint of step {found.step}.")
    return found


def _prepare(ctx: RunContext, loaded: Loaded, data: Data) -> Prepared | None:
    if ctx.spec.quantization.scheme is Scheme.NONE:
        return None
    prepared = prepare(loaded.model, ctx.spec.quantization, enabled=False)
    require_effect(loaded.model, torch.tensor([data.train[0].input_ids[:32]], device=loaded.model.device))
    kept = f"; not quantized: {', '.join(sorted(prepared.skipped))}" if prepared.skipped else ""
    ctx.reporter.note(f"{len(prepared.layers)} linear layers are quantized ({prepared.coverage:.0%} of the linear weights){kept}.")
    return prepared


def _trainer(ctx: RunContext, loaded: Loaded, data: Data, steps: Plan, phases: "Phases") -> SFTTrainer:
    training, on_gpu = ctx.spec.training, loaded.model.device.type == "cuda"
    arguments = SFTConfig(
        output_dir=str(ctx.outputs),
        max_steps=steps.steps,
        per_device_train_batch_size=steps.micro_batch,
        gradient_accumulation_steps=steps.accumulation,
        learning_rate=float(training.learning_rate),
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(steps.steps * WARMUP_SHARE),
        max_grad_norm=1.0,
        seed=training.seed,
        data_seed=training.seed,
        bf16=False,  # the weights' own dtype decides: autocast would compute another function than the exported model
        use_cpu=not on_gpu,
        activation_checkpointing=on_gpu,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        save_steps=training.checkpoint_every,
        save_total_limit=_KEPT_CHECKPOINTS,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=on_gpu,
        eos_token=None,
    )
    rows = HfDataset.from_list([{"input_ids": list(item.input_ids), "labels": list(item.labels)} for item in data.train])
    pad_token_id = int(loaded.tokenizer.pad_token_id or 0)
    trainer = _FiniteTrainer(
        model=loaded.model,
        args=arguments,
        train_dataset=rows,
        processing_class=loaded.tokenizer,
        data_collator=lambda items: pad([Example(tuple(item["input_ids"]), tuple(item["labels"])) for item in items], pad_token_id),
        callbacks=[phases],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _FiniteTrainer(SFTTrainer):
    """Stops at the first loss that is not finite, before it reaches a weight."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        _require_finite(loss, "loss", self.state.global_step + 1)
        return loss


def _require_finite(value: torch.Tensor, what: str, step: int) -> None:
    if not torch.isfinite(value).all():
        raise DataError(
            f"The {what} of step {step} is not finite; lower training.learningRate, look for broken rows, or use dtype float32. Checkpoints of earlier steps are kept."
        )


class Phases(TrainerCallback):
    """What happens at step boundaries: the switch, checkpoints and their mirror, progress, SIGTERM."""

    def __init__(
        self, ctx: RunContext, model: PeftModel, held_out: Sequence[Example], steps: Plan, mirror: Mirror | None, checkpoint: Checkpoint | None
    ) -> None:
        self.stopping = False
        known = checkpoint.facts.get("switch") if checkpoint else None
        self.switch = SwitchLosses(**known) if known else None
        self.meter = ProgressMeter(ctx.reporter, steps.steps, checkpoint.step if checkpoint else 0)
        self._ctx, self._model, self._held_out, self._steps, self._mirror = ctx, model, held_out, steps, mirror
        self._quantizes = mode_of(model) is not None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Weight codes live until the next optimizer step."""
        follow_optimizer(self._model, getattr(optimizer, "optimizer", optimizer))
        mode = mode_of(self._model)
        if mode is not None:
            mode.keep_codes = self._steps.accumulation > 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Turns to exact QAT at the switch; a run that resumes behind it turns at once."""
        if self._quantizes and state.global_step >= self._steps.switch_step:
            if state.global_step == self._steps.switch_step > 0 and self.switch is None:
                self._measure_switch()
            set_fake_quantization(self._model, enabled=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No gradient that is not finite reaches a weight."""
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                _require_finite(parameter.grad, "gradient", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """SIGTERM: save this step and stop; the last step is always saved."""
        if self.stopping or state.global_step == self._steps.steps:
            control.should_save = True
        control.should_training_stop = control.should_training_stop or self.stopping

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """One optimizer step is done."""
        if logs and "loss" in logs:
            self.meter.step_done(state.global_step, float(logs["loss"]), float(logs.get("epoch", 0.0)), int(logs.get("num_tokens", 0)))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seals what transformers wrote, and mirrors it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        checkpoints.seal(folder, self._ctx.job.train_digest, {"switch": asdict(self.switch) if self.switch else None})
        if self._mirror is not None:
            self._mirror.push(folder)

    def finish(self) -> None:
        """After the last step: quantization after training (qatPercent 0) is measured here, and fake quantization stays on."""
        if self._quantizes and self._steps.switch_step == self._steps.steps and self.switch is None:
            self._measure_switch()
        set_fake_quantization(self._model, enabled=True)

    def _measure_switch(self) -> None:
        if not self._held_out:
            return
        tuned = held_out_loss(self._model, self._held_out, fake_quant=False)
        ptq = held_out_loss(self._model, self._held_out, fake_quant=True)
        self.switch = SwitchLosses(tuned, ptq)
        self._ctx.reporter.note(f"At the switch to quantization-aware steps: held-out loss {tuned:.4g} as tuned, {ptq:.4g} if it were quantized now.")


@contextmanager
def _stop_on_sigterm(phases: Phases) -> Iterator[None]:
    def stop(*_: Any) -> None:
        phases.stopping = True

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""What happens at the step boundaries of a training: the switch to exact QAT, checkpoints and their mirror, progress, SIGTERM and Ctrl-C.

stages/train.py makes one and hands it to the trainer as its callback. What is known from the switch on (switch.py) is part of a checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

from finetune_trainer import checkpoints
from finetune_trainer.checkpoints import Checkpoint
from finetune_trainer.context import RunContext
from finetune_trainer.errors import DataError, FineTuneError
from finetune_trainer.example import Example
from finetune_trainer.held_out import HeldOut, mean_loss, measure
from finetune_trainer.mirror import Mirror
from finetune_trainer.plan import Plan
from finetune_trainer.qat.gptq import choose_rounding, gains_from_a_choice
from finetune_trainer.qat.prepare import follow_optimizer, free_codes, mode_of, set_fake_quantization
from finetune_trainer.qat.scales import fit_scales
from finetune_trainer.reporting.progress import ProgressMeter
from finetune_trainer.switch import Switch
from finetune_trainer.teacher import Adapter, adapter_values, in_place
from finetune_trainer.termination_signal import stopping_at_once


@dataclass(frozen=True)
class Work:
    """What a training works on.

    Attributes:
        calibration: rows of the training data that the rounding of weights is chosen by.
        inputs: digest of the base model's revision and dtype and of the rows; a checkpoint of others is not resumed from.
        start: the checkpoint to go on from.
    """

    ctx: RunContext
    model: PeftModel
    held_out: Sequence[Example]
    calibration: Sequence[Example]
    plan: Plan
    inputs: str
    start: Checkpoint | None


class StepDropped(Exception):  # noqa: N818 no error: the step is done again by the next attempt
    """SIGTERM or Ctrl-C came in the midst of an optimizer step, which may take longer than a pod's grace period."""


class Phases(TrainerCallback):
    """The trainer's callback.

    Attributes:
        stopping: SIGTERM or Ctrl-C came; this attempt ends with the micro-batch in hand.
        switch: what is known from the switch on; None before it.
    """

    def __init__(self, work: Work) -> None:
        self.stopping = False
        self.switch = Switch.load(work.start.folder, work.model.device) if work.start else None
        remark = f", micro-batch {work.plan.micro_batch} after out of memory" if work.plan.reduced else ""
        self.meter = ProgressMeter(work.ctx.reporter, work.plan.steps, work.start.step if work.start else 0, remark)
        self._work = work
        self._quantizes = mode_of(work.model) is not None
        self._adapting = False
        self._tokens = 0

    @property
    def plan(self) -> Plan:
        """The plan of this attempt."""
        return self._work.plan

    @property
    def teacher(self) -> Adapter | None:
        """What the adapt phase learns from beside the data; None before it, where it isn't wanted, and where nothing was tuned before."""
        learns = self._adapting and self._work.ctx.spec.quantization.distill and self._work.plan.switch_step > 0
        return self.switch.adapter if learns and self.switch else None

    def stop(self) -> None:
        """SIGTERM or Ctrl-C came."""
        self.stopping = True
        # From a thread of its own: a signal handler would wait for ever for a lock that the code below it holds.
        Thread(target=self._work.ctx.reporter.note, args=("Stopping.",)).start()

    def on_train_begin(self, _args: Any, _state: Any, _control: Any, optimizer: Any = None, **_: Any) -> None:
        """Weight codes live until the next optimizer step, where they are read again: by other micro-batches, or by a GPU's checkpointed layers."""
        follow_optimizer(self._work.model, getattr(optimizer, "optimizer", optimizer))
        mode = mode_of(self._work.model)
        if mode is not None:
            reread = self.plan.accumulation > 1 or self._work.model.device.type == "cuda"
            mode.keep_codes = self.plan.keeps_codes and reread

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """Turns to exact QAT at the switch; a run that resumes behind it turns at once, and one that is to stop not any more: that takes minutes."""
        if not self.stopping and self._quantizes and state.global_step >= self._work.plan.switch_step:
            self._adapt()

    def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        """No gradient that is not finite reaches a weight."""
        for parameter in self._work.model.parameters():
            if parameter.grad is not None:
                self.require_finite(parameter.grad, "gradient", state.global_step + 1)

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last step is always saved, and the one before the switch, whose measurements SIGTERM may cut short."""
        if state.global_step in (self._work.plan.steps, self._work.plan.switch_step):
            control.should_save = True
        self._stop_if_asked(control)

    def on_log(self, _args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """One optimizer step is done."""
        if logs and "loss" in logs:
            self.meter.step_done(state.global_step, float(logs["loss"]), float(logs.get("epoch", 0.0)), self._tokens)
            self._stop_if_asked(control)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seals what transformers wrote, and mirrors it. A mirror that fails costs nothing as long as this pod lives."""
        folder = checkpoints.folder_of(Path(args.output_dir), state.global_step)
        if self.switch is not None:
            self.switch.save(folder)
        checkpoints.seal(folder, self._work.ctx.job.train_digest, {"inputs": self._work.inputs, **self.plan.cut})
        try:
            mirror = Mirror.of(self._work.ctx)
            if mirror is not None:
                with self._work.ctx.reporter.timed("mirror"):
                    mirror.push(folder)
        except FineTuneError as error:
            self._work.ctx.reporter.note(f"The checkpoint of step {state.global_step} was not mirrored: {error}")
        control.should_training_stop = control.should_training_stop or self.stopping

    def finish(self) -> None:
        """After the last step: quantization after training (qatPercent 0) is measured here, fake quantization stays on, no codes are kept."""
        if self._quantizes:
            self._adapt()
            free_codes(self._work.model)

    def count(self, attention_mask: torch.Tensor) -> None:
        """A micro-batch is in hand; its tokens count in the speed that is shown."""
        self._tokens += int(attention_mask.sum())

    def require_finite(self, value: torch.Tensor, what: str, step: int) -> None:
        """Refuses a loss or gradient that is not finite, before it reaches a weight.

        Raises:
            DataError: names the step and the learning rate.
        """
        if torch.isfinite(value).all():
            return
        rate = self._work.ctx.spec.training.learning_rate
        raise DataError(
            f"The {what} of step {step} is not finite at training.learningRate {rate}; lower it, look for broken rows, or set model.dtype to float32. "
            "Checkpoints of earlier steps are kept."
        )

    def drop_step_if_asked(self) -> None:
        """Asked before each micro-batch.

        Raises:
            StepDropped: SIGTERM or Ctrl-C came.
        """
        if self.stopping:
            raise StepDropped

    def _stop_if_asked(self, control: Any) -> None:
        """Saves this step and stops."""
        control.should_save = control.should_save or self.stopping
        control.should_training_stop = control.should_training_stop or self.stopping

    def _adapt(self) -> None:
        """Fake quantization from here on, with scales and rounding that fit the adapter at the switch, whether this attempt saw it or not."""
        if self._adapting:
            return
        with stopping_at_once(for_interrupts=True):
            if self.switch is None:
                self.switch = self._switch()
            else:
                self._fit(self.switch.adapter)
        set_fake_quantization(self._work.model, enabled=True)
        self._adapting = True

    def _switch(self) -> Switch:
        """Fits scales and rounding, and measures the adapter before and after on the held-out rows."""
        model, work = self._work.model, self._work
        adapter = adapter_values(model)
        if not work.held_out or not work.plan.switch_step:
            self._fit(adapter)
            return Switch(adapter)
        tuned = self._measure(fake_quant=False)
        nearest = self._measure(fake_quant=True) if gains_from_a_choice(model) else None
        self._fit(adapter)
        ptq = self._measure(fake_quant=True)
        told = {"as tuned": tuned, "quantized with nearest values": nearest, "quantized": ptq}
        losses = ", ".join(f"{mean_loss(found.rows):.4g} {name}" for name, found in told.items() if found)
        work.ctx.reporter.note(f"At the switch to quantization-aware steps: held-out loss {losses}.")
        return Switch(adapter, tuned, nearest, ptq)

    def _fit(self, adapter: Adapter) -> None:
        model = self._work.model
        with self._work.ctx.reporter.timed("rounding"), in_place(model, adapter):
            if self._work.plan.switch_step:
                choose_rounding(model, self._work.calibration)
            else:  # from the first step on, nearest values learn more (BENCHMARKS.md)
                fit_scales(model)

    def _measure(self, *, fake_quant: bool) -> HeldOut:
        with self._work.ctx.reporter.timed("switch"):
            return measure(self._work.model, self._work.held_out, fake_quant=fake_quant, keep_codes=self._work.plan.keeps_codes)

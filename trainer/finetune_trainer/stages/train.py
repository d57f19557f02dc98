"""Train: LoRA first (tune), then the last steps under exact quantization-aware training (adapt), on trl's SFTTrainer.

Resumable at any step, bit for bit on a CPU. SIGTERM and Ctrl-C save the last completed step. What happens between steps is in phases.py.
On a GPU: bfloat16 and activation checkpointing; there flash attention's backward pass adds up in no fixed order, so that steps of large models differ in the last bits.
"""

import copy
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as HfDataset
from finetune_api.spec import Scheme
from peft import PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

from finetune_trainer import checkpoints, finished
from finetune_trainer.base_model import recomputes_activations
from finetune_trainer.batch import pad
from finetune_trainer.checkpoints import Checkpoint
from finetune_trainer.context import RunContext
from finetune_trainer.errors import Checkpointed
from finetune_trainer.example import IGNORED, Example
from finetune_trainer.failures import first_line, is_out_of_memory
from finetune_trainer.memory import fit, shrink
from finetune_trainer.memory.estimate import Estimate, Lengths
from finetune_trainer.mirror import Mirror
from finetune_trainer.phases import Phases, StepDropped, Work
from finetune_trainer.plan import Plan, plan
from finetune_trainer.qat.gptq import calibration_rows
from finetune_trainer.qat.prepare import Prepared, free_codes, prepare, serving_note
from finetune_trainer.qat.roundtrip import require_roundtrip
from finetune_trainer.qat.trial import require_effect, require_served_function
from finetune_trainer.row_order import GroupedByLength, micro_batches
from finetune_trainer.schedule import ADAPT_PEAK, rate_factor
from finetune_trainer.stages.data import Data, require_known_tokens
from finetune_trainer.stages.load import Loaded
from finetune_trainer.switch import Switch
from finetune_trainer.teacher import teacher_hidden
from finetune_trainer.termination_signal import stopping_later
from finetune_trainer.token_loss import output_head, predict, require_own_logits, summed_loss

_KEPT_CHECKPOINTS = 2  # transformers deletes the oldest before the new one is sealed: with 1, a kill in between would leave none
_TEACHER_WEIGHT = 0.5
_ROUTER = ("output_router_logits", "router_aux_loss_coef")
# The second is its name in the transformers that unsloth asks for.
_CHECKPOINTING = "activation_checkpointing" if hasattr(SFTConfig, "activation_checkpointing") else "gradient_checkpointing"


@dataclass(frozen=True)
class Trained:
    """The trained model and what was measured on the way.

    Attributes:
        model: with its final adapter; prepared for exact QAT unless the scheme is none.
        plan: its steps and micro-batches.
        prepared: what is quantized; None for scheme none.
        switch: the adapter at the switch and what it did on the held-out rows; None without quantization.
        resumed_from: the step this attempt started at.
        final_loss: training loss of the last step, whichever attempt made it.
    """

    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    prepared: Prepared | None
    switch: Switch | None
    resumed_from: int
    final_loss: float | None
    plan: Plan


def run(ctx: RunContext, loaded: Loaded, data: Data) -> Trained:
    """Trains, or goes on where the newest complete checkpoint stands.

    Raises:
        CapacityError: not even a single row fits; OutOfMemory, where fewer rows at once may.
        Checkpointed: SIGTERM or Ctrl-C came; the last completed step is saved.
        DataError: a loss or gradient is not finite, or a token is unknown to the model.
    """
    require_known_tokens(data, loaded.model)
    inputs = finished.digest_of(loaded.identity, data.digest, loaded.backend.NAME, str(loaded.model.dtype))
    require_own_logits(loaded.model.get_base_model(), _few_tokens(loaded, data))
    prepared = _prepare(ctx, loaded, data)
    start = find_checkpoint(ctx, inputs)
    _remove_others(ctx, start)
    steps, needed = _plan(ctx, loaded, data, start)
    settings = _settings_of(loaded.model.get_base_model())
    phases = Phases(Work(ctx, loaded.model, data.held_out, calibration_rows(_shuffled(ctx, data)), steps, inputs, start))
    try:
        trainer = _trainer(ctx, loaded, data, steps, phases)
        with stopping_later(phases.stop):
            trainer.train_from(start)
        if not phases.stopping:
            phases.finish()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needs = needed.sentence if needed else "nothing, since this model's code can't be traced without its weights"
        raise shrink.give_up_or_shrink(ctx, steps, first_line(error) or type(error).__name__, needs) from error
    done = trainer.state.global_step
    if phases.stopping:
        saved = (
            f"after step {done} of {steps.steps}, which is saved; run again to go on" if done else "before a first step was done; run again"
        )
        raise Checkpointed(f"Stopped {saved}.")
    _set_settings(loaded.model.get_base_model(), settings)
    shrink.forget(ctx)
    last_loss = next((entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry), None)
    return Trained(loaded.model, loaded.tokenizer, prepared, phases.switch, start.step if start else 0, last_loss, steps)


def _shuffled(ctx: RunContext, data: Data) -> list[Example]:
    """A file's first rows may be all of one kind."""
    return random.Random(ctx.spec.training.seed).sample(data.train, len(data.train))  # noqa: S311 no secret


def _plan(ctx: RunContext, loaded: Loaded, data: Data, start: Checkpoint | None) -> tuple[Plan, Estimate | None]:
    """The plan with the micro-batch of the attempts before this one, or else with the largest that fits; and what it needs."""
    here, lengths = fit.this_machine(), Lengths.of(data.train, data.held_out)
    steps = plan(ctx.spec, len(data.train), lengths.trained, on_gpu=here.on_gpu)
    # Where memory ran out since the checkpoint, what was left for this attempt is the smaller one.
    known, place = shrink.remembered(ctx) or (start.facts if start else {}), here
    if "micro_batch" in known:
        steps, place = steps.with_cut(known), replace(here, room=None)
    steps, needed = fit.fitted(ctx.spec, loaded.model.get_base_model().config, steps, lengths, place)
    fit.hold_to_estimate(needed, here)
    ctx.reporter.note(f"Memory: {needed.sentence}." if needed else fit.NOT_ESTIMATED)
    return steps, needed


def find_checkpoint(ctx: RunContext, inputs: str) -> Checkpoint | None:
    """The newest complete checkpoint of this training, from the working directory or else from the mirror.

    Args:
        inputs: digest of the base model's files and dtype and of the rows; where a source has changed under the same name, training begins anew.
    """
    found = checkpoints.newest(ctx.outputs, ctx.job.train_digest, ctx.reporter.note)
    if found is None and (mirror := Mirror.of(ctx)):
        mirror.fetch_latest(ctx.outputs, ctx.reporter.note)
        found = checkpoints.newest(ctx.outputs, ctx.job.train_digest, ctx.reporter.note)
    if found and found.facts.get("inputs") != inputs:
        ctx.reporter.note(
            f"The model, its dtype or the data has changed since the checkpoint of step {found.step}, so training begins anew."
        )
        return None
    return found


def _remove_others(ctx: RunContext, start: Checkpoint | None) -> None:
    """Checkpoints that nobody goes on from."""
    removed = checkpoints.remove_all_but(start, ctx.outputs)
    if start:
        ctx.reporter.note(f"Going on from the checkpoint of step {start.step}.")
    elif removed:
        ctx.reporter.note(f"Removed what an earlier training left in {ctx.outputs.name}/: {', '.join(removed)}.")


def _prepare(ctx: RunContext, loaded: Loaded, data: Data) -> Prepared | None:
    if ctx.spec.quantization.scheme is Scheme.NONE:
        return None
    prepared = prepare(loaded.model, ctx.spec.quantization, enabled=False)
    require_roundtrip(loaded.model, ctx.spec.quantization.scheme)
    require_effect(loaded.model, _few_tokens(loaded, data))
    if not ctx.spec.quantization.accept_inexact:
        require_served_function(loaded.model, _few_tokens(loaded, data))
    free_codes(loaded.model, frozen=True)  # plain LoRA comes first, which reads none
    ctx.reporter.note(prepared.sentence)
    if note := serving_note(loaded.model, ctx.spec.quantization.scheme):
        ctx.reporter.note(note)
    return prepared


def _few_tokens(loaded: Loaded, data: Data) -> torch.Tensor:
    """[1, tokens] of the data, to try the model on."""
    return torch.tensor([data.train[0].input_ids[:32]], device=loaded.model.device)


def _trainer(ctx: RunContext, loaded: Loaded, data: Data, steps: Plan, phases: Phases) -> SFTTrainer:
    pad_token_id = int(loaded.tokenizer.pad_token_id or 0)
    on_gpu = loaded.model.device.type == "cuda"
    trainer = _PhasedTrainer(
        model=loaded.model,
        args=_arguments(ctx, steps, on_gpu=on_gpu, checkpointed=recomputes_activations(loaded.model, on_gpu=on_gpu)),
        train_dataset=HfDataset.from_dict(
            {"row": range(len(data.train))}
        ),  # trl takes no other kind, and the tokens need not lie in it again
        processing_class=copy.deepcopy(loaded.tokenizer),  # trl gives it a token to pad with, and the shipped one none
        data_collator=lambda items: pad([data.train[item["row"]] for item in items], pad_token_id),
        callbacks=[phases],
    )
    trainer.phases = phases
    lengths = [len(item.input_ids) for item in data.train]
    trainer.row_order = GroupedByLength(lengths, steps.batch, ctx.spec.training.seed)
    trainer.tokens_at_once = steps.micro_batch * max(lengths)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(ctx: RunContext, steps: Plan, *, on_gpu: bool, checkpointed: bool) -> SFTConfig:
    training = ctx.spec.training
    arguments = SFTConfig(
        output_dir=str(ctx.outputs),
        max_steps=steps.steps,
        per_device_train_batch_size=steps.batch,  # _PhasedTrainer cuts it
        learning_rate=float(training.learning_rate),
        max_grad_norm=1.0,
        seed=training.seed,
        bf16=False,  # the weights' own dtype decides: autocast would compute another function than the exported model
        use_cpu=not on_gpu,
        **{_CHECKPOINTING: checkpointed},
        max_length=None,
        router_aux_loss_coef=0.0,  # else trl has a mixture of experts return its router's logits, and the shipped model would too
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
    arguments._n_gpu = min(1, arguments.n_gpu)  # where a machine has several, transformers would split each batch among all of them
    return arguments


class _PhasedTrainer(SFTTrainer):
    """Cuts each step into micro-batches, learns from the teacher in the adapt phase, and stops at the first loss that is not finite.

    Attributes:
        row_order: which rows each step has.
        tokens_at_once: that a forward pass computes at most.
    """

    phases: Phases
    row_order: GroupedByLength
    tokens_at_once: int
    _random_state: list[torch.Tensor]

    def train_from(self, start: Checkpoint | None) -> None:
        """Trains to the end, or until SIGTERM or Ctrl-C has been obeyed; the last completed step is saved."""
        try:
            self.train(resume_from_checkpoint=str(start.folder) if start else None)
        except StepDropped:
            done = self.state.global_step
            _set_random_state(self._random_state)
            if done and not checkpoints.is_complete(checkpoints.folder_of(Path(self.args.output_dir), done)):
                self._save_checkpoint(self.model, trial=None)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _get_train_sampler(self, *_: Any, **__: Any) -> GroupedByLength:
        return self.row_order

    def training_step(self, model: PeftModel, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward passes of a whole optimizer step; the loss of its tokens, on average."""
        self._random_state = _random_state()
        if num_items_in_batch is None:  # of models that do not say that they take it: each micro-batch would count its own tokens alone
            num_items_in_batch = (inputs["labels"][:, 1:] != IGNORED).sum()
        lengths, losses = inputs["attention_mask"].sum(dim=1).tolist(), []
        for rows in micro_batches(lengths, self.tokens_at_once):
            self.phases.drop_step_if_asked()
            part = {name: values[rows, : lengths[rows[-1]]] for name, values in inputs.items()}
            losses.append(super().training_step(model, part, num_items_in_batch))
            self.phases.require_finite(losses[-1], "loss", self.state.global_step + 1)
        return torch.stack(losses).sum()

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The schedule of both phases, over the steps of the plan."""
        steps = self.phases.plan
        if self.lr_scheduler is None:
            self.lr_scheduler = LambdaLR(
                optimizer or self.optimizer,
                lambda step: rate_factor(step, num_training_steps, steps.switch_step, steps.warmup_steps, ADAPT_PEAK),
            )
        return self.lr_scheduler

    def compute_loss(
        self, model: PeftModel, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """trl's own loss; in the adapt phase half of it is the divergence from the teacher."""
        self.phases.count(inputs["attention_mask"])
        teacher = self.phases.teacher
        if teacher is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if return_outputs:
            raise NotImplementedError("the loss with a teacher makes no logits; evaluate.py measures held-out rows")
        taught = teacher_hidden(model, teacher, inputs)
        base = model.get_base_model()
        predicted = predict(base, **inputs)
        tokens = len(predicted.labels) if num_items_in_batch is None else num_items_in_batch
        return summed_loss(output_head(base), predicted, taught, _TEACHER_WEIGHT) / torch.as_tensor(tokens).clamp(min=1)


def _settings_of(model: PreTrainedModel) -> tuple[Any, dict[str, Any]]:
    """What transformers and trl write into a model for their training and the shipped one must not have.

    The tokenizer's special tokens in its generation configuration, and a mixture's switches of the router's loss.
    """
    text = model.config.get_text_config()
    return copy.deepcopy(model.generation_config), {name: getattr(text, name) for name in _ROUTER if hasattr(text, name)}


def _set_settings(model: PreTrainedModel, settings: tuple[Any, dict[str, Any]]) -> None:
    model.generation_config, router = settings
    for name, value in router.items():
        setattr(model.config.get_text_config(), name, value)


def _random_state() -> list[torch.Tensor]:
    """Of the CPU, and of each GPU."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])

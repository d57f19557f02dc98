"""Out of memory in the middle of a training: half the micro-batch, twice the accumulation, the same effective batch, from the last checkpoint.

stages/train.py hands over one attempt at the training. Each attempt begins with the same weights, whatever the one before it left behind.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune_trainer.checkpoints import Checkpoint
from finetune_trainer.context import RunContext
from finetune_trainer.errors import CapacityError
from finetune_trainer.failures import first_line, is_out_of_memory
from finetune_trainer.plan import Plan
from finetune_trainer.qat.prepare import drop_caches, free_codes, set_fake_quantization

Result = TypeVar("Result")

_GIVING_UP = "Out of memory with a micro-batch of a single row ({error}); lower training.maxLength, set model.dtype to bfloat16, or give it more memory"


def shrinking(
    ctx: RunContext,
    plan: Plan,
    start: Checkpoint | None,
    attempt: Callable[[Plan, Checkpoint | None], Result],
    restore: Callable[[], Checkpoint | None],
    needs: Callable[[], str],
) -> Result:
    """Attempts the training until it no longer runs out of memory.

    Args:
        ctx: told of each retry.
        plan: the first attempt's.
        start: the checkpoint that the first attempt goes on from.
        attempt: trains to the end from a checkpoint, or from the weights that `restore` left.
        restore: brings the model back to where the training began, and finds the newest checkpoint.
        needs: what a single row needs, for the sentence that gives up.

    Raises:
        CapacityError: a single row is too much.
    """
    while True:
        try:
            return attempt(plan, start)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            told = first_line(error)
        # Outside of the handler: the traceback held every frame, and with them all that had filled the memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if plan.micro_batch == 1:
            raise CapacityError(f"{_GIVING_UP.format(error=told)}. Estimated: {needs()}.")
        before, plan = plan, plan.halved()
        start = restore()
        ctx.reporter.note(
            f"Out of memory with micro-batches of {before.micro_batch} rows: going on with {plan.micro_batch}, {plan.accumulation} of them a step."
        )


class Start:
    """The weights a training begins with, kept in a file: memory is what may be short."""

    def __init__(self, model: PeftModel, file: Path) -> None:
        self._model, self._file = model, file
        save_file({name: item.detach() for name, item in self._trained()}, file)

    @torch.no_grad()
    def restore(self) -> None:
        """Brings them back, without gradients, codes or fake quantization."""
        self._model.zero_grad(set_to_none=True)
        set_fake_quantization(self._model, enabled=False)
        known = load_file(self._file)
        for name, item in self._trained():
            item.copy_(known[name])
        drop_caches(self._model, frozen=False)
        free_codes(self._model)

    def remove(self) -> None:
        """The training is over."""
        self._file.unlink(missing_ok=True)

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, item) for name, item in self._model.named_parameters() if item.requires_grad]

"""Chooses the micro-batch of a run from the estimate and the memory at hand; refuses what can't fit at a single row.

Called by stages/train.py for this machine and by stages/rehearse.py for the pod that is to come. A resumed run keeps the micro-batch of its
checkpoint, since another one adds up gradients in another order.
"""

from dataclasses import dataclass

import torch
from finetune_api.spec import FineTuneJobSpec
from transformers import PreTrainedConfig

from finetune_trainer import heap
from finetune_trainer.base_model import training_dtype
from finetune_trainer.errors import CapacityError
from finetune_trainer.memory.capacity import gpu_room, process_room, quantity_bytes
from finetune_trainer.memory.dry_run import UntraceableError, empty_model
from finetune_trainer.memory.estimate import PROCESS_BYTES, Estimate, Kind, Lengths, Needed, fits, gigabytes, largest, needed_by
from finetune_trainer.memory.gpus import CONTEXT_BYTES, GPU_BYTES
from finetune_trainer.plan import Plan

NOT_ESTIMATED = "Not checked: whether the training fits into memory, since this model's code can't be traced without its weights."
PLENTY = 2.0  # times the estimate: with holes in the heap, a process grew by 1.8 times at most
WAYS_OUT = "lower training.maxLength, set model.dtype to bfloat16, or give it more memory ({more})"


@dataclass(frozen=True)
class Place:
    """Where a training will run.

    Attributes:
        room: bytes for weights, adapter, optimizer and activations; None where nobody knows.
        name: for the sentence that refuses.
        more: how its memory is raised.
    """

    room: int | None
    on_gpu: bool
    name: str
    more: str


def this_machine() -> Place:
    """The GPU where there is one, else what this process can come to beside what its libraries take."""
    if torch.cuda.is_available():
        return Place(gpu_room(), True, "this machine's GPU", "a GPU with more")
    return Place(process_room() - PROCESS_BYTES, False, "this machine", "resources.memory in a cluster")


def promised_pod(spec: FineTuneJobSpec) -> Place:
    """The pod that the spec asks for, before it exists."""
    wanted = spec.resources
    if not wanted.gpus:
        return _promised_memory(spec)
    known = GPU_BYTES.get(wanted.gpu_type)
    room = None if known is None else known - CONTEXT_BYTES
    return Place(room, True, f"resources.gpuType {wanted.gpu_type}", "a resources.gpuType with more")


def fitted(spec: FineTuneJobSpec, config: PreTrainedConfig, plan: Plan, lengths: Lengths, place: Place) -> tuple[Plan, Estimate | None]:
    """The plan with the largest micro-batch that fits into the place, and what it needs. The same for the same arguments.

    A model that can't be traced is not refused: its plan stays as it is, without an estimate.

    Raises:
        CapacityError: not even one row fits; the sentence has the estimate and three ways out.
    """
    try:
        needed = estimates_of(spec, config, plan, lengths, on_gpu=place.on_gpu)
        if place.room is None:
            return plan, needed(plan.micro_batch, plan.keeps_codes)
        found = largest(plan, needed, place.room)
    except UntraceableError:
        return plan, None
    if found is not None:
        return found
    raise CapacityError(
        f"The training does not fit: {needed(1, False).sentence}, but {place.name} has {gigabytes(max(0, place.room))} for it; "
        f"{WAYS_OUT.format(more=place.more)}."
    )


def hold_to_estimate(needed: Estimate | None, place: Place) -> None:
    """Where memory is not plenty, makes this process take what was estimated and no more, at the price of some speed."""
    if needed and place.room is not None and not place.on_gpu and not fits(int(PLENTY * needed.peak), place.room):
        heap.return_large_blocks()


def estimates_of(spec: FineTuneJobSpec, config: PreTrainedConfig, plan: Plan, lengths: Lengths, *, on_gpu: bool) -> Needed:
    """What the job needs, as a function of the micro-batch's rows.

    Raises:
        UntraceableError: nobody knows, also when it is asked.
    """
    model = empty_model(config, spec, training_dtype(spec.model.dtype, on_gpu=on_gpu))
    return needed_by(model, Kind.of(spec, model, plan, lengths, on_gpu=on_gpu))


def require_host_memory(spec: FineTuneJobSpec, estimate: Estimate) -> None:
    """A pod with a GPU holds the weights in its own memory too: while it loads them, and while the exported model is proved.

    Raises:
        CapacityError: resources.memory is too small for them.
    """
    place = _promised_memory(spec)
    narrower = ", set model.dtype to bfloat16" if spec.model.dtype == "float32" else ""
    if place.room is None or not fits(estimate.weights, place.room):
        raise CapacityError(
            f"The weights alone take {gigabytes(estimate.weights)}, but {place.name} has {gigabytes(max(0, place.room or 0))} for them "
            f"beside the libraries' {gigabytes(PROCESS_BYTES)}; raise resources.memory{narrower} or choose a smaller model."
        )


def _promised_memory(spec: FineTuneJobSpec) -> Place:
    memory = spec.resources.memory
    return Place(quantity_bytes(memory) - PROCESS_BYTES, False, f"a pod with resources.memory {memory}", "resources.memory")

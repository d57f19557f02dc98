"""The `finetune estimate` command: what a job needs, from the model's configuration alone, on this machine and on common GPUs.

Rows are taken to be as long as training.maxLength, since no data is read; preflight knows the real ones.
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from finetune_trainer import base_model, sources
from finetune_trainer.context import RunContext
from finetune_trainer.errors import CapacityError, SpecError
from finetune_trainer.memory import fit
from finetune_trainer.memory.dry_run import UntraceableError
from finetune_trainer.memory.estimate import Estimate, Lengths, largest
from finetune_trainer.memory.fit import Place
from finetune_trainer.memory.gpus import CONTEXT_BYTES, GPU_BYTES
from finetune_trainer.plan import plan


@dataclass(frozen=True)
class Fitted:
    """What fits into one place: the estimate of the largest micro-batch, or None when not even a single row does."""

    name: str
    room: int
    needed: Estimate | None


@dataclass(frozen=True)
class Told:
    """The answer.

    Attributes:
        model: its resolved source.
        parameters: of the base model.
        tokens: of a row.
        one_row: the parts at a micro-batch of one row, by where it runs.
        places: this machine and the GPUs.
    """

    model: str
    parameters: int
    tokens: int
    one_row: dict[str, Estimate]
    places: tuple[Fitted, ...]


def tell(ctx: RunContext, gpu: str | None) -> Told:
    """Estimates for this machine and every GPU of the table, or for one GPU.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError: one sentence each; SpecError also for an unknown GPU.
    """
    if gpu is not None and gpu not in GPU_BYTES:
        raise SpecError(f"--gpu is {gpu}, which is not in the table; known are {', '.join(GPU_BYTES)}.")
    fetched = sources.fetch_model(ctx, weights=False)
    base = base_model.empty_base(fetched.path, trust_remote_code=ctx.spec.model.trust_remote_code)
    gpus = {name: size for name, size in GPU_BYTES.items() if gpu in (None, name)}
    places = [Place(size - CONTEXT_BYTES, True, name, "") for name, size in gpus.items()]
    if gpu is None:
        places.insert(0, replace(fit.this_machine(), name="this machine"))
    tokens = ctx.spec.training.max_length
    one_row: dict[str, Estimate] = {}
    fitted: list[Fitted] = []
    try:
        for on_gpu, name in ((False, "CPU"), (True, "GPU")):
            same = [place for place in places if place.on_gpu is on_gpu]
            if same:
                one_row[name], found = _fit_all(ctx, base.config, same, on_gpu=on_gpu)
                fitted += found
    except UntraceableError as error:
        raise CapacityError(
            f"This model can't be estimated: its code looks at values, which only a run has ({error}); "
            "give it a run, which halves the micro-batch where memory runs out."
        ) from error
    return Told(fetched.resolved, base.num_parameters(), tokens, one_row, tuple(fitted))


def _fit_all(ctx: RunContext, config: PreTrainedConfig, places: list[Place], *, on_gpu: bool) -> tuple[Estimate, list[Fitted]]:
    """The estimate of one row, and the largest micro-batch for each place."""
    batch, tokens = ctx.spec.training.batch_size, ctx.spec.training.max_length
    # As many rows as make a step of each percent, so that each phase has one: how often they are repeated changes nothing.
    steps = plan(ctx.spec, 100 * batch, tokens, on_gpu=on_gpu)
    evaluation = ctx.spec.dataset.evaluation
    lengths = Lengths(tokens, tokens if evaluation.percent or evaluation.source else 0)
    needed = fit.estimates_of(ctx.spec, config, steps, lengths, on_gpu=on_gpu)
    found = []
    for place in places:
        room = max(0, place.room or 0)
        _, estimate = largest(steps, needed, room) or (None, None)
        found.append(Fitted(place.name, room, estimate))
    return needed(1, False), found

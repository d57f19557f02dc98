"""Out of memory in the midst of a training: half the micro-batch, twice the accumulation, the same effective batch, from the last checkpoint.

The next attempt runs in a fresh process (cli.py starts it), and finds here how the one before it ended; stages/train.py calls the rest. In the
same process the memory would not come back: what a library's modules, an allocator's arenas or a GPU's context hold on to counts against the next.
"""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from finetune_api import names
from finetune_api.job import JobDescription

from finetune_trainer import atomic
from finetune_trainer.context import RunContext
from finetune_trainer.errors import CapacityError
from finetune_trainer.plan import Plan

FILE = "out-of-memory.json"


class OutOfMemory(CapacityError):  # noqa: N818 the next attempt goes on with less
    """The training ran out of memory, and a smaller micro-batch is left to try: another run of the same job does."""


def give_up_or_shrink(ctx: RunContext, plan: Plan, told: str, needs: str) -> CapacityError:
    """How an attempt ends that ran out of memory; leaves the smaller plan for the next one where there is a smaller one.

    Args:
        plan: what was too much.
        told: the allocator's own words.
        needs: what the plan was estimated to need.
    """
    smaller = plan.halved()
    if (smaller.micro_batch, smaller.keeps_codes) == (plan.micro_batch, plan.keeps_codes):
        forget(ctx)
        return CapacityError(
            f"Out of memory with a micro-batch of a single row ({told}); lower training.maxLength, set model.dtype to bfloat16, "
            f"or give it more memory. Estimated: {needs}."
        )
    atomic.write_text(ctx.workdir / FILE, json.dumps({"trainDigest": ctx.job.train_digest, **smaller.cut}))
    sentence = (
        f"Out of memory with micro-batches of {plan.micro_batch} rows ({told}): "
        f"going on with {smaller.micro_batch}, at most {smaller.accumulation} of them a step, and nothing kept for speed."
    )
    ctx.reporter.note(sentence)
    return OutOfMemory(sentence)


def remembered(ctx: RunContext) -> Mapping[str, int | bool]:
    """How the attempt before this one, which ran out of memory, left the batch to be cut; empty where none did."""
    try:
        known = dict(json.loads((ctx.workdir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
    return known if known.pop("trainDigest", None) == ctx.job.train_digest else {}


def forget(ctx: RunContext) -> None:
    """This training is over: another one may fit with more rows at once."""
    (ctx.workdir / FILE).unlink(missing_ok=True)


def start_anew(job: JobDescription, workdir: Path, cache: Path) -> NoReturn:
    """Puts a fresh run of the same job in this process's place, under the same process id, limits and standard streams.

    Raises:
        OSError: the program can't be started.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the folder's own
            os.set_inheritable(int(name), int(name) <= 2)  # a GPU's memory is given back when its device file is closed
    command = [sys.executable, "-P", "-m", "finetune_trainer.cli", "run", "--workdir", str(workdir), "--cache", str(cache)]
    os.execve(sys.executable, command, os.environ | {names.ENV_JOB: job.to_json()})  # noqa: S606 our own words

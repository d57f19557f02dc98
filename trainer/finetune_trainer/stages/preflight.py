"""Preflight: whatever can be refused is refused here, the cheapest first, before torch is loaded and long before anything trains."""

import os
import shutil
from pathlib import Path

from finetune_trainer import dataset, destinations, sources
from finetune_trainer.context import RunContext
from finetune_trainer.destinations import s3
from finetune_trainer.errors import CapacityError
from finetune_trainer.mirror import Mirror

_LEAST_FREE_BYTES = 64 * 2**20


def run(ctx: RunContext) -> None:
    """Checks folders, sources, destinations and every row of the data.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError: one sentence each.
    """
    for folder in (ctx.workdir, ctx.cache):
        require_writable(folder)
    sources.check(ctx)
    destinations.check_write(ctx)
    check_mirror(ctx)
    check_rows(ctx)


def require_writable(folder: Path) -> None:
    """The folder exists or can be made, takes a file, and its disk is not full.

    Raises:
        CapacityError: it does not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise CapacityError(f"{folder} is not writable ({error.strerror}); choose another --workdir or mend its permissions.") from error
    free = shutil.disk_usage(folder).free
    if free < _LEAST_FREE_BYTES:
        raise CapacityError(
            f"{folder} has {free // 2**20} MiB left on its disk, but a run needs far more; free some space or choose another --workdir."
        )


def check_mirror(ctx: RunContext) -> None:
    """Checkpoints can be mirrored; says so where nothing outlasts the pod.

    Raises:
        AccessError, InfrastructureError, SpecError: one sentence each.
    """
    mirror = Mirror.of(ctx)
    if mirror is not None:
        s3.check_write(ctx, mirror.where)
        mirror.check_listing()
    elif ctx.job.in_cluster and not ctx.spec.storage.workspace.persistent_volume_claim:
        ctx.reporter.note(
            "Checkpoints end with this pod: without an s3 destination, set storage.checkpoints.uri or storage.workspace.persistentVolumeClaim."
        )


def check_rows(ctx: RunContext) -> None:
    """Every row of the dataset and of the held-out data is well formed; the tokenizer's part comes later.

    Raises:
        DataError: names the line and the column.
    """
    spec = ctx.spec.dataset
    dataset.read_rows(sources.fetch_dataset(ctx).path, spec.source, spec.format)
    held_out = sources.fetch_evaluation(ctx)
    if held_out is not None:
        dataset.read_rows(held_out.path, spec.evaluation.source, spec.format)

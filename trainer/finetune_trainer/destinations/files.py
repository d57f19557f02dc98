"""file:// destinations, on a laptop: a complete copy is made beside the destination and takes its place by a rename.

Only a folder that is absent, empty or an earlier publication is ever replaced, so that a mistyped path can't cost anyone their files.
"""

import os
import shutil
from pathlib import Path

from finetune_api.names import MANIFEST

from finetune_trainer import atomic
from finetune_trainer.context import RunContext
from finetune_trainer.destinations.manifest import Publication, named_files
from finetune_trainer.errors import AccessError, SpecError
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.s3_errors import disk_error


def check_write(ctx: RunContext, where: Location) -> None:
    """The folder can be made or replaced; nothing is left behind.

    Raises:
        AccessError: not writable. SpecError: in a cluster, inside the working directory, or somebody else's folder.
    """
    target = _target(ctx, where)
    ground = next(folder for folder in (target, *target.parents) if folder.exists())
    if not os.access(ground, os.W_OK | os.X_OK) or (ground is target and not os.access(target.parent, os.W_OK | os.X_OK)):
        raise AccessError(f"{where.field}: {ground} is not writable by this user; change its permissions or choose another folder.")


def publish(ctx: RunContext, where: Location, publication: Publication) -> str:
    """Puts a complete copy in the destination's place.

    Returns:
        The destination's URI.

    Raises:
        AccessError, CapacityError, InfrastructureError, SpecError
    """
    target = _target(ctx, where)
    try:
        if not _stands(target, publication):
            _replace(target, publication)
    except OSError as error:
        raise disk_error(error, where) from error
    return where.uri


def _stands(target: Path, publication: Publication) -> bool:
    manifest = target / MANIFEST
    if not manifest.is_file() or manifest.read_bytes() != publication.manifest:
        return False
    placed = ((target / item.path, item.bytes) for item in publication.files)
    return all(path.is_file() and path.stat().st_size == size for path, size in placed)


def _replace(target: Path, publication: Publication) -> None:
    with atomic.folder(target) as folder:
        for item in publication.files:
            path = folder / item.path
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(item.local, path)
        (folder / MANIFEST).write_bytes(publication.manifest)


def _target(ctx: RunContext, where: Location) -> Path:
    if ctx.job.in_cluster:
        raise SpecError(f"{where.field} is {where.uri!r}, but file:// works only on a laptop; use s3:// or hf://.")
    target = Path(where.rest).resolve()
    workdir = ctx.workdir.resolve()
    if target.is_relative_to(workdir) or workdir.is_relative_to(target):
        raise SpecError(f"{where.field}: {target} and the working directory {workdir} lie in each other; choose a folder outside.")
    if target.exists() and not _may_replace(target):
        raise SpecError(f"{where.field}: {target} exists and is not an earlier publication; choose a new folder or empty this one.")
    return target


def _may_replace(target: Path) -> bool:
    """Every file in it is named by its manifest (or there is none)."""
    if not target.is_dir():
        return False
    present = {str(path.relative_to(target)) for path in target.rglob("*") if not path.is_dir()}
    manifest = target / MANIFEST
    return present <= ({MANIFEST} | named_files(manifest.read_bytes()) if manifest.is_file() else set())

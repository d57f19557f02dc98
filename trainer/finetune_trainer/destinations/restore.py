"""Takes up what an earlier run of the same training has published to S3, so that another destination or another pod costs no optimizer step.

Called by pipeline.py where the working directory holds no finished training. On the Hub a model lies in other folders and is not taken up.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_api import names

from finetune_trainer import atomic
from finetune_trainer.context import RunContext
from finetune_trainer.destinations.layout import folders
from finetune_trainer.destinations.manifest import PublishedFile, published_files
from finetune_trainer.destinations.s3 import Place, open_place
from finetune_trainer.errors import AccessError, DataError
from finetune_trainer.sources.location import Location, destinations
from finetune_trainer.sources.s3_errors import s3_errors

_FOLDERS = (names.ADAPTER, names.QUANTIZED, names.PROOF)


def restore(ctx: RunContext, identities: Callable[[], dict[str, str]]) -> bool:
    """Fills the working directory from the first s3 destination that holds this training, each file as its manifest says.

    Args:
        identities: of the sources as they are now; what was trained from others is left where it lies.

    Returns:
        Whether there was one.

    Raises:
        CapacityError, InfrastructureError: one sentence each.
    """
    atomic.remove_leftovers(_fetched(ctx))  # of a download that was killed; this time there may be nothing to take up
    shutil.rmtree(_fetched(ctx), ignore_errors=True)
    return any(_restore_from(ctx, where, identities) for where in destinations(ctx.job) if where.scheme == "s3")


def _fetched(ctx: RunContext) -> Path:
    return ctx.workdir / "restored"


def _restore_from(ctx: RunContext, where: Location, identities: Callable[[], dict[str, str]]) -> bool:
    with s3_errors(where):
        place = open_place(ctx, where)
        files = published_files(place.read(names.MANIFEST) or b"", ctx.job.train_digest)
        if not _is_whole(ctx, files) or _made_from(place) != identities():
            return False
    fetched = _fetched(ctx)
    try:
        with s3_errors(where):
            _download(place, files, fetched)
    except (AccessError, DataError) as error:  # what its manifest names is gone, or lies in an archive
        ctx.reporter.note(f"{where.uri} is not taken up: {error}")
        return False
    differing = [path for path, digest in files.items() if PublishedFile.of(path, fetched / path).sha256 != digest]
    if differing:
        ctx.reporter.note(f"{where.uri} is not taken up: {differing[0]} is not what its manifest says.")
    else:
        ctx.reporter.note(f"This training is published at {where.uri} already, and taken up from there.")
        _put_in_place(ctx, fetched)
    shutil.rmtree(fetched)
    return not differing


def _is_whole(ctx: RunContext, files: dict[str, str]) -> bool:
    """Whether everything that this job ships is there."""
    wanted = folders(ctx.spec.wanted_artifacts, hub=False).values()
    return names.REPORT in files and all(any(path.startswith(f"{folder}/") for path in files) for folder in wanted)


def _made_from(place: Place) -> Any:
    try:
        return json.loads(place.read(names.REPORT) or b"{}").get("identities")
    except (ValueError, AttributeError):
        return None


def _download(place: Place, files: dict[str, str], target: Path) -> None:
    with atomic.folder(target) as folder:
        for path in files:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            place.client.download_file(place.bucket, place.key(path), str(folder / path))


def _put_in_place(ctx: RunContext, fetched: Path) -> None:
    """The report last: it is what says that all of it is done."""
    for name in (*_FOLDERS, names.REPORT):
        target = ctx.workdir / name
        if (fetched / name).exists():
            shutil.rmtree(target, ignore_errors=True)
            (fetched / name).rename(target)

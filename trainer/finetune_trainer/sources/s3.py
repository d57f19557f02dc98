"""s3:// sources on any endpoint: one object (a dataset) or every model file under a prefix, downloaded once into the cache.

The cache is keyed by content (ETags), each download becomes visible by one rename, and a killed one is continued file by file.
Called by sources/__init__.py.
"""

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer import locks
from finetune_trainer.context import RunContext
from finetune_trainer.errors import DataError, InfrastructureError
from finetune_trainer.sources.credentials import s3_client
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.model_files import require_model, wanted_files
from finetune_trainer.sources.s3_errors import error_code, s3_errors


@dataclass(frozen=True)
class Object:
    """One object of a bucket, as it was when it was looked up."""

    key: str
    etag: str
    size: int
    version: str = ""


def check_file(ctx: RunContext, where: Location) -> None:
    """The object exists, opens and is not empty.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError
    """
    _find_object(_client(ctx, where, patient=False), where)


def check_model(ctx: RunContext, where: Location) -> None:
    """The prefix holds a model, and its config.json opens.

    Raises:
        AccessError, DataError, InfrastructureError, SpecError
    """
    client = _client(ctx, where, patient=False)
    objects = _find_model(client, where, trust_remote_code=ctx.spec.model.trust_remote_code)
    with s3_errors(where):
        client.get_object(Bucket=where.authority, Key=objects["config.json"].key)["Body"].close()


def fetch_file(ctx: RunContext, where: Location) -> tuple[Path, str, str]:
    """The object as a file of the cache, its URI with version or ETag, and the ETag alone.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError
    """
    client = _client(ctx, where)
    found = _find_object(client, where)
    folder = _download(client, where, {Path(where.path).name: found}, ctx)
    pinned = f"versionId={found.version}" if found.version else f"etag={found.etag}"
    return folder / Path(where.path).name, f"{where.uri}?{pinned}", found.etag


def fetch_model(ctx: RunContext, where: Location, *, weights: bool) -> tuple[Path, str, str]:
    """The model's folder in the cache (without `weights` one of its small files), the prefix with a digest of all its ETags, and one that knows no address.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError
    """
    client = _client(ctx, where)
    objects = _find_model(client, where, trust_remote_code=ctx.spec.model.trust_remote_code)
    wanted = wanted_files(objects, trust_remote_code=ctx.spec.model.trust_remote_code, weights=weights)
    folder = _download(client, where, {name: objects[name] for name in wanted}, ctx)
    lines = [f"{name} {item.etag} {item.size}\n" for name, item in sorted(objects.items())]
    identity = hashlib.sha256("".join(lines).encode()).hexdigest()
    return folder, f"{where.uri}?etags={content_key(where, objects.values())[:16]}", identity


def content_key(where: Location, objects: Iterable[Object]) -> str:
    """A digest that changes when any object's content does, and differs between servers."""
    lines = [f"{item.key} {item.etag} {item.size}" for item in sorted(objects, key=lambda item: item.key)]
    return hashlib.sha256("\n".join([where.endpoint, where.authority, *lines]).encode()).hexdigest()


def _client(ctx: RunContext, where: Location, *, patient: bool = True) -> Any:
    with s3_errors(where):
        return s3_client(ctx, where.role, where.endpoint, patient=patient)


def _find_object(client: Any, where: Location) -> Object:
    """Looks an object up by reading its first byte: unlike HEAD, the answer says whether the bucket or the key is missing."""
    if not where.path:
        raise DataError(f"{where.field}: {where.uri} names a bucket, but a dataset is one object; add its key.")
    with s3_errors(where):
        try:
            answer = client.get_object(Bucket=where.authority, Key=where.path, Range="bytes=0-0")
        except client.exceptions.ClientError as error:
            if error_code(error) == "InvalidRange":
                raise DataError(
                    f"{where.field}: {where.uri} is empty, but a dataset needs at least one row; check what wrote it."
                ) from error
            raise
        answer["Body"].close()
    size = int(answer.get("ContentRange", "/0").rpartition("/")[2])
    version = answer.get("VersionId", "")
    return Object(where.path, answer["ETag"].strip('"'), size, "" if version == "null" else version)


def _find_model(client: Any, where: Location, *, trust_remote_code: bool) -> dict[str, Object]:
    """The model's objects by name relative to the prefix."""
    prefix = f"{where.path}/" if where.path else ""
    with s3_errors(where):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=where.authority, Prefix=prefix)
        listed = [item for page in pages for item in page.get("Contents", ())]
    named = {item["Key"][len(prefix) :]: Object(item["Key"], item["ETag"].strip('"'), item["Size"]) for item in listed}
    if not named:
        raise DataError(f"{where.field}: nothing lies under {where.uri}; correct the prefix.")
    require_model(named, f"{where.field}: {where.uri}")
    return {name: named[name] for name in wanted_files(named, trust_remote_code=trust_remote_code)}


def _download(client: Any, where: Location, objects: dict[str, Object], ctx: RunContext) -> Path:
    """The cache's folder with these objects under these names; what an earlier attempt has got is kept."""
    target = ctx.cache / "s3" / content_key(where, objects.values())[:32]
    with s3_errors(where):
        return locks.make_once(target, lambda folder: _fill(client, where, objects, folder), ctx.reporter.note)


def _fill(client: Any, where: Location, objects: dict[str, Object], folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and str(path.relative_to(folder)) not in objects:
            path.unlink()  # of a download that was killed: boto3 writes beside the file
    for name, item in objects.items():
        _download_one(client, where, item, folder / name)


def _download_one(client: Any, where: Location, item: Object, path: Path) -> None:
    if path.is_file() and path.stat().st_size == item.size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    client.download_file(where.authority, item.key, str(path))  # writes beside it and renames
    # Not by its version: reading one by name takes s3:GetObjectVersion, which who may read the object need not have.
    if client.head_object(Bucket=where.authority, Key=item.key)["ETag"].strip('"') != item.etag:
        shutil.rmtree(path.parent, ignore_errors=True)
        raise InfrastructureError(f"{where.field}: {item.key} changed while it was downloaded; start the run again.")

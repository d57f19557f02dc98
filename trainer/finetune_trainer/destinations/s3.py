"""s3:// destinations on any endpoint. The server checks the SHA256 of every object or part; the manifest goes last.

Publishing is idempotent (an object whose recorded sha256 is right is skipped) and resumes a half-sent file at its missing parts. While files
that an older manifest names are replaced, there is no manifest: a reader sees the old model, none, or the new one, never a mixture.
"""

from dataclasses import dataclass
from typing import Any

from finetune_api.names import MANIFEST

from finetune_trainer.context import RunContext
from finetune_trainer.destinations.manifest import Publication, PublishedFile, named_files
from finetune_trainer.destinations.s3_upload import put_bytes, upload
from finetune_trainer.sources.credentials import s3_client
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.s3_errors import error_code, s3_errors

REPLACED = f"{MANIFEST}.replaced"  # the older manifest while its files are being replaced


@dataclass(frozen=True)
class Place:
    """A bucket and a prefix, and the client that opens them."""

    client: Any
    bucket: str
    prefix: str

    def key(self, path: str) -> str:
        """The key of a path below the prefix."""
        return f"{self.prefix}/{path}" if self.prefix else path

    def read(self, path: str) -> bytes | None:
        """A small object's content, or None where there is none, or none that may be read."""
        try:
            return self.client.get_object(Bucket=self.bucket, Key=self.key(path))["Body"].read()
        except self.client.exceptions.ClientError as error:
            if error_code(error) in ("NoSuchKey", "404", "AccessDenied"):  # without the right to list, S3 calls a missing key denied
                return None
            raise

    def holds(self, item: PublishedFile) -> bool:
        """Whether an object of the file's size is there, on a server that keeps no checksum which could say more."""
        try:
            found = self.client.head_object(Bucket=self.bucket, Key=self.key(item.path), ChecksumMode="ENABLED")
            return bool(found["ContentLength"] == item.bytes and not any(name.startswith("Checksum") for name in found))
        except self.client.exceptions.ClientError as error:
            if error_code(error) in ("403", "404"):
                return False
            raise

    def delete(self, path: str) -> None:
        """Removes an object; nothing when there is none."""
        self.client.delete_object(Bucket=self.bucket, Key=self.key(path))


def check_write(ctx: RunContext, where: Location) -> None:
    """Proves write access by starting a multipart upload and taking it back: nothing is left, nothing is overwritten.

    Raises:
        AccessError, InfrastructureError, SpecError
    """
    with s3_errors(where):
        place = open_place(ctx, where, patient=False)
        started = place.client.create_multipart_upload(Bucket=place.bucket, Key=place.key(MANIFEST))
        place.client.abort_multipart_upload(Bucket=place.bucket, Key=place.key(MANIFEST), UploadId=started["UploadId"])


def publish(ctx: RunContext, where: Location, publication: Publication) -> str:
    """Uploads what is not there yet, then the manifest, then removes what only an older manifest named.

    Returns:
        The destination's URI, without a slash at its end.

    Raises:
        AccessError, InfrastructureError, SpecError
    """
    with s3_errors(where):
        place = open_place(ctx, where)
        stands = place.read(MANIFEST) == publication.manifest
        if not stands:
            _withdraw(place)
        for item in publication.files:
            if not (stands and place.holds(item)):  # what somebody has deleted or replaced since is put back
                upload(place.client, place.bucket, place.key(item.path), item)
        if not stands:
            put_bytes(place.client, place.bucket, place.key(MANIFEST), publication.manifest)
        _remove_stale(place, frozenset(item.path for item in publication.files))
    return where.uri.rstrip("/")


def _withdraw(place: Place) -> None:
    """Takes an older manifest away before its files change, and keeps it aside for `_remove_stale`."""
    older = place.read(MANIFEST)
    if older is not None:
        _remove_stale(place, named_files(older))  # what a publication that was killed at its very end has left
        put_bytes(place.client, place.bucket, place.key(REPLACED), older)
        place.delete(MANIFEST)


def _remove_stale(place: Place, current: frozenset[str]) -> None:
    """A shard that only the older model had would be loaded with the new one."""
    older = place.read(REPLACED)
    if older is None:
        return
    for path in sorted(named_files(older) - current - {MANIFEST}):
        place.delete(path)
    place.delete(REPLACED)


def open_place(ctx: RunContext, where: Location, *, patient: bool = True) -> Place:
    """The destination, opened with its role's credentials."""
    return Place(s3_client(ctx, where.role, where.endpoint, patient=patient), where.authority, where.path)

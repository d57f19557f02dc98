"""s3:// destinations on any endpoint. The server checks the SHA256 of every object or part; the manifest goes last.

Publishing is idempotent (an object whose recorded sha256 is right is skipped) and resumes a half-sent file at its missing parts. While files
that an older manifest names are replaced, there is no manifest: a reader sees the old model, none, or the new one, never a mixture. What may
lie there of older or broken-off publications is written down before the first upload, so that the one that finishes can remove it.
"""

from dataclasses import dataclass
from typing import Any

from finetune_api.names import MANIFEST

from finetune_trainer.context import RunContext
from finetune_trainer.destinations.manifest import Publication, PublishedFile, named_files, naming
from finetune_trainer.destinations.s3_upload import abort_uploads, put_bytes, upload
from finetune_trainer.sources.credentials import s3_client
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.s3_errors import error_code, s3_errors

UNFINISHED = f"{MANIFEST}.unfinished"  # names what publications of ours may have put here, until nothing of it is stale


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

    def head(self, path: str) -> dict[str, Any] | None:
        """What the server says of an object, or None where there is none, or none that may be looked at."""
        try:
            return dict(self.client.head_object(Bucket=self.bucket, Key=self.key(path), ChecksumMode="ENABLED"))
        except self.client.exceptions.ClientError as error:
            if error_code(error) in ("403", "404"):
                return None
            raise

    def holds(self, item: PublishedFile) -> bool:
        """Whether an object of the file's size is there, on a server that keeps no checksum which could say more."""
        found = self.head(item.path)
        return found is not None and found["ContentLength"] == item.bytes and not any(name.startswith("Checksum") for name in found)

    def delete(self, path: str) -> None:
        """Removes an object; nothing when there is none."""
        self.client.delete_object(Bucket=self.bucket, Key=self.key(path))

    def withdraw(self, path: str) -> None:
        """Removes a list of names, or leaves one of nothing where these keys may write and not delete."""
        try:
            self.delete(path)
        except self.client.exceptions.ClientError as error:
            if error_code(error) != "AccessDenied":
                raise
            put_bytes(self.client, self.bucket, self.key(path), naming(()))


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
    """Uploads what is not there yet, then the manifest, then removes what only older or broken-off publications have put there.

    Returns:
        The destination's URI, without a slash at its end.

    Raises:
        AccessError, InfrastructureError, SpecError
    """
    with s3_errors(where):
        place = open_place(ctx, where)
        older = place.read(MANIFEST)
        stands = older == publication.manifest
        if not stands:
            _write_down(place, publication.paths, older)
            # Whether one was read or not: without the right to read, one may stand there, and its files are about to change.
            place.withdraw(MANIFEST)
        for item in publication.files:
            if not (stands and place.holds(item)):  # what somebody has deleted or replaced since is put back
                upload(place.client, place.bucket, place.key(item.path), item)
        if not stands:
            put_bytes(place.client, place.bucket, place.key(MANIFEST), publication.manifest)
        _remove_stale(place, publication.paths)
    return where.uri.rstrip("/")


def _write_down(place: Place, paths: frozenset[str], older: bytes | None) -> None:
    """Names what a publication that breaks off now may leave, besides what older ones have left.

    A file that lies there and that nothing of ours names is somebody else's, and never named: it is not ours to remove.
    """
    noted = named_files(place.read(UNFINISHED) or b"")
    ours = noted | named_files(older or b"")
    names = ours | {path for path in paths - ours if place.head(path) is None}
    if names != noted:
        put_bytes(place.client, place.bucket, place.key(UNFINISHED), naming(names))


def _remove_stale(place: Place, current: frozenset[str]) -> None:
    """A shard that only another model had would be loaded with this one."""
    noted = place.read(UNFINISHED)
    if noted is None:
        return
    stale = named_files(noted) - current - {MANIFEST}
    for path in sorted(stale):
        place.delete(path)
    dead = {place.key(path) for path in stale | current}  # everything current is whole
    abort_uploads(place.client, place.bucket, place.key(""), dead.__contains__)
    place.withdraw(UNFINISHED)


def open_place(ctx: RunContext, where: Location, *, patient: bool = True) -> Place:
    """The destination, opened with its role's credentials."""
    return Place(s3_client(ctx, where.role, where.endpoint, patient=patient), where.authority, where.path)

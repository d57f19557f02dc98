"""One file to one S3 object, checked by the server and resumable. Used by destinations/s3.py and mirror.py; raises what boto3 raises.

Small files are one PUT with the file's SHA256. Large ones are multipart uploads with a SHA256 per part; parts that an interrupted attempt
has left on the server are kept when their checksums are right, so a killed upload continues; what nobody goes on with is ended. Whether an object is there already is decided
by the checksum that the server verified, never by what someone wrote into its metadata.
"""

import base64
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from finetune_trainer.destinations.manifest import PublishedFile
from finetune_trainer.sources.s3_errors import error_code

MIB = 1024 * 1024
SINGLE_PUT_LIMIT = 64 * MIB
PART_BYTES = 32 * MIB
MOST_PARTS = 10_000
PARALLEL_PARTS = 4  # each holds one part in memory


def put_bytes(client: Any, bucket: str, key: str, content: bytes) -> None:
    """One small object; the server refuses it when the bytes that arrive have another SHA256."""
    client.put_object(Bucket=bucket, Key=key, Body=content, ChecksumSHA256=_encoded(hashlib.sha256(content).digest()))


def upload(client: Any, bucket: str, key: str, item: PublishedFile) -> None:
    """Uploads a file, unless the server has an object with the same SHA256 there."""
    whole = item.bytes <= SINGLE_PUT_LIMIT
    checksum = _encoded(bytes.fromhex(item.sha256)) if whole else _composite_checksum(item)
    if _checksum_on_server(client, bucket, key) == checksum:
        return
    if whole:
        with item.local.open("rb") as body:
            client.put_object(Bucket=bucket, Key=key, Body=body, ChecksumSHA256=checksum)
    else:
        _put_in_parts(client, bucket, key, item)


def abort_uploads(client: Any, bucket: str, prefix: str, is_dead: Callable[[str], bool]) -> None:
    """Ends the half-sent uploads below a prefix whose key is one that nobody goes on with: no listing of objects shows them, and all are paid for.

    What may not be listed or ended stays: nothing that is read depends on it.
    """
    for item in _unfinished_uploads(client, bucket, prefix):
        if is_dead(item["Key"]):
            _abort(client, bucket, item)


def part_bytes(size: int) -> int:
    """Bytes per part: 32 MiB, or more where 10,000 parts would not hold the file. Depends on the size alone, so that a resume cuts alike."""
    return max(PART_BYTES, -(-size // MOST_PARTS))


def _encoded(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _parts(item: PublishedFile) -> Iterator[int]:
    return iter(range(1, -(-item.bytes // part_bytes(item.bytes)) + 1))


def _read_part(item: PublishedFile, number: int) -> bytes:
    size = part_bytes(item.bytes)
    with item.local.open("rb") as stream:
        stream.seek((number - 1) * size)
        return stream.read(size)


def _composite_checksum(item: PublishedFile) -> str:
    """What S3 reports for a multipart object: the SHA256 over the parts' SHA256s, and their number."""
    digests = [hashlib.sha256(_read_part(item, number)).digest() for number in _parts(item)]
    return f"{_encoded(hashlib.sha256(b''.join(digests)).digest())}-{len(digests)}"


def _checksum_on_server(client: Any, bucket: str, key: str) -> str | None:
    """The object's verified SHA256; None where there is no object, no checksum, or no right to look."""
    try:
        return client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED").get("ChecksumSHA256")
    except client.exceptions.ClientError as error:
        if error_code(error) in ("403", "404"):
            return None
        raise


def _put_in_parts(client: Any, bucket: str, key: str, item: PublishedFile) -> None:
    found = [item for item in _unfinished_uploads(client, bucket, key) if item["Key"] == key]
    upload_id = _latest(found)
    kept = _parts_on_server(client, bucket, key, upload_id) if upload_id else {}
    upload_id = upload_id or client.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="SHA256")["UploadId"]

    def send(number: int) -> dict[str, Any]:
        content = _read_part(item, number)
        checksum = _encoded(hashlib.sha256(content).digest())
        if number in kept and kept[number]["ChecksumSHA256"] == checksum:
            return kept[number]
        named = {"Bucket": bucket, "Key": key, "UploadId": upload_id, "PartNumber": number}
        sent = client.upload_part(**named, Body=content, ChecksumSHA256=checksum)
        return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksum}

    with ThreadPoolExecutor(PARALLEL_PARTS) as pool:
        parts = list(pool.map(send, _parts(item)))
    client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts})
    for item in found:
        if item["UploadId"] != upload_id:
            _abort(client, bucket, item)


def _unfinished_uploads(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    """What interrupted attempts have left half sent below a prefix; nothing where it may not be looked up."""
    try:
        pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
        return [item for page in pages for item in page.get("Uploads", ())]
    except client.exceptions.ClientError:
        return []


def _latest(uploads: list[dict[str, Any]]) -> str | None:
    """The latest upload that can be gone on with."""
    ours = [item for item in uploads if item.get("ChecksumAlgorithm") == "SHA256"]
    return max(ours, key=lambda item: item["Initiated"])["UploadId"] if ours else None


def _abort(client: Any, bucket: str, unfinished: dict[str, Any]) -> None:
    with suppress(client.exceptions.ClientError):  # another run may have ended it already, or these keys may not
        client.abort_multipart_upload(Bucket=bucket, Key=unfinished["Key"], UploadId=unfinished["UploadId"])


def _parts_on_server(client: Any, bucket: str, key: str, upload_id: str) -> dict[int, dict[str, Any]]:
    pages = client.get_paginator("list_parts").paginate(Bucket=bucket, Key=key, UploadId=upload_id)
    fields = ("PartNumber", "ETag", "ChecksumSHA256")
    listed = [part for page in pages for part in page.get("Parts", ())]
    return {part["PartNumber"]: {name: part[name] for name in fields} for part in listed if "ChecksumSHA256" in part}

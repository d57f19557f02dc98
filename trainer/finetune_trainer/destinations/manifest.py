"""The manifest of one publication: which files belong together, their sha256, and what they were made from. Pure, besides hashing files.

It is written last, so a reader who sees it can check and trust everything it names. The same run gives the same bytes, so that publishing
twice is nothing. Called by destinations/__init__.py; read by each destination.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.job import JobDescription

FORMAT_VERSION = 1
_REPORTED = ("sources", "versions", "seed", "losses", "qat", "proof")


@dataclass(frozen=True)
class PublishedFile:
    """One file: its path at the destination (with forward slashes), where it lies here, its sha256 in hex and its size in bytes."""

    path: str
    local: Path
    sha256: str
    bytes: int

    @classmethod
    def of(cls, path: str, local: Path) -> "PublishedFile":
        """Describes a file that lies here; reads it once."""
        with local.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(path, local, digest, local.stat().st_size)


@dataclass(frozen=True)
class Publication:
    """Everything that goes to one destination, and the manifest's own bytes."""

    files: tuple[PublishedFile, ...]
    manifest: bytes

    @property
    def digest(self) -> str:
        """sha256 of the manifest: one name for the whole content."""
        return f"sha256:{hashlib.sha256(self.manifest).hexdigest()}"

    @property
    def paths(self) -> frozenset[str]:
        """Where the files lie at the destination; the manifest is not among them."""
        return frozenset(item.path for item in self.files)

    def bytes_under(self, folder: str) -> int:
        """Bytes of the files under a folder of the destination."""
        return sum(item.bytes for item in self.files if _is_under(item.path, folder))


def publication(job: JobDescription, report: dict[str, Any], layout: dict[str, Path]) -> Publication:
    """Hashes the files of a layout (path at the destination -> local file) and writes their manifest."""
    files = tuple(PublishedFile.of(path, layout[path]) for path in sorted(layout))
    return Publication(files, manifest_bytes(job, report, files))


def manifest_bytes(job: JobDescription, report: dict[str, Any], files: tuple[PublishedFile, ...]) -> bytes:
    """The manifest as canonical JSON; no time or host in it, so equal inputs give equal bytes."""
    document = {
        "formatVersion": FORMAT_VERSION,
        "trainDigest": job.train_digest,
        "runDigest": job.run_digest,
        **{name: report[name] for name in _REPORTED if name in report},
        "files": [{"path": item.path, "sha256": item.sha256, "bytes": item.bytes} for item in files],
    }
    return (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def named_files(manifest: bytes) -> frozenset[str]:
    """The safe relative paths that a manifest names; empty for anything that is not a manifest of ours (it comes from outside)."""
    try:
        paths = [item["path"] for item in json.loads(manifest)["files"]]
    except (ValueError, KeyError, TypeError):
        return frozenset()
    return frozenset(path for path in paths if isinstance(path, str) and _is_safe(path))


def naming(paths: Iterable[str]) -> bytes:
    """What `named_files` reads as these paths, and what is no manifest of any training."""
    return json.dumps({"files": [{"path": path} for path in sorted(paths)]}, indent=2).encode()


def published_files(manifest: bytes, train_digest: str) -> dict[str, str]:
    """sha256 by path, of a manifest of this training; empty for another one, and for anything that is not a manifest of ours."""
    try:
        document = json.loads(manifest)
        digests = {item["path"]: str(item["sha256"]) for item in document["files"]}
        same = document["trainDigest"] == train_digest
    except (ValueError, KeyError, TypeError):
        return {}
    return {path: digests[path] for path in sorted(named_files(manifest))} if same else {}


def _is_safe(path: str) -> bool:
    pure = PurePosixPath(path)
    return bool(path) and not pure.is_absolute() and ".." not in pure.parts


def _is_under(path: str, folder: str) -> bool:
    return PurePosixPath(path).is_relative_to(folder) if folder else True

"""file://, pvc:// and configmap:// sources: what lies in a folder of this machine or is mounted into the pod. Nothing is copied."""

import hashlib
from pathlib import Path

from finetune_api.names import VOLUMES_ROOT

from finetune_trainer.errors import AccessError, DataError, SpecError
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.model_files import require_model, wanted_files

_KINDS = {"pvc": "PersistentVolumeClaim", "configmap": "ConfigMap"}


def local_path(location: Location, *, in_cluster: bool) -> Path:
    """Where the source lies in this machine's file tree.

    Raises:
        SpecError: file:// in a cluster, pvc:// or configmap:// outside one, or a path that leaves its volume.
    """
    if location.scheme == "file":
        if in_cluster:
            raise SpecError(
                f"{location.field} is {location.uri!r}, but file:// works only on a laptop; use s3://, hf://, pvc:// or builtin://."
            )
        return Path(location.rest)
    if not in_cluster:
        raise SpecError(f"{location.field} is {location.uri!r}, but {location.scheme}:// works only in a cluster; use file:// here.")
    root = Path(VOLUMES_ROOT) / location.volume
    path = root / location.path
    if ".." in path.parts:
        raise SpecError(f"{location.field} is {location.uri!r}, but a path must stay inside its volume; remove '..'.")
    return path


def check_model(location: Location, path: Path) -> None:
    """The folder exists, is readable and holds a model.

    Raises:
        DataError: it is missing, not a folder, or not a model.
        AccessError: it may not be read.
    """
    _require(location, path)
    if not path.is_dir():
        raise DataError(f"{location.field}: {path} is a file, but a model is a folder with config.json and safetensors; name the folder.")
    try:
        names = {item.name for item in path.iterdir() if item.is_file()}
    except PermissionError as error:
        raise _closed(location, path) from error
    require_model(names, f"{location.field}: {path}")


def check_file(location: Location, path: Path) -> None:
    """The file exists, can be opened and is not empty.

    Raises:
        DataError: it is missing, a folder, or empty.
        AccessError: it may not be read.
    """
    _require(location, path)
    if path.is_dir():
        raise DataError(f"{location.field}: {path} is a folder, but a dataset is one JSON Lines file; name the file.")
    try:
        with path.open("rb") as stream:
            empty = not stream.read(1)
    except PermissionError as error:
        raise _closed(location, path) from error
    if empty:
        raise DataError(f"{location.field}: {path} is empty, but a dataset needs at least one row; check what wrote it.")


def model_digest(location: Location, folder: Path, *, trust_remote_code: bool) -> str:
    """sha256 over the names and contents of what is loaded from a model's folder, in hex; reads all weights.

    Raises:
        AccessError: a file may not be read.
    """
    joined = hashlib.sha256()
    present = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    for name in wanted_files(present, trust_remote_code=trust_remote_code):
        try:
            joined.update(f"{name}\0{file_digest(folder / name)}\n".encode())
        except PermissionError as error:
            raise _closed(location, folder / name) from error
    return joined.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require(location: Location, path: Path) -> None:
    try:
        exists = path.exists()
    except PermissionError as error:
        raise _closed(location, path) from error
    if exists:
        return
    kind = _KINDS.get(location.scheme)
    if kind:
        raise DataError(
            f"{location.field}: {kind} {location.authority!r} has nothing at {location.path!r}; correct the path after its name."
        )
    raise DataError(f"{location.field}: {path} does not exist; correct the path.")


def _closed(location: Location, path: Path) -> AccessError:
    return AccessError(f"{location.field}: {path} may not be read by this user; change its permissions.")

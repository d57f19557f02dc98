#!/usr/bin/env python3
"""Writes a container image of just the given files: image.py NAME OUT ENTRYPOINT_JSON SRC:DST...

The archive is a docker archive, which containerd imports. up.sh makes the pause image with it; tests make tiny images of their own.
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path


def layer_of(files: dict[str, str]) -> bytes:
    """A layer, as a tar, that holds each source file at its target path."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as layer:
        for source, target in files.items():
            layer.add(source, arcname=target.lstrip("/"))
    return buffer.getvalue()


def config_of(layer: bytes, entrypoint: list[str]) -> bytes:
    """The image's configuration, as JSON."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": entrypoint, "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
        "history": [{}],
    }
    return json.dumps(config).encode()


def write_image(name: str, out: Path, entrypoint: list[str], files: dict[str, str]) -> None:
    """Writes the archive of a one-layer image."""
    layer = layer_of(files)
    config = config_of(layer, entrypoint)
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    layer_name = f"{hashlib.sha256(layer).hexdigest()}/layer.tar"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [name], "Layers": [layer_name]}]).encode()
    with tarfile.open(out, "w") as archive:
        for path, data in ((config_name, config), (layer_name, layer), ("manifest.json", manifest)):
            info = tarfile.TarInfo(path)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


if __name__ == "__main__":
    name, out, entrypoint, *pairs = sys.argv[1:]
    write_image(name, Path(out), json.loads(entrypoint), dict(pair.split(":") for pair in pairs))

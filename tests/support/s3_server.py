"""A real S3 server for tests: versitygw on a folder, on a loopback port unless told otherwise.

Used by tests/trainer/transfer, tests/cluster and tests/e2e. It speaks multipart, refuses wrong checksums and unknown keys. Where the program
is missing, `program()` says how to get it.
"""

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

START_SECONDS = 20


@dataclass(frozen=True)
class S3Server:
    """A running server: its address and its root user's keys."""

    endpoint: str
    access_key: str
    secret_key: str

    def client(self) -> Any:
        """A boto3 client of the root user."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 2}),
        )

    def make_bucket(self, stem: str = "bucket") -> str:
        """A fresh empty bucket's name."""
        name = f"{stem}-{secrets.token_hex(4)}"
        self.client().create_bucket(Bucket=name)
        return name


def program() -> Path:
    """Where versitygw is: in FINETUNE_BIN, else in the project's cache.

    Raises:
        FileNotFoundError: it is not there; the message says how to build it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("FINETUNE_BIN") or cache / "finetune-operator" / "bin") / "versitygw"
    if not path.is_file():
        raise FileNotFoundError(f"no S3 server: {path.name} is missing from {path.parent}; build it with make setup")
    return path


@contextmanager
def running_s3(folder: Path, address: str = "127.0.0.1", port: int = 0) -> Iterator[S3Server]:
    """Runs a server that keeps its objects under `folder` until the block ends.

    Args:
        folder: data and metadata; an existing one is served again.
        address: where to listen; pods of the test cluster reach 10.89.0.1.
        port: 0 takes a free one.
    """
    data, sidecar = folder / "data", folder / "meta"
    for path in (data, sidecar):
        path.mkdir(parents=True, exist_ok=True)
    port = port or free_port(address)
    server = S3Server(f"http://{address}:{port}", f"key{secrets.token_hex(8)}", f"secret{secrets.token_hex(16)}")
    keys = {"ROOT_ACCESS_KEY": server.access_key, "ROOT_SECRET_KEY": server.secret_key}
    command = [str(program()), "--quiet", "--port", f"{address}:{port}", "posix", "--sidecar", str(sidecar), str(data)]
    with (folder / "versitygw.log").open("ab") as log:
        process = subprocess.Popen(command, env={**os.environ, **keys}, stdout=log, stderr=log)
    try:
        _wait_until_open(process, address, port, folder / "versitygw.log")
        yield server
    finally:
        process.terminate()
        process.wait(timeout=10)


def free_port(address: str) -> int:
    """A port that nobody listened on a moment ago."""
    with socket.create_server((address, 0)) as listener:
        return int(listener.getsockname()[1])


def _wait_until_open(process: subprocess.Popen[bytes], address: str, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"versitygw did not start: {log.read_text(errors='replace')[-500:]}") from None
            time.sleep(0.02)
        else:
            return

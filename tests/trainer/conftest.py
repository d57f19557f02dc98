"""A real S3 server and a small Hub on the loopback, a laptop's credentials for them, and a pod's mounted Secrets and volumes.

Tiny models gain nothing from threads, and lose much where other tests run beside them. Unsloth, where it is installed, is imported before transformers.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from finetune_trainer import backends
from finetune_trainer.sources import credentials, local
from support.hub_server import HubServer, running_hub
from support.run_contexts import write_files
from support.s3_server import S3Server, program, running_s3

os.environ.setdefault("OMP_NUM_THREADS", "1")
if backends.has_unsloth():
    backends.import_unsloth()

BAD_KEY = "key-that-nobody-knows"
BAD_SECRET = "secret-that-must-not-be-quoted"


@pytest.fixture(autouse=True)
def _sigterm() -> Iterator[None]:
    """A run that has published takes no SIGTERM any more, and neither would what is tested after it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def s3_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server. On a machine without it the test is left out; under CI=true that is a failure."""
    try:
        program()
    except FileNotFoundError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def root(s3_here: S3Server) -> Iterator[Any]:
    """A boto3 client of the server's root user, for what a test prepares and looks up."""
    client = s3_here.client()
    yield client
    client.close()


@pytest.fixture
def bucket(s3_here: S3Server) -> str:
    """A fresh bucket."""
    return s3_here.make_bucket()


@dataclass
class Bucket:
    """A bucket as a test looks at it."""

    client: Any
    name: str

    def put(self, files: dict[str, bytes]) -> None:
        for key, content in files.items():
            self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def listed(self) -> list[str]:
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=self.name).get("Contents", ())]

    def read(self) -> dict[str, bytes]:
        return {key: self.client.get_object(Bucket=self.name, Key=key)["Body"].read() for key in self.listed()}

    def unfinished(self) -> list[str]:
        return [item["Key"] for item in self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", ())]


@pytest.fixture
def inside(root: Any, bucket: str) -> Bucket:
    """What is in the fresh bucket."""
    return Bucket(root, bucket)


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the machine that runs the tests is borrowed: no keys, no profile, no Hub token, no cache."""
    from huggingface_hub import constants

    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_", "HUGGING_FACE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))  # read at import


@pytest.fixture
def s3_laptop(s3_here: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server's keys in the environment, as on a laptop."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_here.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_here.secret_key)
    return s3_here


@pytest.fixture
def wrong_secret_key(s3_laptop: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """A secret key that does not fit the access key."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", BAD_SECRET)
    return BAD_SECRET


@dataclass
class S3Calls:
    """Every request of the code under test, in order, and what a test does to some of them.

    Attributes:
        made: (operation, key).
        before: asked with operation and key before each request; what it raises is raised.
        corrupt: operations whose body has another last byte when it arrives than its checksum says.
    """

    made: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[str, str], None] = lambda _operation, _key: None
    corrupt: set[str] = field(default_factory=set)

    def keys(self, *operations: str) -> list[str]:
        return [key for operation, key in self.made if operation in operations]

    def watch(self, client: Any) -> None:
        client.meta.events.register("provide-client-params.s3", self._record)
        client.meta.events.register("before-sign.s3", self._corrupt)

    def _record(self, params: dict[str, Any], model: Any, **_: Any) -> None:
        key = params.get("Key", params.get("Prefix", ""))
        self.before(model.name, key)
        self.made.append((model.name, key))

    def _corrupt(self, request: Any, operation_name: str, **_: Any) -> None:
        if operation_name in self.corrupt:
            content = request.data if isinstance(request.data, bytes) else request.data.read()
            request.data = content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture
def s3_calls(monkeypatch: pytest.MonkeyPatch) -> S3Calls:
    """Watches the clients that the code under test opens."""
    calls, plain = S3Calls(), boto3.session.Session.client

    def client(session: Any, *args: Any, **named: Any) -> Any:
        made = plain(session, *args, **named)
        calls.watch(made)
        return made

    monkeypatch.setattr(boto3.session.Session, "client", client)
    return calls


@pytest.fixture(scope="session")
def hub_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    """A small Hub."""
    with running_hub(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(hub_here: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub, empty, as the one that this machine uses, without a token."""
    from huggingface_hub import close_session, constants

    hub_here.repositories.clear()
    hub_here.refuse = lambda _method, _path: None
    monkeypatch.setenv("HF_ENDPOINT", hub_here.endpoint)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "ENDPOINT", hub_here.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub_here.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield hub_here
    close_session()


@pytest.fixture
def hub_laptop(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub with its write token in the environment, as on a laptop."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    return hub


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """Mounts a Secret for a role, as the operator does: mount("model", HF_TOKEN="..."); without keys it is an empty folder."""
    mounts = tmp_path / "credentials"
    monkeypatch.setattr(credentials, "MOUNT_ROOT", str(mounts))

    def mount_secret(role: str, **keys: str) -> Path:
        (mounts / role).mkdir(parents=True, exist_ok=True)
        return write_files(mounts / role, {name: value.encode() for name, value in keys.items()})

    return mount_secret


@pytest.fixture
def volumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where claims and ConfigMaps are mounted."""
    folder = tmp_path / "volumes"
    monkeypatch.setattr(local, "VOLUMES_ROOT", str(folder))
    return folder

"""Credentials: key files of a mounted Secret in a cluster, the ambient ones with a notice on a laptop, and nowhere else."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import sources
from finetune_trainer.context import RunContext
from finetune_trainer.errors import AccessError
from finetune_trainer.sources.credentials import hub_token, note_ambient, s3_client
from support.hub_server import HubServer
from support.run_contexts import MODEL_FILES, context, notes, refused, run_spec
from support.s3_server import S3Server

Mount = Callable[..., Path]


def with_secret(folder: Path, *, in_cluster: bool = True, secret: str = "keys") -> RunContext:
    """A run whose model names a Secret."""
    spec = run_spec("hf://acme/base")
    spec["model"]["credentials"] = {"secretName": secret}
    return context(folder, spec, in_cluster=in_cluster)


def keys_of(client: Any) -> tuple[str, str, str | None]:
    """What a boto3 client signs with."""
    used = client._request_signer._credentials
    client.close()
    return used.access_key, used.secret_key, used.token


def test_s3_keys_come_from_the_files_of_the_role(mount: Mount, tmp_path: Path) -> None:
    mount("model", AWS_ACCESS_KEY_ID="mine\n", AWS_SECRET_ACCESS_KEY="secret\n", AWS_SESSION_TOKEN="session")
    mount("dataset", AWS_ACCESS_KEY_ID="other", AWS_SECRET_ACCESS_KEY="other")

    assert keys_of(s3_client(with_secret(tmp_path), "model", "")) == ("mine", "secret", "session")


def test_the_region_comes_from_the_secret(mount: Mount, tmp_path: Path) -> None:
    mount("model", AWS_ACCESS_KEY_ID="mine", AWS_SECRET_ACCESS_KEY="secret", AWS_REGION="eu-north-1")
    client = s3_client(with_secret(tmp_path), "model", "")
    client.close()

    assert client.meta.region_name == "eu-north-1"


def test_a_secret_wins_over_the_pod_s_environment(mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ambient")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ambient")
    monkeypatch.setenv("HF_TOKEN", "ambient")
    mount("model", AWS_ACCESS_KEY_ID="mine", AWS_SECRET_ACCESS_KEY="secret", HF_TOKEN="hf_mine")
    ctx = with_secret(tmp_path)

    assert keys_of(s3_client(ctx, "model", "")) == ("mine", "secret", None)
    assert hub_token(ctx, "model") == "hf_mine"


def test_the_hub_token_comes_from_its_file(mount: Mount, tmp_path: Path) -> None:
    mount("model", HF_TOKEN="hf_mine\n")

    assert hub_token(with_secret(tmp_path), "model") == "hf_mine"


def test_a_role_without_a_secret_sends_no_token(mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "ambient")
    mount("model", HF_TOKEN="hf_mine")

    assert hub_token(with_secret(tmp_path), "dataset") is False


def test_a_role_without_a_secret_signs_nothing_in_a_cluster(mount: Mount, tmp_path: Path) -> None:
    client = s3_client(with_secret(tmp_path), "dataset", "")
    client.close()

    assert client._request_signer._credentials is None


def test_a_pod_never_borrows_the_identity_of_its_node(mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.utils import InstanceMetadataFetcher

    asked: list[str] = []
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setattr(InstanceMetadataFetcher, "retrieve_iam_role_credentials", lambda _: asked.append("node") or {})
    s3_client(with_secret(tmp_path), "dataset", "").close()

    assert asked == []


def test_a_missing_secret_is_named_with_its_namespace_and_keys(mount: Mount, tmp_path: Path) -> None:
    words = ("Secret 'keys'", "namespace 'team'", "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    with refused(AccessError, "does not exist", *words):
        s3_client(with_secret(tmp_path), "model", "")


def test_a_secret_that_is_mounted_empty_is_as_good_as_missing(mount: Mount, tmp_path: Path) -> None:
    mount("model")

    with refused(AccessError, "Secret 'keys'", "or is empty", "HF_TOKEN"):
        hub_token(with_secret(tmp_path), "model")


LACKING: list[tuple[dict[str, str], tuple[str, ...]]] = [
    ({"AWS_ACCESS_KEY_ID": "mine"}, ("lacks AWS_SECRET_ACCESS_KEY;",)),
    ({"AWS_ACCESS_KEY_ID": "mine", "AWS_SECRET_ACCESS_KEY": " \n"}, ("lacks AWS_SECRET_ACCESS_KEY;",)),
    ({"accesskey": "mine"}, ("lacks AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY;", "AWS_SESSION_TOKEN")),
]


@pytest.mark.parametrize(("keys", "words"), LACKING)
def test_a_missing_key_is_named_and_the_others_are_not_quoted(
    mount: Mount, tmp_path: Path, keys: dict[str, str], words: tuple[str, ...]
) -> None:
    mount("model", **keys)

    with refused(AccessError, "Secret 'keys'", *words, hidden=("mine",)):
        s3_client(with_secret(tmp_path), "model", "")


def test_a_secret_of_the_other_kind_lacks_the_hub_token(mount: Mount, tmp_path: Path) -> None:
    mount("model", AWS_ACCESS_KEY_ID="mine", AWS_SECRET_ACCESS_KEY="secret")

    with refused(AccessError, "Secret 'keys' lacks HF_TOKEN", hidden=("secret;",)):
        sources.check(with_secret(tmp_path))


def test_a_key_that_is_no_text_is_named(mount: Mount, tmp_path: Path) -> None:
    (mount("model") / "HF_TOKEN").write_bytes(b"\xff\xfe")

    with refused(AccessError, "Key HF_TOKEN of Secret 'keys'", "store the plain value"):
        hub_token(with_secret(tmp_path), "model")


def test_a_laptop_ignores_the_secret_and_uses_its_own_token(mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount("model", HF_TOKEN="hf_mounted")
    monkeypatch.setenv("HF_TOKEN", "hf_ambient")

    assert hub_token(with_secret(tmp_path, in_cluster=False), "model") == "hf_ambient"


def test_a_laptop_ignores_the_secret_and_uses_its_own_keys(mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount("model", AWS_ACCESS_KEY_ID="mounted", AWS_SECRET_ACCESS_KEY="mounted")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mine")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    assert keys_of(s3_client(with_secret(tmp_path, in_cluster=False), "model", "")) == ("mine", "secret", None)


def test_a_laptop_says_once_which_secrets_it_ignores(tmp_path: Path) -> None:
    spec = run_spec("hf://acme/base", "builtin://python-docs", {"uri": "s3://models/a", "credentials": {"secretName": "write-keys"}})
    spec["model"]["credentials"] = {"secretName": "hub-token"}
    ctx = context(tmp_path, spec)

    note_ambient(ctx)

    [note] = notes(ctx)
    assert "hub-token, write-keys" in note
    assert "are ignored" in note


@pytest.mark.parametrize(("in_cluster", "secret"), [(True, "keys"), (False, "")])
def test_there_is_nothing_to_say_in_a_cluster_or_without_secrets(tmp_path: Path, in_cluster: bool, secret: str) -> None:
    ctx = with_secret(tmp_path, in_cluster=in_cluster, secret=secret)

    note_ambient(ctx)

    assert notes(ctx) == []


def test_two_secrets_open_two_places_in_one_run(mount: Mount, hub: HubServer, s3_here: S3Server, inside: Any, tmp_path: Path) -> None:
    hub.put("acme/base", MODEL_FILES, private=True)
    inside.put({"rows.jsonl": b'{"text": "one"}\n'})
    mount("model", HF_TOKEN=hub.token)
    mount("dataset", AWS_ACCESS_KEY_ID=s3_here.access_key, AWS_SECRET_ACCESS_KEY=s3_here.secret_key)
    spec = run_spec("hf://acme/base", f"s3://{inside.name}/rows.jsonl")
    spec["model"]["credentials"] = {"secretName": "hub-token"}
    spec["dataset"] |= {"credentials": {"secretName": "s3-keys"}, "endpoint": s3_here.endpoint}
    before = dict(os.environ)

    sources.check(context(tmp_path, spec, in_cluster=True))

    assert dict(os.environ) == before

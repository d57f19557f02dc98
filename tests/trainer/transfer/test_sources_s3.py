"""s3:// sources against a real S3 server: what is fetched, from where it is taken the second time, and what is said of a bad address."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from finetune_trainer import sources
from finetune_trainer.context import RunContext
from finetune_trainer.destinations import s3
from finetune_trainer.errors import AccessError, DataError, FineTuneError, InfrastructureError, SpecError
from finetune_trainer.sources.location import destinations
from finetune_trainer.stages import preflight
from support.run_contexts import CONFIG, MODEL_FILES, WEIGHTS, context, read_files, refused, run_spec
from support.s3_server import S3Server, free_port

ROWS = b'{"text": "one"}\n{"text": "two"}\n'
PICKLE_ONLY = {"config.json": CONFIG, "pytorch_model.bin": b"pickle"}


def reading(folder: Path, endpoint: str, model: str = "", dataset: str = "") -> RunContext:
    """A laptop's run that reads a model or a dataset from this server."""
    spec = run_spec(model or "builtin://smollm2-135m", dataset or "builtin://python-docs")
    spec["model"]["endpoint"] = spec["dataset"]["endpoint"] = endpoint
    return context(folder, spec)


def test_a_dataset_is_fetched_as_it_is(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    inside.put({"corpora/rows.jsonl": ROWS})

    fetched = sources.fetch_dataset(reading(tmp_path, s3_laptop.endpoint, dataset=f"s3://{inside.name}/corpora/rows.jsonl"))

    assert fetched.path.name == "rows.jsonl"
    assert fetched.path.read_bytes() == ROWS


def test_a_dataset_is_resolved_to_its_etag(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    inside.put({"rows.jsonl": ROWS})
    etag = inside.client.head_object(Bucket=inside.name, Key="rows.jsonl")["ETag"].strip('"')

    fetched = sources.fetch_dataset(reading(tmp_path, s3_laptop.endpoint, dataset=f"s3://{inside.name}/rows.jsonl"))

    assert fetched.resolved == f"s3://{inside.name}/rows.jsonl?etag={etag}"


def test_the_object_that_was_looked_up_is_the_one_that_is_fetched_or_nothing(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path
) -> None:
    inside.put({"rows.jsonl": ROWS})
    ctx = reading(tmp_path, s3_laptop.endpoint, dataset=f"s3://{inside.name}/rows.jsonl")

    def replace_it(operation: str, _: str) -> None:
        if operation == "HeadObject":
            inside.put({"rows.jsonl": ROWS[::-1]})  # of the same size

    s3_calls.before = replace_it
    with refused(InfrastructureError, "spec.dataset.source", "changed while it was downloaded", "start the run again"):
        sources.fetch_dataset(ctx)


def test_held_out_data_is_fetched_from_its_own_address(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    inside.put({"held-out.jsonl": ROWS})
    spec = run_spec()
    spec["dataset"] |= {"endpoint": s3_laptop.endpoint, "evaluation": {"source": f"s3://{inside.name}/held-out.jsonl"}}

    fetched = sources.fetch_evaluation(context(tmp_path, spec))

    assert fetched is not None
    assert fetched.path.read_bytes() == ROWS


def test_a_model_is_its_safetensors_configuration_and_tokenizer(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    others = {"README.md": b"# base", "model.py": b"code", "onnx/model.onnx": b"onnx", "consolidated.safetensors": b"twice"}
    inside.put({f"base/{name}": content for name, content in (MODEL_FILES | others).items()})

    fetched = sources.fetch_model(reading(tmp_path, s3_laptop.endpoint, model=f"s3://{inside.name}/base"))

    assert read_files(fetched.path) == MODEL_FILES
    assert fetched.resolved.startswith(f"s3://{inside.name}/base?etags=")


def test_a_model_at_the_root_of_a_bucket_is_found(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    inside.put(MODEL_FILES)

    fetched = sources.fetch_model(reading(tmp_path, s3_laptop.endpoint, model=f"s3://{inside.name}"))

    assert read_files(fetched.path) == MODEL_FILES


def test_the_second_fetch_downloads_nothing(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    inside.put({f"base/{name}": content for name, content in MODEL_FILES.items()})
    ctx = reading(tmp_path, s3_laptop.endpoint, model=f"s3://{inside.name}/base/")
    first = sources.fetch_model(ctx)
    s3_calls.made.clear()

    assert sources.fetch_model(ctx) == first
    assert s3_calls.keys("GetObject", "HeadObject") == []


def test_a_models_identity_is_that_of_its_files_and_not_of_their_place(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    """The endpoint may be edited, and nothing is trained again for it."""
    found = []
    for prefix, files in (("a", MODEL_FILES), ("b", MODEL_FILES), ("c", MODEL_FILES | {"model.safetensors": b"others"})):
        inside.put({f"{prefix}/{name}": content for name, content in files.items()})
        found.append(sources.fetch_model(reading(tmp_path, s3_laptop.endpoint, model=f"s3://{inside.name}/{prefix}"), weights=False))
    assert found[0].identify() == found[1].identify() != found[2].identify()


def test_new_content_is_fetched_anew(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    inside.put({"rows.jsonl": ROWS})
    ctx = reading(tmp_path, s3_laptop.endpoint, dataset=f"s3://{inside.name}/rows.jsonl")
    first = sources.fetch_dataset(ctx)
    inside.put({"rows.jsonl": ROWS[::-1]})

    second = sources.fetch_dataset(ctx)

    assert second.path.read_bytes() == ROWS[::-1]
    assert second.resolved != first.resolved


def test_a_download_that_broke_off_is_continued_at_the_missing_file(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path
) -> None:
    inside.put(MODEL_FILES)
    ctx = reading(tmp_path, s3_laptop.endpoint, model=f"s3://{inside.name}")

    def break_off(operation: str, key: str) -> None:
        if operation == "HeadObject" and key == "model.safetensors":
            raise EndpointConnectionError(endpoint_url=s3_laptop.endpoint)

    s3_calls.before = break_off
    with refused(InfrastructureError, "spec.model.source", "could not be reached", "check the endpoint"):
        sources.fetch_model(ctx)
    s3_calls.before = lambda _operation, _key: None
    s3_calls.made.clear()

    assert read_files(sources.fetch_model(ctx).path) == MODEL_FILES
    assert s3_calls.keys("GetObject") == ["model.safetensors", "tokenizer.json"]


CHILD = """
import sys, time
from pathlib import Path
from finetune_trainer import sources
from finetune_trainer.sources import s3
from support.run_contexts import context, run_spec

plain = s3._download_one
def slow(client, where, item, path):
    if item.key == "tokenizer.json":
        print("here", flush=True)
        time.sleep(60)
    plain(client, where, item, path)
s3._download_one = slow
spec = run_spec(sys.argv[2])
spec["model"]["endpoint"] = sys.argv[3]
sources.fetch_model(context(Path(sys.argv[1]), spec))
"""


def test_a_killed_download_holds_no_lock_and_is_continued(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    inside.put(MODEL_FILES)
    arguments = [str(tmp_path), f"s3://{inside.name}", s3_laptop.endpoint]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, env=environment, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
    (partial,) = (tmp_path / "cache" / "s3").glob(".*.partial")
    (partial / "tokenizer.json.1a2B3c4D").write_bytes(b"half")  # what boto3 writes until a file is whole

    fetched = sources.fetch_model(reading(tmp_path, s3_laptop.endpoint, model=f"s3://{inside.name}"))

    assert read_files(fetched.path) == MODEL_FILES
    assert s3_calls.keys("GetObject") == ["tokenizer.json"]


BAD_FILES: list[tuple[str, dict[str, bytes], str, type[FineTuneError], tuple[str, ...]]] = [
    ("no such key", {}, "rows.jsonl", DataError, ("does not exist", "correct the key")),
    ("an empty object", {"rows.jsonl": b""}, "rows.jsonl", DataError, ("is empty", "at least one row")),
    ("a bucket without a key", {}, "", DataError, ("one object", "add its key")),
]


@pytest.mark.parametrize(("files", "key", "kind", "words"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
@pytest.mark.parametrize("call", [sources.check, sources.fetch_dataset])
def test_a_bad_dataset_is_refused(
    s3_laptop: S3Server,
    inside: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, bytes],
    key: str,
    kind: type[FineTuneError],
    words: tuple[str, ...],
    call: Any,
) -> None:
    inside.put(files)
    ctx = reading(tmp_path, s3_laptop.endpoint, dataset=f"s3://{inside.name}/{key}")

    with refused(kind, "spec.dataset.source", f"s3://{inside.name}", *words, hidden=(s3_laptop.secret_key,)):
        call(ctx)


BAD_MODELS: list[tuple[str, dict[str, bytes], tuple[str, ...]]] = [
    ("nothing there", {}, ("nothing lies under", "correct the prefix")),
    ("no config.json", {"base/model.safetensors": WEIGHTS}, ("no config.json",)),
    ("no weights", {"base/config.json": CONFIG}, ("no .safetensors file", "upload the weights as safetensors")),
    ("only a pickle", {f"base/{name}": content for name, content in PICKLE_ONLY.items()}, (".bin or .pt", "convert them to safetensors")),
    ("another prefix that begins alike", {f"base-old/{name}": content for name, content in MODEL_FILES.items()}, ("nothing lies under",)),
]


@pytest.mark.parametrize(("files", "words"), [case[1:] for case in BAD_MODELS], ids=[case[0] for case in BAD_MODELS])
@pytest.mark.parametrize("call", [sources.check, sources.fetch_model])
def test_a_prefix_without_a_model_is_refused(
    s3_laptop: S3Server, inside: Any, tmp_path: Path, files: dict[str, bytes], words: tuple[str, ...], call: Any
) -> None:
    inside.put(files)

    with refused(DataError, "spec.model.source", f"s3://{inside.name}/base", *words):
        call(reading(tmp_path, s3_laptop.endpoint, model=f"s3://{inside.name}/base"))


def test_a_bucket_that_does_not_exist_is_an_access_error(s3_laptop: S3Server, tmp_path: Path) -> None:
    with refused(AccessError, "spec.dataset.source", "NoSuchBucket", "create it or correct its name"):
        sources.check(reading(tmp_path, s3_laptop.endpoint, dataset="s3://no-such-bucket/rows.jsonl"))


@pytest.mark.parametrize("call", [sources.check, sources.fetch_dataset])
def test_a_wrong_secret_key_is_named_and_not_quoted(
    wrong_secret_key: str, s3_here: S3Server, bucket: str, tmp_path: Path, call: Any
) -> None:
    hidden = (wrong_secret_key, s3_here.access_key)
    with refused(AccessError, "spec.dataset.source", "AWS_SECRET_ACCESS_KEY", hidden=hidden):
        call(reading(tmp_path, s3_here.endpoint, dataset=f"s3://{bucket}/rows.jsonl"))


def test_an_unknown_access_key_is_an_access_error(
    s3_laptop: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with refused(AccessError, "spec.dataset.source", "AWS_ACCESS_KEY_ID", hidden=(s3_laptop.secret_key,)):
        sources.check(reading(tmp_path, s3_laptop.endpoint, dataset=f"s3://{bucket}/rows.jsonl"))


def test_a_private_bucket_without_credentials_is_an_access_error(s3_here: S3Server, inside: Any, tmp_path: Path) -> None:
    inside.put({"rows.jsonl": ROWS})
    words = ("no credentials were given", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
    with refused(AccessError, "spec.dataset.source", *words, hidden=("is wrong", "correct the credentials", "secretName")):
        sources.check(reading(tmp_path, s3_here.endpoint, dataset=f"s3://{inside.name}/rows.jsonl"))


def without_a_secret(folder: Path, server: S3Server, bucket: str, *parts: str) -> RunContext:
    """A pod's run that has nothing but these parts in a bucket, and names no Secret."""
    spec = run_spec("hf://acme/base", "builtin://python-docs", {"uri": "hf://acme/bot"})
    places: dict[str, dict[str, Any]] = {
        "model": {"model": {"source": f"s3://{bucket}/base", "endpoint": server.endpoint}},
        "dataset": {"dataset": {"source": f"s3://{bucket}/rows.jsonl", "endpoint": server.endpoint}},
        "evaluation": {"dataset": {"evaluation": {"source": f"s3://{bucket}/rows.jsonl"}, "endpoint": server.endpoint}},
        "destination": {
            "outputs": {"destinations": [{"uri": "hf://acme/bot"}, {"uri": f"s3://{bucket}/bot", "endpoint": server.endpoint}]}
        },
        "checkpoints": {"storage": {"checkpoints": {"uri": f"s3://{bucket}/c", "endpoint": server.endpoint}}},
    }
    for part in parts:
        for name, changes in places[part].items():
            spec[name] = spec.get(name, {}) | changes
    return context(folder, spec, in_cluster=True)


UNSIGNED: list[tuple[str, Callable[[RunContext], Any], str, str]] = [
    ("model", lambda ctx: sources.fetch_model(ctx), "spec.model.source", "spec.model"),
    ("dataset", lambda ctx: sources.fetch_dataset(ctx), "spec.dataset.source", "spec.dataset"),
    ("evaluation", lambda ctx: sources.fetch_evaluation(ctx), "spec.dataset.evaluation.source", "spec.dataset"),
    (
        "destination",
        lambda ctx: s3.check_write(ctx, destinations(ctx.job)[1]),
        "spec.outputs.destinations[1].uri",
        "spec.outputs.destinations[1]",
    ),
    ("checkpoints", preflight.check_mirror, "spec.storage.checkpoints.uri", "spec.storage.checkpoints"),
]


@pytest.mark.parametrize(("part", "call", "field", "owner"), UNSIGNED, ids=[case[0] for case in UNSIGNED])
def test_a_pod_without_credentials_is_told_which_field_names_a_secret(
    s3_here: S3Server, bucket: str, tmp_path: Path, part: str, call: Callable[[RunContext], Any], field: str, owner: str
) -> None:
    words = ("no credentials were given", f"with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in {owner}.credentials.secretName")
    with refused(AccessError, f"{field}: s3://{bucket}/", *words, hidden=("is wrong", "AWS_PROFILE")):
        call(without_a_secret(tmp_path, s3_here, bucket, part))


def test_an_identity_that_a_pod_was_given_is_not_called_missing(
    s3_laptop: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    with refused(AccessError, "spec.dataset.source", "does not know this access key", hidden=("no credentials were given",)):
        sources.fetch_dataset(without_a_secret(tmp_path, s3_laptop, bucket, "dataset"))


@pytest.mark.parametrize("call", [sources.check, sources.fetch_dataset])
def test_a_server_that_is_out_of_reach_is_an_infrastructure_error(
    s3_laptop: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    monkeypatch.setattr(sources.credentials, "PATIENT_ATTEMPTS", 2)
    endpoint = f"http://127.0.0.1:{free_port('127.0.0.1')}"

    with refused(InfrastructureError, "spec.dataset.source", endpoint, "check the endpoint and the network"):
        call(reading(tmp_path, endpoint, dataset="s3://bucket/rows.jsonl"))


def test_a_bucket_name_that_no_bucket_can_have_is_a_spec_error(s3_laptop: S3Server, tmp_path: Path) -> None:
    with refused(SpecError, "spec.dataset.source", "write s3://bucket/key"):
        sources.check(reading(tmp_path, s3_laptop.endpoint, dataset="s3://not*a*bucket/rows.jsonl"))


def test_an_endpoint_that_is_no_url_is_a_spec_error(s3_laptop: S3Server, tmp_path: Path) -> None:
    with refused(SpecError, "spec.dataset.source", "'https://-'", "write https://host"):
        sources.check(reading(tmp_path, "https://-", dataset="s3://bucket/rows.jsonl"))


def test_a_check_downloads_no_weights(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    inside.put(MODEL_FILES)

    sources.check(reading(tmp_path, s3_laptop.endpoint, model=f"s3://{inside.name}"))

    assert s3_calls.keys("GetObject") == ["config.json"]

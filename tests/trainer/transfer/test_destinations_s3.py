"""s3:// destinations against a real S3 server: checked by the server, resumable, idempotent, and never half old and half new to a reader."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from finetune_trainer import destinations
from finetune_trainer.context import RunContext
from finetune_trainer.destinations import s3_upload
from finetune_trainer.destinations.s3 import UNFINISHED
from finetune_trainer.errors import AccessError, InfrastructureError
from finetune_trainer.sources.location import destinations as locations
from support.run_contexts import CONFIG, MODEL_FILES, WEIGHTS, context, read_files, refused, report_of, run_spec, write_artifacts
from support.s3_server import S3Server, free_port

FIELD = "spec.outputs.destinations[0].uri"
MIB = 2**20
SENDING = ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")
ONE_SHARD = {"config.json": CONFIG, "model.safetensors": WEIGHTS}
TWO_SHARDS = {"config.json": b"{}", "model-1.safetensors": b"one", "model-2.safetensors": b"two"}


def shipping(folder: Path, server: S3Server, bucket: str, model: dict[str, bytes] | None = None) -> RunContext:
    """A finished run on a laptop that goes to bot/ in the bucket; `model` are the quantized model's files."""
    ctx = context(folder, run_spec("hf://acme/base", "builtin://python-docs", {"uri": f"s3://{bucket}/bot", "endpoint": server.endpoint}))
    write_artifacts(ctx, report_of(ctx), model=model)
    return ctx


def publish(ctx: RunContext) -> tuple[Any, ...]:
    """Publishes to the run's only destination."""
    return destinations.publish(ctx, locations(ctx.job)[0], report_of(ctx))


def breaking_off(server: S3Server, operation: str, key: str) -> Callable[[str, str], None]:
    """What breaks the connection before this request."""

    def before(requested: str, wanted: str) -> None:
        if (requested, wanted) == (operation, key):
            raise EndpointConnectionError(endpoint_url=server.endpoint)

    return before


def refusing(*operations: str) -> Callable[[str, str], None]:
    """What answers these operations as a server does whose policy gives the keys no right to them."""

    def before(operation: str, _: str) -> None:
        if operation in operations:
            code = "403" if operation == "HeadObject" else "AccessDenied"
            raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 403}}, operation)

    return before


def start_upload(inside: Any, key: str) -> None:
    """An upload in parts that nobody finishes."""
    inside.client.create_multipart_upload(Bucket=inside.name, Key=key, ChecksumAlgorithm="SHA256")


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of 5 MiB, the smallest that S3 takes, sent one after the other."""
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 * MIB)
    monkeypatch.setattr(s3_upload, "SINGLE_PUT_LIMIT", 5 * MIB)
    monkeypatch.setattr(s3_upload, "PARALLEL_PARTS", 1)
    return 5 * MIB


def test_the_artifacts_arrive_as_they_are(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    ctx = shipping(tmp_path, s3_laptop, inside.name)

    publish(ctx)

    arrived = inside.read()
    expected = {f"bot/model-torchao/{name}": content for name, content in MODEL_FILES.items()}
    expected |= {f"bot/lora_model/{name}": content for name, content in read_files(ctx.adapter).items() if name != "README.md"}
    expected |= {f"bot/proof/{name}": content for name, content in read_files(ctx.proof).items()}
    expected |= {"bot/report.json": ctx.report.read_bytes()}
    assert {key: arrived[key] for key in arrived if key not in ("bot/manifest.json", "bot/README.md")} == expected


def test_the_manifest_goes_last(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    publish(shipping(tmp_path, s3_laptop, inside.name))

    first, *sent = s3_calls.keys("PutObject")
    assert first == f"bot/{UNFINISHED}"
    assert sent[-1] == "bot/manifest.json"
    assert sorted(sent) == inside.listed()


def test_the_manifest_names_everything_else_with_its_digest(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    publish(shipping(tmp_path, s3_laptop, inside.name))

    arrived = inside.read()
    named = {f"bot/{item['path']}": (item["sha256"], item["bytes"]) for item in json.loads(arrived.pop("bot/manifest.json"))["files"]}
    assert named == {key: (hashlib.sha256(content).hexdigest(), len(content)) for key, content in arrived.items()}


def test_each_artifact_is_reported_with_its_address_and_size(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    adapter, quantized = publish(shipping(tmp_path, s3_laptop, inside.name))

    assert (adapter.kind, adapter.uri) == ("adapter", f"s3://{inside.name}/bot/lora_model")
    assert (quantized.kind, quantized.uri) == ("quantized", f"s3://{inside.name}/bot/model-torchao")
    assert quantized.bytes == sum(len(content) for content in MODEL_FILES.values())
    assert quantized.digest == adapter.digest
    assert quantized.digest.startswith("sha256:")


@pytest.mark.parametrize("uri", ["s3://{bucket}", "s3://{bucket}/", "s3://{bucket}/a/b/"])
def test_any_prefix_will_do(s3_laptop: S3Server, inside: Any, tmp_path: Path, uri: str) -> None:
    uri = uri.format(bucket=inside.name)
    ctx = context(tmp_path, run_spec("hf://acme/base", "builtin://python-docs", {"uri": uri, "endpoint": s3_laptop.endpoint}))
    write_artifacts(ctx, report_of(ctx))

    adapter, _ = publish(ctx)

    assert f"{adapter.uri}/adapter_model.safetensors" in [f"s3://{inside.name}/{key}" for key in inside.listed()]


def test_publishing_twice_sends_nothing(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    first = publish(shipping(tmp_path, s3_laptop, inside.name))
    s3_calls.made.clear()

    assert publish(shipping(tmp_path, s3_laptop, inside.name)) == first
    assert s3_calls.keys(*SENDING, "DeleteObject") == []


@pytest.mark.parametrize("left", [None, CONFIG[::-1]], ids=["deleted", "replaced by as many bytes"])
def test_what_somebody_has_changed_is_put_back(left: bytes | None, s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    ctx = shipping(tmp_path, s3_laptop, inside.name)
    publish(ctx)
    before = inside.read()
    inside.client.delete_object(Bucket=inside.name, Key="bot/model-torchao/config.json")
    if left is not None:
        inside.put({"bot/model-torchao/config.json": left})
    s3_calls.made.clear()

    publish(ctx)

    assert inside.read() == before
    assert s3_calls.keys(*SENDING) == ["bot/model-torchao/config.json"]


def test_an_upload_that_broke_off_sends_only_what_is_missing(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    ctx = shipping(tmp_path, s3_laptop, inside.name)
    s3_calls.before = breaking_off(s3_laptop, "PutObject", "bot/model-torchao/model.safetensors")
    with refused(InfrastructureError, FIELD, "could not be reached"):
        publish(ctx)
    assert "bot/manifest.json" not in inside.listed()
    arrived = set(inside.listed())
    s3_calls.before = lambda _operation, _key: None
    s3_calls.made.clear()

    publish(ctx)

    assert arrived
    assert not arrived & set(s3_calls.keys(*SENDING))
    assert inside.read()["bot/model-torchao/model.safetensors"] == WEIGHTS


def test_bytes_that_change_on_the_way_are_refused_by_the_server(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    s3_calls.corrupt = {"PutObject"}

    with refused(InfrastructureError, FIELD, "other bytes than were sent", "try again", hidden=(s3_laptop.secret_key,)):
        publish(shipping(tmp_path, s3_laptop, inside.name))
    assert inside.listed() == []


def test_a_part_that_changes_on_the_way_is_refused_by_the_server(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, small_parts: int
) -> None:
    ctx = shipping(tmp_path, s3_laptop, inside.name, {"config.json": CONFIG, "model.safetensors": b"w" * (small_parts + 1)})
    s3_calls.corrupt = {"UploadPart"}

    with refused(InfrastructureError, FIELD, "other bytes than were sent", "try again"):
        publish(ctx)
    assert not {"bot/manifest.json", "bot/model-torchao/model.safetensors"} & set(inside.listed())


def test_a_large_file_arrives_whole_in_parts(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, small_parts: int) -> None:
    weights = bytes(range(251)) * (2 * small_parts // 251 + 100)

    publish(shipping(tmp_path, s3_laptop, inside.name, {"config.json": CONFIG, "model.safetensors": weights}))

    assert inside.read()["bot/model-torchao/model.safetensors"] == weights
    assert len(s3_calls.keys("UploadPart")) == 3


def test_a_large_file_that_is_there_is_not_sent_again(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, small_parts: int
) -> None:
    model = {"config.json": CONFIG, "model.safetensors": b"w" * (small_parts + 1)}
    ctx = shipping(tmp_path, s3_laptop, inside.name, model)
    s3_calls.before = breaking_off(s3_laptop, "PutObject", "bot/manifest.json")
    with refused(InfrastructureError, FIELD):
        publish(ctx)
    s3_calls.before = lambda _operation, _key: None
    s3_calls.made.clear()

    publish(ctx)

    assert s3_calls.keys(*SENDING) == ["bot/manifest.json"]


def test_a_large_file_that_broke_off_keeps_its_finished_parts(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, small_parts: int
) -> None:
    weights = b"1" * small_parts + b"2" * small_parts + b"3"
    ctx = shipping(tmp_path, s3_laptop, inside.name, {"config.json": CONFIG, "model.safetensors": weights})

    def break_off_at_the_third(operation: str, _: str) -> None:
        if operation == "UploadPart" and len(s3_calls.keys("UploadPart")) == 2:
            raise EndpointConnectionError(endpoint_url=s3_laptop.endpoint)

    s3_calls.before = break_off_at_the_third
    with refused(InfrastructureError, FIELD):
        publish(ctx)
    s3_calls.before = lambda _operation, _key: None
    s3_calls.made.clear()

    publish(ctx)

    assert len(s3_calls.keys("UploadPart")) == 1
    assert s3_calls.keys("CreateMultipartUpload") == []
    assert inside.read()["bot/model-torchao/model.safetensors"] == weights
    assert inside.unfinished() == []


def test_a_large_file_that_is_whole_leaves_no_other_attempt(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, small_parts: int
) -> None:
    for _ in range(3):
        start_upload(inside, "bot/model-torchao/model.safetensors")
    start_upload(inside, "bot/model-torchao/model.safetensors.of-others")
    s3_calls.before = breaking_off(s3_laptop, "PutObject", "bot/manifest.json")

    with refused(InfrastructureError, FIELD):
        publish(shipping(tmp_path, s3_laptop, inside.name, {"config.json": CONFIG, "model.safetensors": b"w" * (small_parts + 1)}))

    assert inside.unfinished() == ["bot/model-torchao/model.safetensors.of-others"]


def test_a_half_sent_file_of_a_broken_off_publication_goes_with_the_next(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, small_parts: int
) -> None:
    s3_calls.before = breaking_off(s3_laptop, "UploadPart", "bot/model-torchao/model-1.safetensors")
    with refused(InfrastructureError, FIELD):
        publish(shipping(tmp_path / "broken", s3_laptop, inside.name, TWO_SHARDS | {"model-1.safetensors": b"w" * (small_parts + 1)}))
    assert inside.unfinished() == ["bot/model-torchao/model-1.safetensors"]
    s3_calls.before = lambda _operation, _key: None
    start_upload(inside, "bot/of-others")

    publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))

    assert inside.unfinished() == ["bot/of-others"]


def test_parts_of_other_content_are_sent_anew(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, small_parts: int) -> None:
    started = inside.client.create_multipart_upload(
        Bucket=inside.name, Key="bot/model-torchao/model.safetensors", ChecksumAlgorithm="SHA256"
    )
    named = {"Bucket": inside.name, "Key": started["Key"], "UploadId": started["UploadId"], "ChecksumAlgorithm": "SHA256"}
    inside.client.upload_part(**named, PartNumber=1, Body=b"o" * small_parts)
    weights = b"w" * (small_parts + 1)

    publish(shipping(tmp_path, s3_laptop, inside.name, {"config.json": CONFIG, "model.safetensors": weights}))

    assert inside.read()["bot/model-torchao/model.safetensors"] == weights


def test_a_newer_model_replaces_the_older_one_wholly(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    publish(shipping(tmp_path / "old", s3_laptop, inside.name, TWO_SHARDS))

    publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))

    assert model_of(inside.read()) == ONE_SHARD
    assert f"bot/{UNFINISHED}" not in inside.listed()


def test_a_reader_never_sees_a_mixture(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    """Before each request a reader looks: if there is a manifest, every file that it names is the one it names."""
    publish(shipping(tmp_path / "old", s3_laptop, inside.name, TWO_SHARDS))
    seen: list[str] = []

    def look(*_: str) -> None:
        seen.append(what_a_reader_sees(inside.read()))

    s3_calls.before = look
    publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))
    look()

    assert list(dict.fromkeys(seen)) == ["model-1.safetensors", "nothing", "model.safetensors"]


def test_files_of_others_under_the_prefix_are_left_alone(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    inside.put({"bot/notes.txt": b"mine"})
    publish(shipping(tmp_path / "old", s3_laptop, inside.name, TWO_SHARDS))

    publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))

    assert inside.read()["bot/notes.txt"] == b"mine"


def test_stale_files_are_removed_after_a_replacement_that_broke_off(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path
) -> None:
    publish(shipping(tmp_path / "old", s3_laptop, inside.name, TWO_SHARDS))
    new = shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD)
    s3_calls.before = breaking_off(s3_laptop, "PutObject", "bot/manifest.json")
    with refused(InfrastructureError, FIELD):
        publish(new)
    s3_calls.before = lambda _operation, _key: None

    publish(new)

    assert model_of(inside.read()) == ONE_SHARD


def test_stale_files_are_removed_by_the_next_publication_where_one_was_killed_before_it_did(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path
) -> None:
    publish(shipping(tmp_path / "old", s3_laptop, inside.name, TWO_SHARDS))
    s3_calls.before = breaking_off(s3_laptop, "DeleteObject", "bot/model-torchao/model-1.safetensors")
    with refused(InfrastructureError, FIELD):
        publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))
    s3_calls.before = lambda _operation, _key: None
    newest = ONE_SHARD | {"config.json": b'{"newest": true}'}

    publish(shipping(tmp_path / "newest", s3_laptop, inside.name, newest))

    assert model_of(inside.read()) == newest


@pytest.mark.parametrize("earlier", [None, ONE_SHARD], ids=["the first one", "after another"])
@pytest.mark.parametrize("left", ["model-torchao/model-2.safetensors", "manifest.json"], ids=["in the middle", "at the end"])
def test_what_a_broken_off_publication_has_left_goes_with_the_next(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, left: str, earlier: dict[str, bytes] | None
) -> None:
    if earlier:
        publish(shipping(tmp_path / "earlier", s3_laptop, inside.name, earlier))
    s3_calls.before = breaking_off(s3_laptop, "PutObject", f"bot/{left}")
    with refused(InfrastructureError, FIELD):
        publish(shipping(tmp_path / "broken", s3_laptop, inside.name, TWO_SHARDS | {"chat_template.jinja": b"other"}))
    assert "bot/model-torchao/chat_template.jinja" in inside.listed()
    s3_calls.before = lambda _operation, _key: None

    publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))

    assert model_of(inside.read()) == ONE_SHARD
    assert f"bot/{UNFINISHED}" not in inside.listed()


def test_what_two_broken_off_publications_have_left_goes_with_the_next(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path
) -> None:
    s3_calls.before = breaking_off(s3_laptop, "PutObject", "bot/manifest.json")
    for name in ("first", "second"):
        with refused(InfrastructureError, FIELD):
            publish(shipping(tmp_path / name, s3_laptop, inside.name, ONE_SHARD | {f"{name}.jinja": b"other"}))
    s3_calls.before = lambda _operation, _key: None

    publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))

    assert model_of(inside.read()) == ONE_SHARD


def test_a_file_of_others_that_a_broken_off_publication_would_have_replaced_is_left_alone(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path
) -> None:
    inside.put({"bot/model-torchao/model-2.safetensors": b"mine"})
    s3_calls.before = breaking_off(s3_laptop, "PutObject", "bot/model-torchao/model-1.safetensors")
    with refused(InfrastructureError, FIELD):
        publish(shipping(tmp_path / "broken", s3_laptop, inside.name, TWO_SHARDS))
    s3_calls.before = lambda _operation, _key: None

    publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))

    assert model_of(inside.read()) == ONE_SHARD | {"model-2.safetensors": b"mine"}


@pytest.mark.parametrize(
    "denied", [("GetObject", "HeadObject"), ("GetObject", "HeadObject", "DeleteObject")], ids=["to read", "to read and delete"]
)
def test_keys_that_may_not_read_show_no_reader_a_mixture(
    s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path, denied: tuple[str, ...]
) -> None:
    publish(shipping(tmp_path / "old", s3_laptop, inside.name, TWO_SHARDS))
    refuse, seen = refusing(*denied), []

    def look_and_refuse(operation: str, key: str) -> None:
        seen.append(what_a_reader_sees(inside.read()))
        refuse(operation, key)

    s3_calls.before = look_and_refuse
    publish(shipping(tmp_path / "new", s3_laptop, inside.name, ONE_SHARD))

    assert list(dict.fromkeys(seen)) == ["model-1.safetensors", "nothing", "model.safetensors"]


def test_a_foreign_manifest_deletes_nothing_outside_the_prefix(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    foreign = {"files": [{"path": "../precious"}, {"path": "/precious"}, {"path": ""}]}
    inside.put({"precious": b"mine", "bot/manifest.json": json.dumps(foreign).encode()})

    publish(shipping(tmp_path, s3_laptop, inside.name))

    assert inside.read()["precious"] == b"mine"


def test_a_check_proves_write_access_and_leaves_nothing(s3_laptop: S3Server, inside: Any, s3_calls: Any, tmp_path: Path) -> None:
    destinations.check_write(shipping(tmp_path, s3_laptop, inside.name))

    assert inside.listed() == inside.unfinished() == []
    assert s3_calls.keys("CreateMultipartUpload", "AbortMultipartUpload") == ["bot/manifest.json", "bot/manifest.json"]


def test_a_check_leaves_an_older_publication_as_it_is(s3_laptop: S3Server, inside: Any, tmp_path: Path) -> None:
    ctx = shipping(tmp_path, s3_laptop, inside.name)
    publish(ctx)
    before = inside.read()

    destinations.check_write(ctx)

    assert inside.read() == before


@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_a_bucket_that_does_not_exist_is_an_access_error(s3_laptop: S3Server, tmp_path: Path, call: Callable[[RunContext], Any]) -> None:
    with refused(AccessError, FIELD, "s3://no-such-bucket/bot", "create it or correct its name"):
        call(shipping(tmp_path, s3_laptop, "no-such-bucket"))


@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_a_wrong_secret_key_is_named_and_not_quoted(
    wrong_secret_key: str, s3_here: S3Server, bucket: str, tmp_path: Path, call: Callable[[RunContext], Any]
) -> None:
    with refused(AccessError, FIELD, "AWS_SECRET_ACCESS_KEY", hidden=(wrong_secret_key, s3_here.access_key)):
        call(shipping(tmp_path, s3_here, bucket))


def test_a_server_that_is_out_of_reach_is_an_infrastructure_error(s3_laptop: S3Server, tmp_path: Path) -> None:
    away = S3Server(f"http://127.0.0.1:{free_port('127.0.0.1')}", s3_laptop.access_key, s3_laptop.secret_key)

    with refused(InfrastructureError, FIELD, away.endpoint, "check the endpoint and the network"):
        destinations.check_write(shipping(tmp_path, away, "bucket"))


@pytest.mark.parametrize("size", [1, 64 * MIB, 65 * MIB, 320 * 10**9, 5 * 10**12])
def test_no_file_needs_more_parts_than_s3_takes(size: int) -> None:
    part = s3_upload.part_bytes(size)

    assert part >= 32 * MIB
    assert -(-size // part) <= 10_000


def model_of(arrived: dict[str, bytes]) -> dict[str, bytes]:
    """The quantized model's files among what has arrived."""
    prefix = "bot/model-torchao/"
    return {key.removeprefix(prefix): content for key, content in arrived.items() if key.startswith(prefix)}


def what_a_reader_sees(arrived: dict[str, bytes]) -> str:
    """The first weights that the manifest names, once all that it names is held against its digests; "nothing" without one that names any."""
    listed = json.loads(arrived.get("bot/manifest.json", b"{}")).get("files")
    if not listed:
        return "nothing"
    named = {item["path"]: item["sha256"] for item in listed}
    assert {path: hashlib.sha256(arrived[f"bot/{path}"]).hexdigest() for path in named} == named
    return min(path for path in named if path.startswith("model-torchao/model")).removeprefix("model-torchao/")

"""The checkpoint mirror against a real S3 server: complete or ignored, the newest two, and nothing after success."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError
from finetune_trainer import checkpoints, pipeline
from finetune_trainer.checkpoints import SEAL, Checkpoint
from finetune_trainer.context import RunContext
from finetune_trainer.errors import AccessError, InfrastructureError, SpecError
from finetune_trainer.mirror import Mirror, mirror_location
from finetune_trainer.phases import Phases, Work
from finetune_trainer.plan import Plan
from finetune_trainer.stages import preflight
from support.run_contexts import context, notes, read_files, refused, run_spec, write_files
from support.s3_server import S3Server
from support.tiny_model import tiny_llama
from transformers import TrainerControl

FIELD = "spec.storage.checkpoints.uri"
FACTS = {"tuned": 2.5}


@pytest.fixture
def pod(s3_here: S3Server, inside: Any, mount: Callable[..., Path]) -> Callable[[Path], RunContext]:
    """A pod of the one run whose destination is the bucket, with a working directory of its own."""
    mount("destination-0", AWS_ACCESS_KEY_ID=s3_here.access_key, AWS_SECRET_ACCESS_KEY=s3_here.secret_key)
    where = {"uri": f"s3://{inside.name}/bot", "endpoint": s3_here.endpoint, "credentials": {"secretName": "keys"}}

    def start(folder: Path) -> RunContext:
        return context(folder, run_spec("builtin://smollm2-135m", "builtin://python-docs", where), in_cluster=True)

    return start


@pytest.fixture
def mirror_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The mirror of a run; its client is closed afterwards."""
    opened: list[Mirror] = []

    def open_mirror(ctx: RunContext) -> Mirror:
        mirror = Mirror.of(ctx)
        assert mirror is not None
        opened.append(mirror)
        return mirror

    yield open_mirror
    for mirror in opened:
        mirror.client.close()


def checkpoint(ctx: RunContext, step: int, content: bytes = b"adapter") -> Path:
    """A sealed checkpoint in the run's outputs."""
    files = {"adapter_model.safetensors": content, "nested/rng.pth": b"rng", f"step-{step}": b""}
    folder = write_files(checkpoints.folder_of(ctx.outputs, step), files)
    checkpoints.seal(folder, ctx.job.train_digest, FACTS)
    return folder


def newest(ctx: RunContext) -> Checkpoint | None:
    """What a training resumes from; nothing is passed over."""
    warnings: list[str] = []
    found = checkpoints.newest(ctx.outputs, ctx.job.train_digest, warnings.append)
    assert warnings == []
    return found


def test_a_new_pod_resumes_from_what_an_older_one_has_pushed(pod: Any, mirror_of: Any, tmp_path: Path) -> None:
    old, new = pod(tmp_path / "old"), pod(tmp_path / "new")
    pushed = checkpoint(old, 20)
    mirror_of(old).push(pushed)

    mirror_of(new).fetch_latest(new.outputs, new.reporter.note)

    found = newest(new)
    assert found is not None
    assert (found.step, found.facts) == (20, FACTS)
    assert read_files(found.folder) == read_files(pushed)


def test_the_newest_is_fetched_by_number(pod: Any, mirror_of: Any, tmp_path: Path) -> None:
    old, new = pod(tmp_path / "old"), pod(tmp_path / "new")
    for step in (90, 100):
        mirror_of(old).push(checkpoint(old, step))

    mirror_of(new).fetch_latest(new.outputs, new.reporter.note)

    assert [path.name for path in new.outputs.iterdir()] == ["checkpoint-100"]


def test_an_empty_mirror_gives_nothing(pod: Any, mirror_of: Any, tmp_path: Path) -> None:
    ctx = pod(tmp_path)

    mirror_of(ctx).fetch_latest(ctx.outputs, ctx.reporter.note)

    assert newest(ctx) is None


def test_the_seal_goes_last(pod: Any, mirror_of: Any, s3_calls: Any, tmp_path: Path) -> None:
    ctx = pod(tmp_path)

    mirror_of(ctx).push(checkpoint(ctx, 20))

    assert s3_calls.keys("PutObject")[-1].endswith(f"/checkpoint-20/{SEAL}")


def test_a_checkpoint_that_was_copied_by_half_is_ignored(pod: Any, mirror_of: Any, s3_calls: Any, inside: Any, tmp_path: Path) -> None:
    old, new = pod(tmp_path / "old"), pod(tmp_path / "new")
    mirror_of(old).push(checkpoint(old, 10))

    def break_off(operation: str, key: str) -> None:
        if operation == "PutObject" and key.endswith(SEAL):
            raise EndpointConnectionError(endpoint_url="the server")

    s3_calls.before = break_off
    with refused(InfrastructureError, FIELD, "could not be reached"):
        mirror_of(old).push(checkpoint(old, 20))
    s3_calls.before = lambda _operation, _key: None

    mirror_of(new).fetch_latest(new.outputs, new.reporter.note)

    assert any("checkpoint-20/" in key for key in inside.listed())
    found = newest(new)
    assert found is not None
    assert found.step == 10


def test_only_two_checkpoints_are_kept(pod: Any, mirror_of: Any, inside: Any, tmp_path: Path) -> None:
    ctx = pod(tmp_path)
    for step in (9, 10, 100):
        mirror_of(ctx).push(checkpoint(ctx, step))

    assert {key.split("/")[3] for key in inside.listed()} == {"checkpoint-10", "checkpoint-100"}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(pod: Any, mirror_of: Any, inside: Any, tmp_path: Path) -> None:
    old, new = pod(tmp_path / "old"), pod(tmp_path / "new")
    for step in (10, 20):
        mirror_of(old).push(checkpoint(old, step))
    (damaged,) = [key for key in inside.listed() if key.endswith("checkpoint-20/adapter_model.safetensors")]
    inside.put({damaged: b"other bytes"})

    mirror_of(new).fetch_latest(new.outputs, new.reporter.note)

    found = newest(new)
    assert found is not None
    assert found.step == 10
    assert not [key for key in inside.listed() if "checkpoint-20/" in key]
    assert notes(new) == ["The mirrored checkpoint-20 is passed over: adapter_model.safetensors is damaged."]


@pytest.mark.parametrize(("pruned", "left"), [("checkpoint-20/", 10), ("", None)], ids=["pruned", "all of them"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", SEAL])
def test_a_checkpoint_that_another_run_removes_meanwhile_is_passed_over(
    pod: Any, mirror_of: Any, s3_calls: Any, tmp_path: Path, pruned: str, left: int | None, name: str
) -> None:
    old, new = pod(tmp_path / "old"), pod(tmp_path / "new")
    for step in (10, 20):
        mirror_of(old).push(checkpoint(old, step))
    other = mirror_of(old)

    def remove_first(operation: str, key: str) -> None:
        if operation == "HeadObject" and key.endswith(f"checkpoint-20/{name}"):
            other._delete(pruned)

    s3_calls.before = remove_first
    mirror_of(new).fetch_latest(new.outputs, new.reporter.note)

    found = newest(new)
    assert (found and found.step) == left
    assert notes(new)[0] == "The mirrored checkpoint-20 is passed over: it was removed while it was fetched."
    assert [path.name for path in new.outputs.iterdir()] == ([f"checkpoint-{left}"] if left else [])


def test_a_checkpoint_that_is_damaged_on_its_way_is_fetched_again(
    pod: Any, mirror_of: Any, inside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = pod(tmp_path / "old"), pod(tmp_path / "new")
    mirror_of(old).push(checkpoint(old, 20))
    mirror = mirror_of(new)
    download, waiting = mirror.client.download_file, [True]

    def download_once_badly(bucket: str, key: str, target: str) -> None:
        download(bucket, key, target)
        if waiting and target.endswith(".safetensors"):
            waiting.clear()
            Path(target).write_bytes(b"other bytes")

    monkeypatch.setattr(mirror.client, "download_file", download_once_badly)
    mirror.fetch_latest(new.outputs, new.reporter.note)

    found = newest(new)
    assert found is not None
    assert found.step == 20
    assert [key for key in inside.listed() if "checkpoint-20/" in key]
    assert notes(new) == []


def test_each_checkpoint_is_pushed_with_the_keys_of_its_own_time(pod: Any, inside: Any, mount: Callable[..., Path], tmp_path: Path) -> None:
    """A Secret with a session token is renewed every hour or so, a training takes many."""
    ctx = pod(tmp_path)
    secret = (mount("destination-0") / "AWS_SECRET_ACCESS_KEY").read_text()
    phases = Phases(Work(ctx, tiny_llama(), (), (), Plan(4, 4, 1, 1, 1), "inputs", None))

    def save(step: int) -> list[str]:
        """The steps in the mirror once this one was saved."""
        write_files(checkpoints.folder_of(ctx.outputs, step), {"adapter_model.safetensors": b"adapter"})
        phases.on_save(SimpleNamespace(output_dir=str(ctx.outputs)), SimpleNamespace(global_step=step), TrainerControl())
        return sorted({key.split("/checkpoint-")[1].split("/")[0] for key in inside.listed()})

    assert save(1) == ["1"]
    mount("destination-0", AWS_SECRET_ACCESS_KEY="expired")
    assert save(2) == ["1"]
    assert "The checkpoint of step 2 was not mirrored" in notes(ctx)[-1]
    mount("destination-0", AWS_SECRET_ACCESS_KEY=secret)
    assert save(3) == ["1", "3"]


def test_a_push_removes_later_steps_that_were_passed_over(pod: Any, mirror_of: Any, inside: Any, tmp_path: Path) -> None:
    old, new = pod(tmp_path / "old"), pod(tmp_path / "new")
    for step in (30, 40):
        mirror_of(old).push(checkpoint(old, step))

    mirror_of(new).push(checkpoint(new, 10))

    assert {key.split("/checkpoint-")[1].split("/")[0] for key in inside.listed()} == {"10"}


def test_a_seal_is_deleted_before_what_it_seals(pod: Any, mirror_of: Any, s3_calls: Any, tmp_path: Path) -> None:
    ctx = pod(tmp_path)
    for step in (1, 2, 3):
        mirror_of(ctx).push(checkpoint(ctx, step))

    assert s3_calls.keys("DeleteObject")[0].endswith(f"/checkpoint-1/{SEAL}")


def test_pushing_twice_sends_nothing_new(pod: Any, mirror_of: Any, s3_calls: Any, tmp_path: Path) -> None:
    ctx = pod(tmp_path)
    folder = checkpoint(ctx, 20)
    mirror_of(ctx).push(folder)
    s3_calls.made.clear()

    mirror_of(ctx).push(folder)

    assert s3_calls.keys("PutObject") == []


def test_after_success_nothing_is_left(pod: Any, mirror_of: Any, inside: Any, tmp_path: Path) -> None:
    inside.put({"bot/model.safetensors": b"published", "bot/.checkpoints/other-training/a": b"another job's"})
    ctx = pod(tmp_path)
    for step in (10, 20):
        mirror_of(ctx).push(checkpoint(ctx, step))

    mirror_of(ctx).remove()

    assert inside.listed() == ["bot/.checkpoints/other-training/a", "bot/model.safetensors"]
    assert inside.unfinished() == []


@pytest.mark.parametrize("end", ["removed", "pushed"])
def test_a_half_sent_file_of_a_checkpoint_is_not_left(pod: Any, mirror_of: Any, inside: Any, tmp_path: Path, end: str) -> None:
    ctx = pod(tmp_path)
    mirror = mirror_of(ctx)
    others = "bot/.checkpoints/other-training/checkpoint-10/optimizer.pt"
    for key in (f"{mirror.where.path}/checkpoint-10/optimizer.pt", others):
        inside.client.create_multipart_upload(Bucket=inside.name, Key=key, ChecksumAlgorithm="SHA256")

    if end == "pushed":
        mirror.push(checkpoint(ctx, 20))
    else:
        mirror.remove()

    assert inside.unfinished() == [others]


def test_a_removal_that_is_refused_fails_no_run_that_is_published(pod: Any, mirror_of: Any, s3_calls: Any, tmp_path: Path) -> None:
    ctx = pod(tmp_path)
    mirror_of(ctx).push(checkpoint(ctx, 10))

    def before(operation: str, _: str) -> None:
        if operation == "DeleteObject":
            raise ClientError({"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, operation)

    s3_calls.before = before
    pipeline.remove_mirror(ctx)

    assert len(notes(ctx)) == 1


def test_checkpoints_that_can_not_be_listed_are_found_before_training(pod: Any, mirror_of: Any, s3_calls: Any, tmp_path: Path) -> None:
    def refuse(operation: str, _: str) -> None:
        if operation == "ListObjectsV2":
            raise ClientError({"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, operation)

    s3_calls.before = refuse
    with refused(AccessError, FIELD, "AccessDenied"):
        preflight.check_mirror(pod(tmp_path))


def test_a_fetch_that_breaks_off_leaves_no_checkpoint(pod: Any, mirror_of: Any, s3_calls: Any, tmp_path: Path) -> None:
    old, new = pod(tmp_path / "old"), pod(tmp_path / "new")
    mirror_of(old).push(checkpoint(old, 20))

    def break_off(operation: str, key: str) -> None:
        if operation == "HeadObject" and key.endswith("rng.pth"):
            raise EndpointConnectionError(endpoint_url="the server")

    s3_calls.before = break_off
    with refused(InfrastructureError, FIELD, "could not be reached"):
        mirror_of(new).fetch_latest(new.outputs, new.reporter.note)

    assert newest(new) is None


def test_a_wrong_key_is_an_access_error(pod: Any, mirror_of: Any, mount: Callable[..., Path], tmp_path: Path) -> None:
    mount("destination-0", AWS_SECRET_ACCESS_KEY="wrong-secret")
    ctx = pod(tmp_path)

    with refused(AccessError, FIELD, "AWS_SECRET_ACCESS_KEY", hidden=("wrong-secret",)):
        mirror_of(ctx).push(checkpoint(ctx, 20))


def test_an_endpoint_that_is_no_url_is_a_spec_error(mount: Callable[..., Path], tmp_path: Path) -> None:
    spec = run_spec(storage={"checkpoints": {"uri": "s3://bucket/checkpoints", "endpoint": "https://-"}})

    with refused(SpecError, FIELD, "'https://-'"):
        Mirror.of(context(tmp_path, spec, in_cluster=True))


S3 = {"uri": "s3://models/bot/", "endpoint": "https://s3.example.com", "credentials": {"secretName": "write-keys"}}
HUB = {"uri": "hf://acme/bot", "credentials": {"secretName": "hub-token"}}
OPEN_S3 = {"uri": "s3://models/bot"}
OWN = {"uri": "s3://scratch/c/", "endpoint": "https://other.example.com", "credentials": {"secretName": "scratch-keys"}}

# What is in the spec, and (root, role, secret, endpoint) of the mirror.
LOCATIONS: list[tuple[str, list[dict[str, Any]], dict[str, Any], tuple[str, str, str, str] | None]] = [
    (
        "under the first s3 destination, with its credentials and endpoint",
        [HUB, S3],
        {},
        ("s3://models/bot/.checkpoints", "destination-1", "write-keys", "https://s3.example.com"),
    ),
    ("an s3 destination without a Secret", [OPEN_S3], {}, ("s3://models/bot/.checkpoints", "destination-0", "", "")),
    ("no s3 destination", [HUB], {}, None),
    (
        "an address of its own",
        [S3],
        {"checkpoints": OWN},
        ("s3://scratch/c", "checkpoints", "scratch-keys", "https://other.example.com"),
    ),
    (
        "an address of its own, opened as the first s3 destination is",
        [HUB, S3],
        {"checkpoints": {"uri": "s3://scratch"}},
        ("s3://scratch", "destination-1", "write-keys", "https://s3.example.com"),
    ),
    (
        "an address of its own without any s3 destination",
        [HUB],
        {"checkpoints": OWN},
        ("s3://scratch/c", "checkpoints", "scratch-keys", "https://other.example.com"),
    ),
    ("a workspace that lasts", [S3], {"workspace": {"persistentVolumeClaim": "work"}}, None),
    ("a workspace that lasts, and an address", [S3], {"workspace": {"persistentVolumeClaim": "work"}, "checkpoints": OWN}, None),
]


@pytest.mark.parametrize(("destinations", "storage", "expected"), [case[1:] for case in LOCATIONS], ids=[case[0] for case in LOCATIONS])
def test_where_a_pod_s_checkpoints_are_mirrored(
    tmp_path: Path, destinations: list[dict[str, Any]], storage: dict[str, Any], expected: tuple[str, str, str, str] | None
) -> None:
    spec = run_spec("builtin://smollm2-135m", "builtin://python-docs", *destinations, storage=storage)
    ctx = context(tmp_path, spec, in_cluster=True)

    where = mirror_location(ctx)

    root, role, secret, endpoint = expected or ("", "", "", "")
    found = where and (where.uri, where.role, where.secret, where.endpoint)
    assert found == (expected and (f"{root}/{ctx.job.train_digest}", role, secret, endpoint))


def test_a_laptop_mirrors_nothing(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec("builtin://smollm2-135m", "builtin://python-docs", S3, storage={"checkpoints": OWN}))

    assert mirror_location(ctx) is None
    assert Mirror.of(ctx) is None


def test_two_trainings_never_share_a_mirror(tmp_path: Path) -> None:
    specs = [run_spec("builtin://smollm2-135m", "builtin://python-docs", S3, training={"seed": seed}) for seed in (1, 2)]

    first, second = (mirror_location(context(tmp_path, spec, in_cluster=True)) for spec in specs)

    assert first is not None
    assert second is not None
    assert first.uri != second.uri

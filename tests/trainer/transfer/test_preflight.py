"""Preflight against real servers: where checkpoints outlast the pod, what is downloaded and what stays, and that destinations stay as they were."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_api import termination
from finetune_trainer import pipeline, sources
from finetune_trainer.context import RunContext
from finetune_trainer.errors import AccessError, DataError, SpecError
from finetune_trainer.reporting import session
from finetune_trainer.stages import preflight
from support.hub_server import HubServer
from support.run_contexts import context, notes, read_files, refused, run_spec
from support.s3_server import S3Server
from support.tiny_model import save_tiny_model, sums, write_jsonl

WEIGHTS = "model.safetensors"
CACHE_CLAIM = {"storage": {"cache": {"persistentVolumeClaim": "models"}}}


def test_a_mirror_that_may_not_be_written_is_found_before_training(s3_here: S3Server, mount: Callable[..., Path], tmp_path: Path) -> None:
    mount("checkpoints", AWS_ACCESS_KEY_ID=s3_here.access_key, AWS_SECRET_ACCESS_KEY="wrong")
    mirror = {"uri": "s3://bucket/aside", "endpoint": s3_here.endpoint, "credentials": {"secretName": "aside"}}
    ctx = context(tmp_path, run_spec(storage={"checkpoints": mirror}), in_cluster=True)
    with refused(AccessError, "spec.storage.checkpoints.uri", "AWS_SECRET_ACCESS_KEY"):
        preflight.check_mirror(ctx)


def test_the_default_mirror_leaves_nothing_behind(s3_here: S3Server, inside: Any, mount: Callable[..., Path], tmp_path: Path) -> None:
    mount("destination-0", AWS_ACCESS_KEY_ID=s3_here.access_key, AWS_SECRET_ACCESS_KEY=s3_here.secret_key)
    where = {"uri": f"s3://{inside.name}/bot", "endpoint": s3_here.endpoint, "credentials": {"secretName": "keys"}}
    preflight.check_mirror(context(tmp_path, run_spec("builtin://smollm2-135m", "builtin://python-docs", where), in_cluster=True))
    assert inside.listed() == []


def test_a_run_whose_checkpoints_end_with_its_pod_says_so(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec("builtin://smollm2-135m", "builtin://python-docs", {"uri": "hf://acme/bot"}), in_cluster=True)
    preflight.check_mirror(ctx)
    assert "storage.checkpoints.uri" in notes(ctx)[0]


def test_a_claim_needs_no_mirror(tmp_path: Path) -> None:
    storage = {"workspace": {"persistentVolumeClaim": "mine"}}
    ctx = context(
        tmp_path, run_spec("builtin://smollm2-135m", "builtin://python-docs", {"uri": "hf://acme/bot"}, storage=storage), in_cluster=True
    )
    preflight.check_mirror(ctx)
    assert notes(ctx) == []


@pytest.fixture(scope="session")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a tiny model, and rows.jsonl."""
    folder = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    write_jsonl(folder / "rows.jsonl", sums(40))
    return read_files(folder)


Pod = Callable[..., RunContext]


@pytest.fixture
def pod(
    s3_here: S3Server,
    inside: Any,
    tiny_files: dict[str, bytes],
    mount: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Pod:
    """A pod's run with model, rows and destination in one bucket, each with its Secret; keyword arguments are whole parts of its spec."""
    inside.put({f"base/{name}": content for name, content in tiny_files.items()})
    for role in ("model", "dataset", "destination-0"):
        mount(role, AWS_ACCESS_KEY_ID=s3_here.access_key, AWS_SECRET_ACCESS_KEY=s3_here.secret_key)
    monkeypatch.setenv(session.ENV_TERMINATION_LOG, str(tmp_path / "termination-log"))
    access = {"endpoint": s3_here.endpoint, "credentials": {"secretName": "keys"}}

    def make(**more: Any) -> RunContext:
        where = {"uri": f"s3://{inside.name}/bot", **access}
        spec = run_spec(f"s3://{inside.name}/base", f"s3://{inside.name}/base/rows.jsonl", where)
        spec["model"] |= access
        spec["dataset"] |= access
        small = {"training": {"batchSize": 8, "maxLength": 64}, "outputs": {"artifacts": ["adapter"], "destinations": [where]}}
        return context(tmp_path, spec | small | more, in_cluster=True)

    return make


def check(ctx: RunContext) -> termination.TerminationMessage:
    """Runs the pod's preflight and returns its last word, which is read as the operator reads it."""
    pipeline.preflight(ctx.job, ctx.workdir, ctx.cache)
    message = termination.parse((ctx.workdir.parent / "termination-log").read_text())
    assert message is not None
    return message


def test_a_pods_preflight_leaves_nothing_at_the_destination(pod: Pod, inside: Any) -> None:
    before = inside.read()
    message = check(pod())
    assert (message.reason, message.exit_code) == ("Succeeded", 0)
    assert inside.read() == before
    assert inside.unfinished() == []


def test_a_pods_preflight_says_which_revisions_it_saw_and_what_it_could_not_check(pod: Pod) -> None:
    ctx = pod()
    message = check(ctx)
    assert message.model == sources.fetch_model(ctx).resolved
    assert message.dataset == sources.fetch_dataset(ctx).resolved
    assert message.message.startswith("Not checked: whether the training fits into the GPU's memory (resources.gpuType is not set)")


def test_a_pods_preflight_answers_on_no_port(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "serving", lambda *_: pytest.fail("a port was opened"))
    check(pod())


def test_without_a_lasting_cache_no_weights_are_downloaded(pod: Pod, s3_calls: Any) -> None:
    check(pod())
    assert f"base/{WEIGHTS}" not in s3_calls.keys("GetObject", "HeadObject")


def test_a_lasting_cache_is_filled_once_and_serves_the_run(pod: Pod, s3_calls: Any) -> None:
    ctx = pod(**CACHE_CLAIM, resources={"gpus": 0})
    check(ctx)
    assert s3_calls.keys("GetObject").count(f"base/{WEIGHTS}") == 1
    s3_calls.made.clear()
    report = pipeline.run(ctx.job, ctx.workdir, ctx.cache)
    assert report["training"]["steps"] == 5
    assert f"base/{WEIGHTS}" not in s3_calls.keys("GetObject", "HeadObject")


def test_what_is_refused_for_the_models_sake_costs_no_weights_even_with_a_lasting_cache(pod: Pod, s3_calls: Any) -> None:
    with refused(SpecError, "spec.lora.targetModules", "no_such_proj", "q_proj"):
        check(pod(**CACHE_CLAIM, lora={"targetModules": "no_such_proj"}))
    assert f"base/{WEIGHTS}" not in s3_calls.keys("GetObject", "HeadObject")


def test_damaged_weights_are_found_where_they_are_downloaded(pod: Pod, inside: Any, tiny_files: dict[str, bytes]) -> None:
    inside.put({f"base/{WEIGHTS}": tiny_files[WEIGHTS][:-100]})
    with refused(DataError, "does not load"):
        check(pod(**CACHE_CLAIM))


def test_a_destination_that_may_not_be_written_ends_with_its_sentence(pod: Pod, mount: Callable[..., Path], tmp_path: Path) -> None:
    ctx = pod()
    mount("destination-0", AWS_SECRET_ACCESS_KEY="wrong")
    with refused(AccessError, "spec.outputs.destinations[0].uri", "AWS_SECRET_ACCESS_KEY"):
        check(ctx)
    message = termination.parse((tmp_path / "termination-log").read_text())
    assert message is not None
    assert (message.stage.value, message.reason, message.exit_code) == ("Preflight", "AccessDenied", 12)


@pytest.mark.parametrize(("storage", "expected"), [({}, 0), (CACHE_CLAIM["storage"], 1)])
def test_weights_of_the_hub_are_downloaded_for_a_lasting_cache_alone(
    hub: HubServer, mount: Callable[..., Path], tiny_files: dict[str, bytes], tmp_path: Path, storage: dict[str, Any], expected: int
) -> None:
    commit = hub.put("acme/base", tiny_files)
    hub.put("acme/rows", {"rows.jsonl": tiny_files["rows.jsonl"]}, kind="dataset")
    mount("destination-0", HF_TOKEN=hub.token)
    where = {"uri": "hf://acme/bot", "credentials": {"secretName": "token"}}
    ctx = context(tmp_path, run_spec("hf://acme/base", "hf://acme/rows/rows.jsonl", where, storage=storage), in_cluster=True)
    asked: list[str] = []
    hub.refuse = lambda method, path: asked.append(f"{method} {path.rpartition('/')[2]}")
    found = pipeline.preflight(ctx.job, ctx.workdir, ctx.cache)
    assert found.model == f"hf://acme/base@{commit}"
    assert asked.count(f"GET {WEIGHTS}") == expected
    assert sources.fetch_model(ctx).resolved == found.model
    assert asked.count(f"GET {WEIGHTS}") == 1
    assert ("model", "acme/bot") not in hub.repositories

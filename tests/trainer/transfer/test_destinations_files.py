"""file:// destinations: all or nothing, and nobody's folder is ever replaced but an earlier publication."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import destinations
from finetune_trainer.context import RunContext
from finetune_trainer.errors import AccessError, CapacityError, NotPublishedError, SpecError
from finetune_trainer.sources.location import destinations as locations
from support.run_contexts import (
    CONFIG,
    MODEL_FILES,
    WEIGHTS,
    context,
    read_files,
    refused,
    report_of,
    run_spec,
    write_artifacts,
    write_files,
)

FIELD = "spec.outputs.destinations[0].uri"
TWO_SHARDS = {"config.json": b"{}", "model-1.safetensors": b"one", "model-2.safetensors": b"two"}


def shipping(folder: Path, target: Path, model: dict[str, bytes] | None = None) -> RunContext:
    """A finished run on a laptop that goes to `target`; `model` are the quantized model's files."""
    ctx = context(folder, run_spec("hf://acme/base", "builtin://python-docs", {"uri": f"file://{target}"}))
    write_artifacts(ctx, report_of(ctx), model=model)
    return ctx


def publish(ctx: RunContext) -> tuple[Any, ...]:
    """Publishes to the run's only destination."""
    return destinations.publish(ctx, locations(ctx.job)[0], report_of(ctx))


def breaking_off(monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    """The second file can't be copied."""
    copied: list[Path] = []

    def copy(source: Path, target: Path) -> None:
        if copied:
            raise error
        copied.append(target)
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", copy)


def test_the_artifacts_arrive_as_they_are(tmp_path: Path) -> None:
    target = tmp_path / "out" / "bot"

    publish(shipping(tmp_path, target))

    arrived = read_files(target)
    assert {name: arrived[f"model-torchao/{name}"] for name in MODEL_FILES} == MODEL_FILES
    assert {item["path"] for item in json.loads(arrived["manifest.json"])["files"]} == set(arrived) - {"manifest.json"}


def test_nothing_is_left_beside_the_destination(tmp_path: Path) -> None:
    target = tmp_path / "out" / "bot"

    publish(shipping(tmp_path, target))

    assert list(target.parent.iterdir()) == [target]


def test_each_artifact_is_reported_with_its_address(tmp_path: Path) -> None:
    adapter, quantized = publish(shipping(tmp_path, tmp_path / "bot"))

    assert adapter.uri == f"file://{tmp_path}/bot/lora_model"
    assert quantized.uri == f"file://{tmp_path}/bot/model-torchao"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "bot").mkdir()

    publish(shipping(tmp_path, tmp_path / "bot"))

    assert (tmp_path / "bot" / "manifest.json").is_file()


def test_a_copy_that_breaks_off_leaves_no_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx = shipping(tmp_path, tmp_path / "bot")
    breaking_off(monkeypatch, OSError(28, "No space left on device"))

    with refused(CapacityError, FIELD, "the disk is full"):
        publish(ctx)
    assert not (tmp_path / "bot").exists()


def test_a_copy_that_breaks_off_leaves_the_older_publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(shipping(tmp_path / "old", tmp_path / "bot", TWO_SHARDS))
    before = read_files(tmp_path / "bot")
    ctx = shipping(tmp_path / "new", tmp_path / "bot")
    breaking_off(monkeypatch, OSError(28, "No space left on device"))

    with refused(CapacityError, FIELD, "the disk is full"):
        publish(ctx)
    assert read_files(tmp_path / "bot") == before


def test_a_copy_that_broke_off_is_made_anew_by_the_next(tmp_path: Path) -> None:
    ctx = shipping(tmp_path, tmp_path / "bot")
    write_files(tmp_path / ".bot.partial", {"model-torchao/model-9.safetensors": b"of an older model"})

    publish(ctx)

    assert read_files(tmp_path / "bot" / "model-torchao") == MODEL_FILES
    assert not list(tmp_path.glob(".bot*"))


def test_a_newer_model_replaces_the_older_one_wholly(tmp_path: Path) -> None:
    publish(shipping(tmp_path / "old", tmp_path / "bot", TWO_SHARDS))
    new = {"config.json": CONFIG, "model.safetensors": WEIGHTS}

    publish(shipping(tmp_path / "new", tmp_path / "bot", new))

    assert read_files(tmp_path / "bot" / "model-torchao") == new


def test_what_somebody_has_deleted_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "bot"
    ctx = shipping(tmp_path, target)
    publish(ctx)
    before = read_files(target)
    (target / "model-torchao" / "config.json").unlink()

    publish(ctx)

    assert read_files(target) == before


def test_the_same_publication_touches_nothing(tmp_path: Path) -> None:
    target = tmp_path / "bot"
    first = publish(shipping(tmp_path, target))
    before = {path: path.stat().st_mtime_ns for path in [target, *target.rglob("*")]}

    assert publish(shipping(tmp_path, target)) == first
    assert {path: path.stat().st_mtime_ns for path in [target, *target.rglob("*")]} == before


FOREIGN: list[tuple[str, dict[str, bytes]]] = [
    ("a folder with files", {"bot/thesis.txt": b"mine"}),
    ("a file", {"bot": b"mine"}),
    ("somebody else's manifest", {"bot/manifest.json": b'{"name": "web app"}', "bot/thesis.txt": b"mine"}),
    ("a manifest that is no JSON", {"bot/manifest.json": b"\xff", "bot/thesis.txt": b"mine"}),
    ("a publication with a file of somebody's in it", {"bot/manifest.json": b'{"files": [{"path": "a"}]}', "bot/a": b"", "bot/b": b"mine"}),
]


@pytest.mark.parametrize("files", [case[1] for case in FOREIGN], ids=[case[0] for case in FOREIGN])
@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_what_is_not_an_earlier_publication_is_refused_and_kept(
    tmp_path: Path, files: dict[str, bytes], call: Callable[[RunContext], Any]
) -> None:
    write_files(tmp_path / "there", files)

    with refused(SpecError, FIELD, str(tmp_path / "there" / "bot"), "is not an earlier publication", "choose a new folder"):
        call(shipping(tmp_path, tmp_path / "there" / "bot"))
    assert read_files(tmp_path / "there") == files


@pytest.mark.parametrize("below", ["work", "work/lora_model", "work/..", ".", "work/deep/../../work"])
@pytest.mark.parametrize("call", [destinations.check_write, publish])
def test_a_destination_inside_the_working_directory_or_around_it_is_refused(
    tmp_path: Path, below: str, call: Callable[[RunContext], Any]
) -> None:
    with refused(SpecError, FIELD, "working directory", "choose a folder outside"):
        call(shipping(tmp_path, tmp_path / below))


def test_a_link_into_the_working_directory_is_refused(tmp_path: Path) -> None:
    ctx = shipping(tmp_path, tmp_path / "link" / "bot")
    (tmp_path / "link").symlink_to(ctx.workdir)

    with refused(SpecError, FIELD, "working directory"):
        publish(ctx)


def test_a_file_destination_in_a_cluster_is_refused(tmp_path: Path) -> None:
    spec = run_spec("hf://acme/base", "builtin://python-docs", {"uri": "file:///published"})

    with refused(SpecError, FIELD, "only on a laptop", "use s3:// or hf://"):
        destinations.check_write(context(tmp_path, spec, in_cluster=True))


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    destinations.check_write(shipping(tmp_path, tmp_path / "out" / "bot"))

    assert not (tmp_path / "out").exists()


def test_a_folder_that_may_not_be_written_is_an_access_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)

    with refused(AccessError, FIELD, str(tmp_path), "is not writable", "choose another folder"):
        destinations.check_write(shipping(tmp_path, tmp_path / "out" / "bot"))


def test_a_destination_below_a_file_is_found_out_by_the_check(tmp_path: Path) -> None:
    write_files(tmp_path, {"out": b"a file"})

    with refused(AccessError, FIELD, str(tmp_path / "out"), "is not writable"):
        destinations.check_write(shipping(tmp_path, tmp_path / "out" / "bot"))


def test_an_artifact_that_is_gone_is_not_published(tmp_path: Path) -> None:
    ctx = shipping(tmp_path, tmp_path / "bot")
    shutil.rmtree(ctx.quantized)

    with refused(NotPublishedError, "quantized", str(ctx.quantized), "run the job again"):
        publish(ctx)
    assert not (tmp_path / "bot").exists()

"""The manifest: the same run gives the same bytes, and one that comes from outside names only safe paths."""

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.spec import Artifact
from finetune_trainer.destinations.layout import folders, layout
from finetune_trainer.destinations.manifest import PublishedFile, manifest_bytes, named_files, publication
from support.run_contexts import context, report_of, run_spec, write_artifacts, write_files

FILES = {"a.safetensors": b"weights", "z/config.json": b"{}"}


def placed(folder: Path) -> dict[str, Path]:
    """Two files and where they go to."""
    write_files(folder, FILES)
    return {path: folder / path for path in FILES}


def test_the_bytes_do_not_depend_on_the_order_of_the_files(tmp_path: Path) -> None:
    ctx, files = context(tmp_path, run_spec()), placed(tmp_path / "files")

    forwards = publication(ctx.job, report_of(ctx), files)

    assert publication(ctx.job, report_of(ctx), dict(reversed(files.items()))) == forwards


def test_the_bytes_do_not_depend_on_where_and_when_the_run_was(tmp_path: Path) -> None:
    here, there = (context(tmp_path / name, run_spec()) for name in ("here", "there"))
    later = report_of(there, seconds={"Training": 5.0}, peakMemoryBytes=1)

    first = publication(here.job, report_of(here), placed(tmp_path / "a"))

    assert publication(there.job, later, placed(tmp_path / "b")).manifest == first.manifest


def test_the_bytes_are_sorted_json_with_a_line_s_end(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec())

    manifest = publication(ctx.job, report_of(ctx), placed(tmp_path)).manifest

    assert manifest == (json.dumps(json.loads(manifest), indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def test_it_says_what_the_files_were_made_from(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec())

    document = json.loads(manifest_bytes(ctx.job, report_of(ctx), ()))

    assert document["formatVersion"] == 1
    assert (document["trainDigest"], document["runDigest"]) == (ctx.job.train_digest, ctx.job.run_digest)
    assert document["sources"] == report_of(ctx)["sources"]
    assert document["losses"] == report_of(ctx)["losses"]


def test_another_content_has_another_digest(tmp_path: Path) -> None:
    ctx, files = context(tmp_path, run_spec()), placed(tmp_path)
    before = publication(ctx.job, report_of(ctx), files)
    (tmp_path / "z" / "config.json").write_bytes(b"[]")

    assert publication(ctx.job, report_of(ctx), files).digest != before.digest


def test_a_file_is_described_by_its_digest_and_size(tmp_path: Path) -> None:
    write_files(tmp_path, {"empty": b""})

    described = PublishedFile.of("some/empty", tmp_path / "empty")

    assert described.sha256 == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert (described.path, described.bytes) == ("some/empty", 0)


@pytest.mark.parametrize(("folder", "size"), [("", 9), ("z", 2), ("a", 0)])
def test_bytes_are_counted_below_a_folder_and_not_below_its_namesakes(tmp_path: Path, folder: str, size: int) -> None:
    ctx = context(tmp_path, run_spec())

    assert publication(ctx.job, report_of(ctx), placed(tmp_path)).bytes_under(folder) == size


def test_a_manifest_of_ours_names_its_files(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec())

    assert named_files(publication(ctx.job, report_of(ctx), placed(tmp_path)).manifest) == set(FILES)


@pytest.mark.parametrize("path", ["../other/model.safetensors", "a/../../b", "/etc/passwd", "", 7, None, ["a"], {"a": 1}])
def test_an_unsafe_path_of_a_foreign_manifest_is_ignored(path: Any) -> None:
    foreign = json.dumps({"files": [{"path": path}, {"path": "model.safetensors"}]}).encode()

    assert named_files(foreign) == {"model.safetensors"}


@pytest.mark.parametrize(
    "foreign", [b"", b"\xff", b"[]", b"null", b"7", b'{"files": 7}', b'{"files": ["a"]}', b'{"files": [{}]}', b'{"name": "web app"}']
)
def test_what_is_not_a_manifest_of_ours_names_nothing(foreign: bytes) -> None:
    assert named_files(foreign) == frozenset()


ADAPTER, QUANTIZED = Artifact.ADAPTER, Artifact.QUANTIZED
FOLDERS: list[tuple[tuple[Artifact, ...], bool, dict[Artifact, str]]] = [
    ((ADAPTER, QUANTIZED), False, {ADAPTER: "lora_model", QUANTIZED: "model-torchao"}),
    ((ADAPTER, QUANTIZED), True, {ADAPTER: "lora_model", QUANTIZED: ""}),
    ((ADAPTER,), True, {ADAPTER: ""}),
    ((QUANTIZED,), True, {QUANTIZED: ""}),
    ((ADAPTER,), False, {ADAPTER: "lora_model"}),
]


@pytest.mark.parametrize(("wanted", "hub", "expected"), FOLDERS)
def test_where_the_artifacts_stand(wanted: tuple[Artifact, ...], hub: bool, expected: dict[Artifact, str]) -> None:
    assert folders(wanted, hub=hub) == expected


def test_only_what_was_asked_for_is_laid_out(tmp_path: Path) -> None:
    spec = run_spec()
    spec["outputs"]["artifacts"] = ["adapter"]
    ctx = context(tmp_path, spec)
    write_artifacts(ctx, report_of(ctx))

    paths = set(layout(ctx, tmp_path / "card.md", hub=False))

    assert paths == {"lora_model/adapter_config.json", "lora_model/adapter_model.safetensors", "README.md", "report.json"}


def test_hidden_files_and_other_cards_are_left_out(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec())
    write_artifacts(ctx, report_of(ctx))
    write_files(ctx.quantized, {".cache/lock": b"", ".hidden": b"", "README.md": b"another card"})

    placed_files = layout(ctx, tmp_path / "card.md", hub=True)

    assert not [path for path in placed_files if path.startswith(".")]
    assert placed_files["README.md"] == tmp_path / "card.md"

"""file://, pvc:// and configmap:// sources: taken where they lie, refused where they do not belong."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import sources
from finetune_trainer.errors import AccessError, DataError, SpecError
from finetune_trainer.sources import local
from finetune_trainer.sources.location import Location
from support.run_contexts import CONFIG, MODEL_FILES, context, read_files, refused, run_spec, write_files

ROWS = b'{"text": "one"}\n'


def test_a_model_of_this_machine_is_used_where_it_lies(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "base", MODEL_FILES)

    fetched = sources.fetch_model(context(tmp_path, run_spec(f"file://{folder}")))

    assert (fetched.path, fetched.resolved) == (folder, f"file://{folder}")


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        (b"---\nlicense: apache-2.0\ntags: [a]\n---\n# base", {"license": "apache-2.0"}),
        (b"---\nlicense: [mit, apache-2.0]\n---\n", {"license": ["mit", "apache-2.0"]}),
        (
            b"---\nlicense: other\nlicense_name: acme\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "acme", "license_link": "LICENSE"},
        ),
        (b"---\nlicense_link: LICENSE\n---\n", {}),
        (b"---\n- license\n---\n", {}),
        (b"---\nlicense: [\n---\n", {}),
        (b"# no front matter", {}),
        (b"\xff", {}),
    ],
)
def test_what_a_models_card_states_of_its_licence_is_kept(tmp_path: Path, readme: bytes, license: dict[str, Any]) -> None:  # noqa: A002
    folder = write_files(tmp_path / "base", MODEL_FILES | {"README.md": readme})

    assert sources.fetch_model(context(tmp_path, run_spec(f"file://{folder}"))).license == license


def test_a_dataset_of_this_machine_is_resolved_to_its_digest(tmp_path: Path) -> None:
    path = write_files(tmp_path, {"rows.jsonl": ROWS}) / "rows.jsonl"
    ctx = context(tmp_path, run_spec(dataset=f"file://{path}"))
    first = sources.fetch_dataset(ctx)
    path.write_bytes(ROWS * 2)

    second = sources.fetch_dataset(ctx)

    assert first.path == second.path == path
    assert first.resolved == f"file://{path}?sha256={hashlib.sha256(ROWS).hexdigest()}"
    assert second.resolved == f"file://{path}?sha256={hashlib.sha256(ROWS * 2).hexdigest()}"


def test_a_claim_is_read_where_it_is_mounted(volumes: Path, tmp_path: Path) -> None:
    write_files(volumes / "model" / "smol" / "base", MODEL_FILES)

    fetched = sources.fetch_model(context(tmp_path, run_spec("pvc://models/smol/base"), in_cluster=True))

    assert read_files(fetched.path) == MODEL_FILES


def test_a_configmap_is_read_where_it_is_mounted(volumes: Path, tmp_path: Path) -> None:
    write_files(volumes / "dataset", {"rows.jsonl": ROWS})

    fetched = sources.fetch_dataset(context(tmp_path, run_spec(dataset="configmap://corpus/rows.jsonl"), in_cluster=True))

    assert fetched.path.read_bytes() == ROWS


def test_held_out_data_has_a_mount_of_its_own(volumes: Path, tmp_path: Path) -> None:
    write_files(volumes, {"dataset/rows.jsonl": ROWS, "evaluation/rows.jsonl": ROWS * 2})
    spec = run_spec(dataset="pvc://corpus/rows.jsonl")
    spec["dataset"]["evaluation"] = {"source": "configmap://held-out/rows.jsonl"}

    fetched = sources.fetch_evaluation(context(tmp_path, spec, in_cluster=True))

    assert fetched is not None
    assert fetched.path.read_bytes() == ROWS * 2


MISPLACED: list[tuple[str, str, bool, tuple[str, ...]]] = [
    ("a file in a cluster", "file:///data/rows.jsonl", True, ("only on a laptop", "use s3://, hf://, pvc:// or builtin://")),
    ("a claim on a laptop", "pvc://corpus/rows.jsonl", False, ("only in a cluster", "use file:// here")),
    ("a configmap on a laptop", "configmap://corpus/rows.jsonl", False, ("only in a cluster", "use file:// here")),
    ("a path that leaves its claim", "pvc://corpus/../../../etc/passwd", True, ("must stay inside its volume", "remove '..'")),
    ("a path that leaves its configmap", "configmap://corpus/a/../../b", True, ("must stay inside its volume", "remove '..'")),
]


@pytest.mark.parametrize(("uri", "in_cluster", "words"), [case[1:] for case in MISPLACED], ids=[case[0] for case in MISPLACED])
@pytest.mark.parametrize("call", [sources.check, sources.fetch_dataset])
def test_an_address_that_does_not_belong_here_is_a_spec_error(
    volumes: Path, tmp_path: Path, uri: str, in_cluster: bool, words: tuple[str, ...], call: Any
) -> None:
    with refused(SpecError, "spec.dataset.source", uri, *words):
        call(context(tmp_path, run_spec(dataset=uri), in_cluster=in_cluster))


BAD_MODELS: list[tuple[str, dict[str, bytes], tuple[str, ...]]] = [
    ("nothing there", {}, ("does not exist", "correct the path")),
    ("a file", {"base": b""}, ("is a file", "name the folder")),
    ("no config.json", {"base/model.safetensors": b""}, ("no config.json",)),
    ("no weights", {"base/config.json": CONFIG}, ("upload the weights as safetensors",)),
    ("only a pickle", {"base/config.json": CONFIG, "base/pytorch_model.bin": b""}, ("convert them to safetensors",)),
    ("weights in a folder below", {"base/config.json": CONFIG, "base/more/model.safetensors": b""}, ("no .safetensors file",)),
]


@pytest.mark.parametrize(("files", "words"), [case[1:] for case in BAD_MODELS], ids=[case[0] for case in BAD_MODELS])
@pytest.mark.parametrize("call", [sources.check, sources.fetch_model])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, files: dict[str, bytes], words: tuple[str, ...], call: Any) -> None:
    write_files(tmp_path, files)

    with refused(DataError, "spec.model.source", str(tmp_path / "base"), *words):
        call(context(tmp_path, run_spec(f"file://{tmp_path}/base")))


BAD_FILES: list[tuple[str, dict[str, bytes], tuple[str, ...]]] = [
    ("nothing there", {}, ("does not exist", "correct the path")),
    ("a folder", {"rows.jsonl/part": ROWS}, ("is a folder", "name the file")),
    ("an empty file", {"rows.jsonl": b""}, ("is empty", "at least one row")),
]


@pytest.mark.parametrize(("files", "words"), [case[1:] for case in BAD_FILES], ids=[case[0] for case in BAD_FILES])
@pytest.mark.parametrize("call", [sources.check, sources.fetch_dataset])
def test_a_bad_dataset_is_refused(tmp_path: Path, files: dict[str, bytes], words: tuple[str, ...], call: Any) -> None:
    write_files(tmp_path, files)

    with refused(DataError, "spec.dataset.source", str(tmp_path / "rows.jsonl"), *words):
        call(context(tmp_path, run_spec(dataset=f"file://{tmp_path}/rows.jsonl")))


def test_a_missing_path_in_a_claim_names_the_claim_and_not_the_mount(volumes: Path, tmp_path: Path) -> None:
    with refused(DataError, "PersistentVolumeClaim 'models'", "'smol/base'", "correct the path", hidden=(str(volumes),)):
        sources.check(context(tmp_path, run_spec("pvc://models/smol/base"), in_cluster=True))


def test_a_missing_key_of_a_configmap_names_the_configmap(volumes: Path, tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec(dataset="configmap://corpus/rows.jsonl"), in_cluster=True)

    with refused(DataError, "ConfigMap 'corpus'", "'rows.jsonl'", "correct the path"):
        sources.fetch_dataset(ctx)


CLOSED: list[tuple[str, str, Any]] = [
    ("a parent that may not be entered", "exists", local.check_model),
    ("a folder that may not be listed", "iterdir", local.check_model),
    ("a file that may not be opened", "open", local.check_file),
]


@pytest.mark.parametrize(("method", "check"), [case[1:] for case in CLOSED], ids=[case[0] for case in CLOSED])
def test_what_may_not_be_read_is_an_access_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, check: Any) -> None:
    """The system's refusal is imitated: it refuses nothing to root, who may run the tests."""

    def deny(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    path = tmp_path if check is local.check_model else write_files(tmp_path, {"rows.jsonl": ROWS}) / "rows.jsonl"
    monkeypatch.setattr(Path, method, deny)

    with refused(AccessError, "spec.model.source", str(path), "may not be read by this user", "change its permissions"):
        check(Location("spec.model.source", f"file://{path}", "model"), path)

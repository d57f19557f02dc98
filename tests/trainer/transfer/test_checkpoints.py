"""Checkpoints: complete or ignored, the newest of this training, and nothing else is left beside it."""

from pathlib import Path

import pytest
from finetune_trainer import checkpoints
from finetune_trainer.checkpoints import SEAL, Checkpoint
from support.power_loss import recorded_disk
from support.run_contexts import read_files, write_files

OURS, OTHERS = "a" * 64, "b" * 64
FILES = {"adapter_model.safetensors": b"adapter", "nested/rng.pth": b"rng"}


def sealed(outputs: Path, step: int, digest: str = OURS) -> Path:
    """A complete checkpoint."""
    folder = write_files(checkpoints.folder_of(outputs, step), FILES)
    checkpoints.seal(folder, digest, {"step": step})
    return folder


def newest(outputs: Path) -> tuple[int | None, list[str]]:
    """(step of what a training resumes from, warnings)."""
    warnings: list[str] = []
    found = checkpoints.newest(outputs, OURS, warnings.append)
    return (found.step if found else None), warnings


def test_a_sealed_checkpoint_is_found_with_its_facts(tmp_path: Path) -> None:
    folder = sealed(tmp_path, 20)

    assert checkpoints.newest(tmp_path, OURS, pytest.fail) == Checkpoint(folder, 20, {"step": 20})


def test_sealing_changes_no_file(tmp_path: Path) -> None:
    assert {name: content for name, content in read_files(sealed(tmp_path, 20)).items() if name != SEAL} == FILES


def test_sealing_again_keeps_a_checkpoint_complete(tmp_path: Path) -> None:
    folder = sealed(tmp_path, 20)

    checkpoints.seal(folder, OURS, {})

    assert checkpoints.is_complete(folder)


def test_every_file_is_on_the_disk_before_the_seal_and_the_names_behind_it(tmp_path: Path) -> None:
    with recorded_disk() as disk:
        folder = sealed(tmp_path, 20)

    assert disk.unsynced == {folder / SEAL: set()}
    assert disk.kept_since(folder / SEAL) == {folder, tmp_path}


def test_the_most_steps_win_by_number(tmp_path: Path) -> None:
    for step in (100, 9, 20):
        sealed(tmp_path, step)

    assert newest(tmp_path) == (100, [])


def test_no_outputs_at_all_are_no_checkpoint(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") == (None, [])


def test_other_names_are_not_looked_at(tmp_path: Path) -> None:
    write_files(tmp_path, {"checkpoint-best/a": b"", "checkpoint-": b"", ".checkpoint-5.partial/a": b"", "checkpoint-7": b"a file"})

    assert newest(tmp_path) == (None, [])


def test_a_checkpoint_that_was_never_sealed_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    sealed(tmp_path, 10)
    write_files(checkpoints.folder_of(tmp_path, 20), FILES)

    assert newest(tmp_path) == (10, ["Checkpoint checkpoint-20 is passed over: it was never completed."])


DAMAGE: list[tuple[str, dict[str, bytes], str]] = [
    ("another content", {"adapter_model.safetensors": b"Adapter"}, "adapter_model.safetensors is damaged"),
    ("a shorter file", {"nested/rng.pth": b"rn"}, "nested/rng.pth is damaged"),
    ("a seal cut short", {SEAL: b'{"trainDigest": '}, "its seal can't be read"),
    ("an empty seal", {SEAL: b""}, "its seal can't be read"),
    ("a seal of another shape", {SEAL: b'{"files": []}'}, "its seal can't be read"),
    ("a seal that is a list", {SEAL: b"[]"}, "its seal can't be read"),
    ("a seal that is no text", {SEAL: b"\xff\xfe"}, "its seal can't be read"),
]


@pytest.mark.parametrize(("files", "problem"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, files: dict[str, bytes], problem: str) -> None:
    sealed(tmp_path, 10)
    damaged = write_files(sealed(tmp_path, 20), files)

    assert newest(tmp_path) == (10, [f"Checkpoint checkpoint-20 is passed over: {problem}."])
    assert not checkpoints.is_complete(damaged)


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    (sealed(tmp_path, 20) / "nested" / "rng.pth").unlink()

    assert newest(tmp_path) == (None, ["Checkpoint checkpoint-20 is passed over: nested/rng.pth is damaged."])


def test_a_checkpoint_of_another_training_is_ignored_without_a_word(tmp_path: Path) -> None:
    sealed(tmp_path, 10)
    sealed(tmp_path, 20, OTHERS)

    assert newest(tmp_path) == (10, [])


def test_all_others_are_removed(tmp_path: Path) -> None:
    sealed(tmp_path, 10)
    sealed(tmp_path, 30, OTHERS)
    write_files(tmp_path, {"notes/a": b"", "checkpoint-best/a": b""})
    kept = Checkpoint(sealed(tmp_path, 20), 20, {})

    assert checkpoints.remove_all_but(kept, tmp_path) == ["checkpoint-10", "checkpoint-30"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-20", "checkpoint-best", "notes"]


def test_all_are_removed_where_none_is_kept(tmp_path: Path) -> None:
    sealed(tmp_path, 10)

    assert checkpoints.remove_all_but(None, tmp_path) == ["checkpoint-10"]
    assert list(tmp_path.iterdir()) == []

"""Atomic folders and files: all of it or nothing, whatever happens in between."""

from pathlib import Path

import pytest
from finetune_trainer import atomic
from support.power_loss import recorded_disk
from support.run_contexts import read_files, write_files


class Killed(BaseException):
    """What no code catches."""


def break_off(target: Path, content: bytes) -> None:
    """Writes a folder and is killed before its end."""
    with atomic.folder(target) as partial:
        write_files(partial, {"half": content})
        raise Killed


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"

    with atomic.folder(target) as partial:
        write_files(partial, {"a": b"1", "nested/b": b"2"})
        assert not target.exists()

    assert read_files(target) == {"a": b"1", "nested/b": b"2"}
    assert list(target.parent.iterdir()) == [target]


def test_a_folder_that_broke_off_does_not_appear(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        break_off(tmp_path / "model", b"1")

    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_broke_off_leaves_the_older_one(tmp_path: Path) -> None:
    write_files(tmp_path / "model", {"a": b"old"})

    with pytest.raises(Killed):
        break_off(tmp_path / "model", b"new")

    assert read_files(tmp_path) == {"model/a": b"old"}


def test_what_an_earlier_attempt_has_left_is_not_taken_over(tmp_path: Path) -> None:
    write_files(tmp_path, {".model.partial/half": b"1"})

    with atomic.folder(tmp_path / "model") as partial:
        write_files(partial, {"a": b"1"})

    assert read_files(tmp_path) == {"model/a": b"1"}


def test_a_newer_folder_replaces_the_older_one_wholly(tmp_path: Path) -> None:
    write_files(tmp_path / "model", {"only-old": b"old"})

    with atomic.folder(tmp_path / "model") as partial:
        write_files(partial, {"a": b"new"})

    assert read_files(tmp_path) == {"model/a": b"new"}


@pytest.mark.parametrize("written_since", [False, True])
def test_a_kill_between_the_two_renames_is_no_obstacle_and_takes_no_room(written_since: bool, tmp_path: Path) -> None:
    write_files(tmp_path, {".model.replaced/a": b"old", ".model.partial/a": b"half"} | ({"model/a": b"later"} if written_since else {}))

    with atomic.folder(tmp_path / "model") as partial:
        assert not (tmp_path / ".model.replaced").exists()
        write_files(partial, {"a": b"new"})

    assert read_files(tmp_path) == {"model/a": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_older_folder_outlives_a_rename_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "model", {"a": b"old"})
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == ".model.partial":
            raise OSError
        return original(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError), atomic.folder(tmp_path / "model"):
        pass

    assert read_files(tmp_path) == {".model.replaced/a": b"old"}


def test_a_file_is_replaced_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "seal.json"
    atomic.write_text(target, "old")

    atomic.write_text(target, "new ü")

    assert read_files(tmp_path) == {"deep/seal.json": "new ü".encode()}


def test_a_file_that_broke_off_keeps_its_older_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "seal.json"
    atomic.write_text(target, "old")

    def die(_: Path) -> None:
        raise Killed

    monkeypatch.setattr(atomic, "sync", die)
    with pytest.raises(Killed):
        atomic.write_text(target, "new")

    assert target.read_text() == "old"


def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_behind_it(tmp_path: Path) -> None:
    target = tmp_path / "seal.json"

    with recorded_disk() as disk:
        atomic.write_text(target, "new")

    assert disk.unsynced == {target: set()}
    assert disk.kept_since(target) == {tmp_path}


@pytest.mark.parametrize("older", [False, True])
def test_a_folder_is_on_the_disk_before_its_name_is_and_the_name_behind_it(older: bool, tmp_path: Path) -> None:
    target = tmp_path / "model"
    if older:
        write_files(target, {"a": b"old"})

    with recorded_disk() as disk, atomic.folder(target) as partial:
        write_files(partial, {"a": b"1", "nested/deep/b": b"2", "nested/c": b"3"})

    assert disk.unsynced[target] == set()
    assert tmp_path in disk.kept_since(target)

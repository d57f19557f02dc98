"""A folder that one process makes for all: made once, by whoever has the lock; without locks by each, and the first one's stays."""

import errno
import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import locks
from support.run_contexts import read_files, write_files

FILES = {"config.json": b"{}", "nested/weights": b"123"}

# Another process that makes the same folder until its standard input ends.
_MAKER = """
import sys
from pathlib import Path
from finetune_trainer import locks
def make(folder):
    folder.mkdir()
    (folder / "a").write_bytes(b"theirs")
    print("making", flush=True)
    sys.stdin.read()
locks.make_once(Path(sys.argv[1]), make, print)
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "model"


@pytest.fixture
def other(target: Path) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen([sys.executable, "-c", _MAKER, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "making\n"
        yield process
        process.kill()


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system on which nothing can be locked."""

    def refuse(*_: Any) -> None:
        raise OSError(request.param, "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(time, "sleep", pytest.fail)


def make(folder: Path) -> None:
    write_files(folder, FILES)


def break_off(folder: Path) -> None:
    write_files(folder, {"half": b"1"})
    raise KeyError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_made_once_and_nothing_stays_beside_it(target: Path) -> None:
    assert locks.make_once(target, make, pytest.fail) == target
    assert locks.make_once(target, pytest.fail, pytest.fail) == target
    assert read_files(target) == FILES
    assert names(target.parent) == ["model", "model.lock"]


def test_who_waits_for_another_process_says_so_and_takes_what_that_made(
    target: Path, other: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(time, "sleep", lambda _: other.communicate())  # its standard input ends
    locks.make_once(target, pytest.fail, notes.append)
    assert read_files(target) == {"a": b"theirs"}
    assert notes == [f"Waiting for another process, which is making {target}."]


def test_one_that_was_killed_is_not_waited_for_and_what_it_has_got_is_gone_on_with(target: Path, other: "subprocess.Popen[str]") -> None:
    other.kill()
    other.wait()
    locks.make_once(target, make, pytest.fail)
    assert read_files(target) == FILES | {"a": b"theirs"}
    assert names(target.parent) == ["model", "model.lock"]


def test_what_broke_off_is_gone_on_with(target: Path) -> None:
    with pytest.raises(KeyError):
        locks.make_once(target, break_off, pytest.fail)
    assert not target.exists()
    locks.make_once(target, make, pytest.fail)
    assert read_files(target) == FILES | {"half": b"1"}


def test_of_several_that_broke_off_one_is_gone_on_with_and_none_takes_room(target: Path) -> None:
    write_files(target.parent, {".model.1.partial/a": b"1", ".model.2.partial/a": b"1", ".model-description.3.partial/a": b"1"})
    locks.make_once(target, make, pytest.fail)
    assert read_files(target) == FILES | {"a": b"1"}
    assert names(target.parent) == [".model-description.3.partial", "model", "model.lock"]


@pytest.mark.usefixtures("no_locks")
def test_without_locks_nobody_is_waited_for_and_no_marker_stays(target: Path) -> None:
    locks.make_once(target, make, pytest.fail)
    assert read_files(target) == FILES
    assert not [path for path in names(target.parent) if path.endswith(".partial")]
    locks.make_once(target.with_name("other"), make, pytest.fail)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_two_disturb_each_other_in_nothing_and_the_first_ones_stays(target: Path) -> None:
    def overtaken(folder: Path) -> None:
        write_files(folder, {"a": b"mine"})
        locks.make_once(target, make, pytest.fail)
        assert read_files(folder) == {"a": b"mine"}

    locks.make_once(target, overtaken, pytest.fail)
    assert read_files(target) == FILES
    assert not list(target.parent.glob(".*"))


@pytest.mark.usefixtures("no_locks")
def test_without_locks_what_another_process_may_be_writing_is_left_alone_and_ones_own_goes(target: Path) -> None:
    write_files(target.parent, {".model.1.partial/a": b"1"})
    with pytest.raises(KeyError):
        locks.make_once(target, break_off, pytest.fail)
    assert names(target.parent) == [".model.1.partial", "model.lock"]

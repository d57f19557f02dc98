"""Of two runs in one working directory one is at work. In a cluster the other waits for it; where nobody can lock a file, both are trusted."""

import errno
import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_trainer import pipeline
from finetune_trainer.context import RunContext
from finetune_trainer.errors import InfrastructureError
from support.run_contexts import context, run_spec

# Another process that is alone at work there until its standard input ends.
_HOLDER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from finetune_trainer import pipeline
with pipeline._alone(SimpleNamespace(workdir=Path(sys.argv[1]), job=SimpleNamespace(in_cluster=False))):
    print("at work", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def pod(tmp_path: Path) -> RunContext:
    """A run in a cluster."""
    return context(tmp_path, run_spec(), in_cluster=True)


@pytest.fixture
def laptop(tmp_path: Path) -> RunContext:
    """A run in the same working directory that waits for nobody."""
    return context(tmp_path, run_spec())


@pytest.fixture
def other(pod: RunContext) -> Iterator["subprocess.Popen[str]"]:
    """A run in another process, which is at work in the same working directory."""
    command = [sys.executable, "-c", _HOLDER, str(pod.workdir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "at work\n"
        yield process
        process.kill()


def goes_on(ctx: RunContext) -> bool:
    with pipeline._alone(ctx):
        return True


def test_a_pod_waits_until_the_one_before_it_has_gone(
    pod: RunContext, other: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    def meanwhile(seconds: float) -> None:
        waited.append(seconds)
        other.communicate()  # its standard input ends

    monkeypatch.setattr(time, "sleep", meanwhile)
    assert goes_on(pod)
    assert len(waited) == 1
    assert other.returncode == 0


def test_a_pod_whose_forerunner_stays_is_refused(pod: RunContext, other: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_LOCK_SECONDS", 0.2)
    with pytest.raises(InfrastructureError, match=r"Another run is at work in .*work; wait for its end, or choose another --workdir\."):
        goes_on(pod)
    assert other.poll() is None


def test_on_a_laptop_nobody_waits(laptop: RunContext, other: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", pytest.fail)
    with pytest.raises(InfrastructureError, match="Another run is at work"):
        goes_on(laptop)


def test_one_that_was_killed_is_not_waited_for(laptop: RunContext, other: "subprocess.Popen[str]", monkeypatch: pytest.MonkeyPatch) -> None:
    other.kill()
    other.wait()
    assert goes_on(laptop)


def test_who_was_refused_takes_nobodys_place(laptop: RunContext) -> None:
    with pipeline._alone(laptop):
        for _ in range(2):
            with pytest.raises(InfrastructureError, match="Another run is at work"):
                goes_on(laptop)
    assert goes_on(laptop)


@pytest.mark.parametrize(
    "refusal",
    [*(OSError(code, "no locks here") for code in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)), NotImplementedError()],
    ids=repr,
)
def test_a_file_system_without_locks_is_trusted(refusal: Exception, pod: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which error it is depends on the file system, and on the version of filelock."""

    def no_locks(*_: Any) -> None:
        raise refusal

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(time, "sleep", pytest.fail)
    with pipeline._alone(pod):
        assert goes_on(pod)
    assert goes_on(pod)


def test_a_run_that_fails_gives_its_place_to_the_next(laptop: RunContext) -> None:
    with pytest.raises(KeyError), pipeline._alone(laptop):
        raise KeyError
    assert goes_on(laptop)

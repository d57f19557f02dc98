"""The real `finetune run`, killed with SIGKILL and started again: each attempt is forked from a process that has imported everything.

Importing torch takes seconds, so multiprocessing's fork server does it once, for the runs and for their fresh processes of verify. An attempt has a process
group of its own, which dies as a pod does. When it dies is chosen by progress, so that a seed means the same on a fast and on a slow machine.
"""

import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_trainer import cli
from finetune_trainer.stages import verify

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "finetune_trainer.cli",
        "finetune_trainer.pipeline",
        *(
            f"finetune_trainer.stages.{name}"
            for name in ("data", "load", "train", "evaluate", "convert", "verify", "verify_folder", "publish")
        ),
        *(f"finetune_trainer.{name}" for name in ("results.report", "results.summary", "destinations.s3", "destinations.restore")),
        "transformers.models.llama.modeling_llama",
        "boto3",
    ]
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "http.client.send"}
_POLL_SECONDS = 0.005
_FORK_SAFE = {"jemalloc_bg_thd"}  # pyarrow's allocator holds it still while a process forks


@dataclass(frozen=True)
class Command:
    """`finetune run` with these arguments and this environment.

    Attributes:
        root: every file that it writes and that counts lies below.
    """

    root: Path
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """When an attempt is killed.

    Attributes:
        change: before its change of this number: a file below the root that is opened for writing, renamed or removed, or something that is
            sent to a server. Exact, whatever the speed. 0 leaves the choice to the other two.
        stage: else, once it is in this stage,
        seconds: and so many seconds later, also in the midst of a write.
    """

    change: int = 0
    stage: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Course:
    """An undisturbed attempt, from which moments are drawn.

    Attributes:
        changes: how many it made.
        seconds: how long it was in each stage.
    """

    changes: int
    seconds: dict[str, float]

    def draw(self, drawn: random.Random) -> Moment:
        """Half of the moments stand before a change, half anywhere in a stage; each stage is as likely as the next, be it long or short."""
        if drawn.random() < 0.5:
            return Moment(change=drawn.randint(1, self.changes))
        stage = drawn.choice(sorted(self.seconds))
        return Moment(stage=stage, seconds=drawn.random() * self.seconds[stage])


def run_killed(command: Command, log: Path, moment: Moment) -> bool:
    """Starts the run and kills it at the moment.

    Returns:
        Whether it was killed; else it came to its end before.
    """
    process = _start(command, log, moment.change)
    if moment.stage:
        _wait_for(process, log, moment.stage)
        process.join(moment.seconds)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode != -signal.SIGKILL:
        _require_success(process, log)
        return False
    return True


def run_undisturbed(command: Command, log: Path) -> Course:
    """Runs to the end; AssertionError with the output when that is a bad one."""
    process = _start(command, log, 0)
    process.join()
    _require_success(process, log)
    stages = [(datetime.fromisoformat(line["timestamp"]), line["stage"]) for line in lines_of(log) if line["event"] == "stage"]
    ends = [*(begin for begin, _ in stages[1:]), datetime.fromisoformat(lines_of(log)[-1]["timestamp"])]
    seconds = {stage: (end - begin).total_seconds() for (begin, stage), end in zip(stages, ends, strict=True)}
    return Course(int(_count_of(log).read_text()), seconds)


def lines_of(log: Path) -> list[dict[str, Any]]:
    """The structured lines of an attempt's output, as far as they were written."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


def _start(command: Command, log: Path, dies_before: int) -> Any:
    log.unlink(missing_ok=True)
    process = _FORKS.Process(target=_attempt, args=(str(command.root), command.arguments, dict(command.environment), str(log), dies_before))
    process.start()
    return process


def _wait_for(process: Any, log: Path, stage: str) -> None:
    while process.is_alive() and not any(line["event"] == "stage" and line["stage"] == stage for line in lines_of(log)):
        time.sleep(_POLL_SECONDS)


def _require_success(process: Any, log: Path) -> None:
    assert process.exitcode == 0, f"exit code {process.exitcode}:\n{log.read_text(errors='replace')[-2000:]}"


def _count_of(log: Path) -> Path:
    return log.with_suffix(".changes")


def _attempt(root: str, arguments: Sequence[str], environment: dict[str, str], log: str, dies_before: int) -> None:
    """What the forked process does."""
    threads = {path.read_text().strip() for path in Path(f"/proc/{os.getppid()}/task").glob("*/comm")} - _FORK_SAFE
    assert len(threads) == 1, f"a fork server with threads is no clean start: {threads}"
    os.setpgid(0, 0)
    os.environ.update(environment)
    _say_into(log)
    verify.subprocess = _FreshProcess(log)  # type: ignore[assignment]
    changes = _Changes(root, dies_before)
    sys.addaudithook(changes)
    sys.argv = ["finetune", *arguments]
    try:
        cli.main()
    finally:
        changes.root = ""
        _count_of(Path(log)).write_text(str(changes.made))


class _FreshProcess:
    """Stands for the subprocess module where verify starts its fresh process: forked before the run began, so as fresh, without the import."""

    CompletedProcess = subprocess.CompletedProcess

    def __init__(self, log: str) -> None:
        self._output = f"{log}.verify"
        asked, self._ask = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(target=_module, args=(asked, self._output), daemon=True)
        self._process.start()

    def run(self, command: list[str], *, env: dict[str, str], **_: Any) -> "subprocess.CompletedProcess[str]":
        module = command.index("-m") + 1
        self._ask.send((command[module], command[module + 1 :], env))
        self._process.join()
        said = Path(self._output).read_text()
        return subprocess.CompletedProcess(command, self._process.exitcode or 0, said, said)


def _module(asked: Any, output: str) -> None:
    """What `python -m NAME ARGUMENTS` does, once it is asked for."""
    name, arguments, environment = asked.recv()
    os.environ.update(environment)
    _say_into(output)
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _say_into(log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)


class _Changes:
    """An audit hook that counts what the process changes, and kills it before one of them."""

    def __init__(self, root: str, dies_before: int) -> None:
        self.root, self.made = root, 0
        self._dies_before = dies_before

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.root and self._is_change(event, arguments):
            self.made += 1
            if self.made == self._dies_before:
                os.killpg(0, signal.SIGKILL)

    def _is_change(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "http.client.send":
            return True
        if event == "open":
            path, _, flags = arguments
            return bool(flags & _WRITING) and self._is_below(path)
        # A removal of a whole folder names its files by a handle of the folder.
        return event in _CHANGES and (self._is_below(arguments[0]) or (event in {"os.remove", "os.rmdir"} and arguments[1] != -1))

    def _is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.root)

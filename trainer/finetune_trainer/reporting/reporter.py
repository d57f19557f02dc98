"""Says what a run is doing: bar or log lines to people, `/progress` and `/metrics` to the operator, the termination message to the kubelet.

The pipeline makes one and hands it to every stage inside the run context. It never raises over something that is only for show.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
from finetune_api.progress import ProgressReport
from finetune_api.status import Progress, PublishedArtifact, Qat, Quality, Stage
from finetune_api.termination import TerminationMessage
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from finetune_trainer.errors import FineTuneError

TEXT_CHARACTERS = 1024  # what a termination message takes of one text


@dataclass
class RunReporter:
    """Keeps the state that is shown, and shows each change.

    Attributes:
        train_digest: which training it speaks of.
        write_termination: takes each new termination message; nothing outside a pod.
        on_change: called after each change, for the HTTP endpoint.
        part_seconds: seconds that parts of stages took, for hints.
        notes: what the user was told so far.
    """

    train_digest: str
    write_termination: Callable[[str], None] = lambda _: None
    on_change: Callable[[ProgressReport], None] = lambda _: None
    stage: Stage = Stage.PREFLIGHT
    progress: Progress | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    part_seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    screen: "Screen | None" = None
    _entered: float = field(default_factory=time.monotonic)

    def enter(self, stage: Stage) -> None:
        """A stage begins."""
        self._leave()
        self.stage = stage
        self._screen.stage(stage)
        self._changed()

    def step(self, progress: Progress) -> None:
        """An optimizer step is done."""
        self.progress = progress
        self._screen.step(progress)
        self.on_change(self._report())

    def note(self, sentence: str, **facts: object) -> None:
        """Something the user should know."""
        self.notes.append(sentence)
        self._screen.note(sentence, **facts)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Adds the time of the block to a part of the stage."""
        begun = time.monotonic()
        try:
            yield
        finally:
            self.part_seconds[part] = self.part_seconds.get(part, 0.0) + time.monotonic() - begun

    def know(self, **facts: str | Quality | Qat | tuple[PublishedArtifact, ...]) -> None:
        """Results for the termination message: model, dataset, quality, qat, artifacts, and a message for a run that ends well."""
        self.facts |= {name: value[:TEXT_CHARACTERS] if isinstance(value, str) else value for name, value in facts.items()}
        self._changed()

    def seconds(self) -> dict[str, float]:
        """Seconds that each stage has taken, the present one included."""
        self._leave()
        return dict(self.stage_seconds)

    def end(self, error: FineTuneError | None) -> None:
        """The run is over, well or badly."""
        self._leave()
        self.close()
        if error is None:
            self._write(reason="Succeeded", exit_code=0)
        else:
            self._write(reason=error.reason, message=str(error)[:TEXT_CHARACTERS], exit_code=int(error.exit_code))

    def close(self) -> None:
        """Leaves the terminal as it was."""
        self._screen.close()

    @property
    def _screen(self) -> "Screen":
        if self.screen is None:
            self.screen = TerminalScreen() if sys.stderr.isatty() else LogScreen()
        return self.screen

    def _leave(self) -> None:
        now = time.monotonic()
        name = self.stage.value
        self.stage_seconds[name] = round(self.stage_seconds.get(name, 0.0) + now - self._entered, 2)
        self._entered = now

    def _changed(self) -> None:
        self._write()
        self.on_change(self._report())

    def _report(self) -> ProgressReport:
        return ProgressReport(train_digest=self.train_digest, stage=self.stage, progress=self.progress)

    def _write(self, **end: Any) -> None:
        step = {"step": self.progress.step, "total_steps": self.progress.total_steps} if self.progress else {}
        self.write_termination(TerminationMessage(stage=self.stage, **step, **(self.facts | end)).encode())


class LogScreen:
    """One structured line for each event, for log collectors: JSON on stdout."""

    def __init__(self) -> None:
        self._log = structlog.wrap_logger(
            structlog.PrintLogger(sys.stdout),
            processors=[structlog.processors.TimeStamper(fmt="iso"), structlog.processors.JSONRenderer(ensure_ascii=False)],
        )

    def stage(self, stage: Stage) -> None:
        """A stage begins."""
        self._log.msg("stage", stage=stage.value)

    def step(self, progress: Progress) -> None:
        """An optimizer step is done."""
        self._log.msg("step", **progress.model_dump(mode="json", exclude={"updated_at"}))

    def note(self, sentence: str, **facts: object) -> None:
        """A sentence for people."""
        self._log.msg("note", message=sentence, **facts)

    def close(self) -> None:
        """Nothing is held."""


class TerminalScreen:
    """A progress bar on a terminal; sentences scroll above it."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._bar = Bar(
            TextColumn("training {task.fields[summary]}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: TaskID | None = None

    def stage(self, stage: Stage) -> None:
        """A stage begins."""
        if stage is not Stage.TRAINING:
            self.close()
        self._console.print(f"[bold]{stage.value}[/bold]")

    def step(self, progress: Progress) -> None:
        """An optimizer step is done."""
        facts = f"loss {progress.loss}  {progress.tokens_per_second} tokens/s"
        if self._task is None:
            self._task = self._bar.add_task("training", total=progress.total_steps, summary=progress.summary, facts=facts)
            self._bar.start()
        self._bar.update(self._task, completed=progress.step, summary=progress.summary, facts=facts)

    def note(self, sentence: str, **facts: object) -> None:
        """A sentence for people."""
        self._console.print(sentence, markup=False, **({} if not facts else {"end": f" {facts}\n"}))

    def close(self) -> None:
        """Puts the bar away."""
        self._bar.stop()
        self._task = None


Screen = LogScreen | TerminalScreen

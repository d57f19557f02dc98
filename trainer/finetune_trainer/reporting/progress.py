"""Turns optimizer steps into what status, `/progress` and the bar show: loss, speed, time left."""

import time
from datetime import UTC, datetime

from finetune_api.status import Progress

from finetune_trainer.context import Reporter


class ProgressMeter:
    """Counts the steps of this attempt against the clock; `remark` stands behind each summary, where status shows it."""

    def __init__(self, reporter: Reporter, total_steps: int, resumed_from: int, remark: str = "") -> None:
        self._reporter, self._total, self._first = reporter, total_steps, resumed_from
        self._remark = remark
        self._started = time.monotonic()

    def step_done(self, step: int, loss: float, epoch: float, tokens: int) -> None:
        """Reports a finished step.

        Args:
            step: optimizer steps done, earlier attempts included.
            loss: training loss in nats per token.
            epoch: passes over the data so far.
            tokens: that this attempt has seen.
        """
        elapsed = max(time.monotonic() - self._started, 1e-6)
        self._reporter.step(
            Progress(
                summary=f"{step}/{self._total}{self._remark}",
                step=step,
                total_steps=self._total,
                epoch=f"{epoch:.2f}",
                loss=four_digits(loss),
                tokens_per_second=round(tokens / elapsed),
                eta_seconds=round(elapsed / max(1, step - self._first) * (self._total - step)),
                updated_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )
        )


def four_digits(value: float) -> str:
    """A loss as status shows it: 4 significant digits, such as 2.314 or 0.05500."""
    return f"{value:#.4g}".rstrip(".")

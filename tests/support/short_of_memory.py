"""Runs a job whose memory is limited, for real, before its first step: `python -m support.short_of_memory JOB WORKDIR ROOM STEP`.

ROOM: bytes that may be added to what the process has then. STEP: the optimizer step after which the limit is set. Negative: no limit, and
micro-batches of so many rows. Ends with one JSON line: what the run told and came to.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

from finetune_trainer import phases, pipeline, plan
from finetune_trainer.errors import FineTuneError
from finetune_trainer.phases import Phases
from finetune_trainer.reporting.reporter import RunReporter
from support.tiny_jobs import description

LONGEST = 512


def limit_from(step: int, room: int) -> None:
    """Sets the limit once, when so many steps are done."""
    original = Phases.on_step_begin
    done: list[int] = []

    def on_step_begin(self: Phases, args: Any, state: Any, control: Any, **more: Any) -> None:
        original(self, args, state, control, **more)
        if state.global_step == step and not done:
            done.append(step)
            used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
            size = int(used.split()[1]) * 1024 + room
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    phases.Phases.on_step_begin = on_step_begin  # type: ignore[method-assign]


def main() -> None:
    """Runs the job."""
    job, workdir, room, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    plan.MICRO_BATCH_TOKENS = LONGEST * (-step if step < 0 else 8)
    if step >= 0:
        limit_from(step, room)
    seen: list[RunReporter] = []
    plans: list[plan.Plan] = []
    begin = Phases.__init__

    def phases_init(self: Phases, work: phases.Work) -> None:
        plans.append(work.plan)
        seen.append(work.ctx.reporter)  # type: ignore[arg-type]
        begin(self, work)

    Phases.__init__ = phases_init  # type: ignore[method-assign]
    said: dict[str, Any] = {}
    code = 0
    try:
        said["steps"] = pipeline.run(description(job), workdir, job.parent / "cache")["training"]["steps"]
    except FineTuneError as error:
        said["error"], code = str(error), int(error.exit_code)
    reporter = seen[-1]
    said |= {"notes": reporter.notes, "summary": reporter.progress.summary if reporter.progress else ""}
    said |= {"micro_batch": plans[-1].micro_batch, "start_files": [path.name for path in workdir.glob("start*")]}
    print(json.dumps(said))
    sys.exit(code)


if __name__ == "__main__":
    main()

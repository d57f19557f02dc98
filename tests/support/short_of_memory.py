"""`finetune` in a process that is short of memory, for real: `python -m support.short_of_memory ROOM ARGUMENTS...`.

From the first optimizer step on, the kernel gives it no more than ROOM bytes beside what it has then, nor to what comes in its
place: the limit outlasts the program, as a container's does. Its first micro-batch is as large as the batch, whatever this machine has.
"""

import resource
import sys
from pathlib import Path
from typing import Any

from finetune_trainer import cli, plan
from finetune_trainer.phases import Phases


def limit_from_the_first_step(room: int) -> None:
    """Sets the limit when all that comes before is done."""
    original = Phases.on_step_begin

    def on_step_begin(self: Phases, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == 0:
            used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
            size = int(used.split()[1]) * 1024 + room
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))
        original(self, args, state, control, **more)

    Phases.on_step_begin = on_step_begin  # type: ignore[method-assign]


if __name__ == "__main__":
    plan.MICRO_BATCH_TOKENS = 10**6
    limit_from_the_first_step(int(sys.argv[1]))
    sys.argv = ["finetune", *sys.argv[2:]]
    cli.main()

"""How much of the loss that quantization costs comes back (`make bench-quality`): plain LoRA, its PTQ, split QAT and exact QAT, on real text.

Makes the cells that benchmarks/results/quality/ lacks, one at a time (a quarter of an hour each at most on two idle cores), and prints the table.
Stop it whenever you like: the same command goes on. `--fresh 2` makes two cells of a processor like this, picked at random, again and fails where they differ.
"""

import argparse
import dataclasses
import json
import math
import platform
import random
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_trainer import atomic
from finetune_trainer.reporting.quiet import quiet_bars, quiet_libraries

RESULTS = Path(__file__).parent / "results" / "quality"
_PACKAGES = ("torch", "torchao", "transformers", "peft", "sympy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--cells", type=int, default=1000, help="at most so many are made")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no step after that long; the same command goes on")
    parser.add_argument("--fresh", type=int, default=0, help="make so many finished cells again, and compare")
    parser.add_argument("--table", action="store_true", help="print the table alone")
    chosen = parser.parse_args()
    quiet_libraries()
    quiet_bars()
    import quality_grid
    import quality_table

    if chosen.fresh:
        again(chosen.fresh)
    elif not chosen.table:
        missing = [name for name in quality_grid.CELLS if chosen.only in name and not (RESULTS / f"{name}.json").is_file()]
        make_missing(missing[: chosen.cells], time.time() + 60 * chosen.minutes)
    print(quality_table.table(RESULTS))


def make_missing(names: list[str], until: float) -> None:
    """Makes one cell after the other, as long as there is time."""
    from quality_cell import Paused

    try:
        for name in names:
            atomic.write_text(RESULTS / f"{name}.json", json.dumps(result(name, until=until)) + "\n")
    except Paused:
        print("The time is up; the same command goes on.")


def result(name: str, cache: Path | None = None, until: float = math.inf) -> dict[str, Any]:
    """Makes one cell."""
    import quality_cell
    import quality_grid
    import torch
    from finetune_trainer import machine

    torch.set_num_threads(2)
    recipe = quality_grid.CELLS[name]
    made = quality_cell.make(
        recipe, cache or _cache(), lambda told: print(f"{time.strftime('%H:%M:%S')} {name}: {told}", flush=True), until
    )
    return {"recipe": dataclasses.asdict(recipe), "commit": _commit(), "processor": machine.cpu(), "versions": _versions(), **made}


def again(count: int) -> None:
    """Makes finished cells of a processor like this again from nothing, and ends with an error where a held-out loss is another one."""
    import tempfile

    import quality_grid
    from finetune_trainer import machine

    here = machine.cpu()
    done = [name for name in sorted(quality_grid.CELLS) if (RESULTS / f"{name}.json").is_file() and _known(name)["processor"] == here]
    if not done:
        sys.exit(f"No cell was made on a processor like this ({here}); on another one the last bits differ.")
    differing = []
    for name in random.sample(done, min(count, len(done))):
        with tempfile.TemporaryDirectory(dir=_cache()) as empty:
            equal = result(name, Path(empty))["losses"] == _known(name)["losses"]
        print(f"{name}: {'the same' if equal else 'differs'}")
        differing += [] if equal else [name]
    if differing:
        sys.exit(f"These cells came out differently: {', '.join(differing)}.")


def _known(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def _commit() -> str:
    """The commit, with a + where files of the tree that decide a result have changed since."""
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    paths = ["../trainer", "../crds", *(str(path.relative_to(here)) for path in here.glob("quality*.py"))]
    changed = subprocess.run(["git", "status", "--porcelain", "--", *paths], cwd=here, capture_output=True, text=True, check=True).stdout
    return f"{commit}{'+' if changed.strip() else ''}"


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def _cache() -> Path:
    from finetune_trainer.context import user_cache

    folder = user_cache()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


if __name__ == "__main__":
    main()

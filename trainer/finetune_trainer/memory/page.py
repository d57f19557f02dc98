"""The table of docs/memory.md, from what benchmarks/memory.py has measured: `python -m finetune_trainer.memory.page`.

The rest of the page is written by hand; a test holds the table to the results.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.memory.estimate import PARTS

_ROOT = Path(__file__).parents[3]
DOCS_FILE = _ROOT / "docs" / "memory.md"
RESULTS_FILE = _ROOT / "benchmarks" / "results" / "memory.json"
PHASES = {"tune": "LoRA", "switch": "switch", "adapt": "QAT"}
BAR = 0.10


def with_table(page: str, results: dict[str, Any]) -> str:
    """The page with the measured rows between its marks; as it is where none was measured."""
    if not results["rows"]:
        return page
    return re.sub(r"(<!-- rows -->\n).*(<!-- end of rows -->)", lambda marks: marks[1] + table(results) + marks[2], page, flags=re.DOTALL)


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    both = [f"{name}, both" for name in PHASES.values()]
    head = ["model and micro-batch", *PARTS, "**estimated**", "**measured**", "difference", *both, "conversion, model = 1"]
    lines = [head, ["---"] * len(head), *_rows(results)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def total(row: dict[str, Any]) -> tuple[int, int]:
    """(estimated, measured) peak of the whole job, in bytes."""
    return max(phase["peak"] for phase in row["estimated"].values()), max(row["measured"].values())


def _rows(results: dict[str, Any]) -> Iterator[list[str]]:
    for name, row in results["rows"].items():
        worst = max(row["estimated"].values(), key=lambda phase: phase["peak"])
        estimated, measured = total(row)
        both = [f"{_gigabytes(row['estimated'][phase]['peak'])}, {_gigabytes(row['measured'][phase])}" for phase in PHASES]
        conversion = f"{row['conversion']['peak'] / row['conversion']['model']:.2f}"
        parts = [_gigabytes(worst[part]) for part in PARTS]
        yield [name, *parts, _gigabytes(estimated), _gigabytes(measured), f"{estimated / measured - 1:+.1%}", *both, conversion]


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


def measured() -> dict[str, Any]:
    """What is in the results so far."""
    return dict(json.loads(RESULTS_FILE.read_text(encoding="utf-8"))) if RESULTS_FILE.exists() else {"rows": {}}


if __name__ == "__main__":
    DOCS_FILE.write_text(with_table(DOCS_FILE.read_text(encoding="utf-8"), measured()), encoding="utf-8")

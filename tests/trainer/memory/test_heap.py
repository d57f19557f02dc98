"""heap.py on this machine's C library, in processes of their own: a heap remembers what it has served."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")

_HOLES = """
from pathlib import Path
from finetune_trainer.memory import heap
def resident():
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")).split()[1]) / 1024
MIB = 2**20
def leave_holes():
    blocks = [bytearray(2 * MIB) for _ in range(100)]
    del blocks[::2]
    return blocks
del (first := [bytearray(4 * MIB)])[0]  # glibc learns from a free: blocks up to this size come from the heap from now on
before = resident()
{}
print(resident() - before)
"""


def grown_by(lines: str) -> float:
    """MiB that a process grows by."""
    done = subprocess.run([sys.executable, "-c", _HOLES.format(lines)], check=True, capture_output=True, text=True)
    return float(done.stdout)


def test_holes_between_blocks_that_live_on_are_kept_unless_something_is_done() -> None:
    assert grown_by("kept = leave_holes()") > 180


def test_large_blocks_go_back_at_once() -> None:
    assert grown_by("heap.return_large_blocks(); kept = leave_holes()") < 120


def test_holes_go_back_when_they_are_told_to() -> None:
    assert grown_by("kept = leave_holes(); heap.return_holes()") < 120

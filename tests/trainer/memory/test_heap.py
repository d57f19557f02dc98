"""heap.py on this machine's C library; what a heap remembers, in processes of their own."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_trainer import heap
from safetensors import safe_open
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library is left as it is")

MIB = 2**20
_HOLES = """
from pathlib import Path
from finetune_trainer import heap
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


def test_the_pages_of_a_mapped_tensor_go_back_while_its_file_is_in_use(tmp_path: Path) -> None:
    save_file({"first": torch.ones(16, MIB), "second": torch.ones(16, MIB)}, tmp_path / "two.safetensors")
    with safe_open(tmp_path / "two.safetensors", "pt") as file:
        first, second = file.get_tensor("first"), file.get_tensor("second")
    before = resident_file_pages()
    assert float(first.sum() + second.sum()) == 32 * MIB
    heap.forget_pages(first)
    assert 60 * MIB <= resident_file_pages() - before < 80 * MIB
    assert bool((second == 1).all())


def test_nothing_beside_a_tensor_is_forgotten() -> None:
    around = torch.ones(3, 100_001)
    heap.forget_pages(around[1])
    assert bool((around[0] == 1).all())
    assert bool((around[2] == 1).all())


def test_a_tensor_of_less_than_a_page_stays() -> None:
    small = torch.ones(8)
    heap.forget_pages(small)
    assert bool((small == 1).all())


def resident_file_pages() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile:"))
    return int(line.split()[1]) * 1024

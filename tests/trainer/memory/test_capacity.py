"""How much memory there is: control groups of both versions, process limits, quantities."""

import mmap
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_trainer.memory import capacity
from finetune_trainer.memory.capacity import cgroup_limit, process_room, quantity_bytes

V1_UNLIMITED = 9223372036854771712
GIB = 2**30


def group(folder: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{value}\n")
    return folder


@pytest.mark.parametrize(
    ("membership", "files", "limit"),
    [
        ("0::/", {"memory.max": 3 * GIB}, 3 * GIB),
        ("0::/", {"memory.max": "max"}, None),
        ("0::/a/b", {"memory.max": "max", "a/memory.max": GIB, "a/b/memory.max": 2 * GIB}, GIB),
        ("0::/not/seen/in/here", {"memory.max": GIB}, GIB),
        ("4:memory:/\n0::/", {"memory/memory.limit_in_bytes": GIB}, GIB),
        ("4:cpu,memory:/pod\n0::/", {"memory/memory.limit_in_bytes": V1_UNLIMITED, "memory/pod/memory.limit_in_bytes": GIB}, GIB),
        ("4:memory:/docker/0123", {"memory/memory.limit_in_bytes": GIB}, GIB),
        ("3:cpuset:/", {}, None),
    ],
)
def test_the_least_limit_on_the_way_up_counts(tmp_path: Path, membership: str, files: dict[str, object], limit: int | None) -> None:
    assert cgroup_limit(membership, group(tmp_path, files)) == limit


@pytest.mark.parametrize(
    ("quantity", "size"),
    [
        ("16Gi", 16 * GIB),
        ("1.5Gi", 3 * GIB // 2),
        ("64G", 64 * 10**9),
        ("500M", 5 * 10**8),
        ("1024", 1024),
        ("2Ti", 2048 * GIB),
        ("1500m", 1),
    ],
)
def test_quantities_are_read_as_kubernetes_writes_them(quantity: str, size: int) -> None:
    assert quantity_bytes(quantity) == size


def test_a_process_has_room_and_not_more_than_the_machine() -> None:
    total = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    assert 0 < process_room() <= total * 1024


def test_a_mapped_file_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a loaded model does; its pages are the page cache's, which the kernel counts as available."""
    original = capacity._kibibytes
    # What others on the machine free or take meanwhile is not what is asked here, nor a container's limit.
    monkeypatch.setattr(capacity, "_kibibytes", lambda *line: 2**33 if line[-1] == "MemAvailable" else original(*line))
    monkeypatch.setattr(capacity, "cgroup_limit", lambda _: None)
    file, size = tmp_path / "weights", 256 * 2**20
    file.write_bytes(b"\1" * size)
    before = process_room()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[:: mmap.PAGESIZE].count(1) == size // mmap.PAGESIZE
        assert process_room() - before < size // 2


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts(kind: str) -> None:
    size = 700 * 2**20
    code = f"import resource; from finetune_trainer.memory.capacity import process_room; resource.setrlimit(resource.{kind}, ({size}, {size})); print(process_room())"
    room = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert size // 2 < room < 3 * size // 2  # beside addresses, a process has pages of files

"""How much memory there is: the least of what machine, container (cgroup v1 and v2) and process limits leave. Linux; reads /proc and /sys.

Called by fit.py. Nothing here knows a model.
"""

import resource
from collections.abc import Iterator
from pathlib import Path

_UNITS = {"m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def process_room() -> int:
    """Bytes that this process can come to, those that it has included."""
    status = "/proc/self/status"
    # The kernel counts a mapped file's pages as available already, and a loaded model is little else.
    own = _kibibytes(status, "RssAnon", "RssShmem") or _kibibytes(status, "VmRSS")  # gVisor tells the sum alone
    rooms = [own + _kibibytes("/proc/meminfo", "MemAvailable"), *_rlimits(_kibibytes(status, "VmRSS"))]
    limit = cgroup_limit(Path("/proc/self/cgroup").read_text())
    return min(rooms if limit is None else [*rooms, limit])


def gpu_room() -> int:
    """Bytes of the GPU that this process can come to, its caching allocator's included."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved()


def cgroup_limit(membership: str, root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least memory limit of the process's own control group and those above it, in bytes; None without one.

    Args:
        membership: the content of /proc/self/cgroup.
        root: where control groups are mounted. In a container they are those of the container, whatever the membership calls them.
    """
    limits = [limit for file in _limit_files(membership, root) if (limit := _read_limit(file)) is not None]
    return min(limits, default=None)


def quantity_bytes(quantity: str) -> int:
    """A Kubernetes quantity such as 16Gi in bytes."""
    number = quantity.rstrip("".join(_UNITS))
    return int(float(number) * _UNITS[quantity[len(number) :]])


def _limit_files(membership: str, root: Path) -> Iterator[Path]:
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = mount / path.lstrip("/")
        yield from (place / name for place in (folder, *folder.parents) if place.is_relative_to(mount))


def _read_limit(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # no such group here, or "max"
        return None


def _rlimits(resident: int) -> list[int]:
    """What ulimit leaves: both kinds count addresses, of which a process has more than it has memory."""
    kinds = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
    limits = [(resource.getrlimit(kind)[0], used) for kind, used in kinds]
    return [limit - _kibibytes("/proc/self/status", used) + resident for limit, used in limits if limit != resource.RLIM_INFINITY]


def _kibibytes(file: str, *names: str) -> int:
    """The sum of these lines, in bytes; a line that the kernel does not write counts as 0."""
    lines = [line.split() for line in Path(file).read_text().splitlines()]
    return sum(int(words[1]) * 1024 for words in lines if words[0].rstrip(":") in names)

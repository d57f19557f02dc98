"""Memory goes back to the system: what the C library keeps of freed blocks, where the estimate must hold, and a mapped file's pages behind their use.

glibc serves a block of a size that was freed before from its heap, up to 32 MiB, and what lives on between two blocks keeps their holes: at the worst moment of a
training on a CPU that came to 0.2 to 1.4 GB, three quarters of the estimate itself (docs/memory.md). Blocks that are mapped one by one leave no holes,
and cost the kernel's zeros each time: an eighth to a quarter of a small model's step. Elsewhere than on glibc nothing is done.
"""

import ctypes
import mmap
import platform

from torch import Tensor

_MAPPED_FROM_BYTES = 2**18
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 2**26  # at the heap's end, so that small blocks do not move it to and fro
_PAGE = mmap.PAGESIZE


def return_large_blocks() -> None:
    """From now on a freed block of 256 KiB or more goes back to the system at once."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM_BYTES)


def return_holes() -> None:
    """What lies free in the heap goes back to the system, once."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def forget_pages(tensor: Tensor) -> None:
    """The whole pages that a tensor on the CPU lies in go back to the system, for a tensor that nobody will read again.

    A weights file is mapped once for all its tensors, so dropping one of them frees nothing. What the tensor holds afterwards is undefined: the file's
    values, or zeros where it was not mapped from a file.
    """
    libc = _glibc()
    if libc is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    start = -(-tensor.data_ptr() // _PAGE) * _PAGE
    end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // _PAGE * _PAGE
    if end > start:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None

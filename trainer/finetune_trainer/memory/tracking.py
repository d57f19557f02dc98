"""Counts the bytes of living tensors while a piece of torch code runs, on real or on fake tensors alike.

Called by dry_run.py. What an allocator adds (fragments, kernels' own scratch space) is not seen; estimate.py's users leave a margin for it.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within the block, every storage that an operation returns counts from then until it is freed. Views count once.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once since the last `restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, int] = {}

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        for item in tree_iter(returned):
            if isinstance(item, torch.Tensor):
                self.count(item)
        return returned

    def count(self, tensor: torch.Tensor) -> None:
        """Takes in a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        # torch keeps one Python object for a storage as long as the storage lives, so this runs when its memory is given back.
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)

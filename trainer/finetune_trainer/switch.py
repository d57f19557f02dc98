"""The switch from tuning to adapting: the adapter there, and what it did on the held-out rows. Part of every later checkpoint.

The adapter is the teacher of the adapt phase, and what the scales are fitted to, so a run that resumes makes the same of both. Called by phases.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune_trainer import atomic
from finetune_trainer.held_out import HeldOut
from finetune_trainer.teacher import Adapter

FILE = "switch.safetensors"
_ADAPTER = "adapter/"
_MEASURED = ("tuned", "nearest", "ptq")


@dataclass(frozen=True)
class Switch:
    """What is known from the switch on.

    Attributes:
        adapter: its values there.
        tuned: as it was, not quantized; None without held-out rows, and where QAT begins with the first step.
        nearest: the same adapter, quantized as torchao's quantize_ does; None where `ptq` is the same.
        ptq: the same adapter, quantized with the scales and the rounding that were chosen for it.
    """

    adapter: Adapter
    tuned: HeldOut | None = None
    nearest: HeldOut | None = None
    ptq: HeldOut | None = None

    def save(self, folder: Path) -> None:
        """Writes it into a checkpoint that is not sealed yet.

        Raises:
            OSError: no space, or not writable.
        """
        tensors = {f"{_ADAPTER}{name}": value.cpu().contiguous() for name, value in self.adapter.items()}
        for name in _MEASURED:
            tensors |= _tensors(name, getattr(self, name))
        save_file(tensors, folder / FILE)
        atomic.sync(folder / FILE)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "Switch | None":
        """What a complete checkpoint holds; None where it is of the tune phase."""
        if not (folder / FILE).is_file():
            return None
        tensors = load_file(folder / FILE)
        adapter = {name.removeprefix(_ADAPTER): value.to(device) for name, value in tensors.items() if name.startswith(_ADAPTER)}
        return cls(adapter, **{name: _held_out(name, tensors) for name in _MEASURED})


def _tensors(name: str, measured: HeldOut | None) -> dict[str, Tensor]:
    if measured is None:
        return {}
    return {
        f"{name}/losses": torch.tensor([total for total, _ in measured.rows], dtype=torch.float64),
        f"{name}/tokens": torch.tensor([count for _, count in measured.rows]),
        f"{name}/greedy": torch.tensor(measured.greedy),
    }


def _held_out(name: str, tensors: dict[str, Tensor]) -> HeldOut | None:
    if f"{name}/losses" not in tensors:
        return None
    losses, tokens = tensors[f"{name}/losses"].tolist(), tensors[f"{name}/tokens"].tolist()
    return HeldOut(list(zip(losses, tokens, strict=True)), tensors[f"{name}/greedy"].tolist())

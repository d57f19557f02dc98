"""What a model's numbers depend on beside its weights: another processor or another PyTorch adds up in another order.

Asked by pipeline.py, so that what was converted on one machine is not proved on another, where its logits differ in the last bits; and by
benchmarks/quality.py, which makes results again only where the same bits can be expected.
"""

import platform
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

_LIBRARIES = ("torch", "torchao", "transformers")


def description(model: PreTrainedModel) -> str:
    """The processor that a model is on, its dtype, and the versions of what computes it."""
    processor = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else cpu()
    return "; ".join([processor, str(model.dtype), *(f"{name} {version(name)}" for name in _LIBRARIES)])


def cpu() -> str:
    """The processor's name, where the kernel tells it, and the instructions that PyTorch takes; libraries below PyTorch choose by more than these."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"

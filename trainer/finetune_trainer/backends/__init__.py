"""Backends: who loads the base model and puts the adapter on it. native is transformers and peft as they are, unsloth is FastLanguageModel.

One module each; whatever comes after (exact quantization-aware training, checkpoints, export, the proof) is the same for both. pipeline.py
takes one before anything imports transformers or trl, which unsloth patches while it is imported. Must not import torch by itself.
"""

import atexit
import os
import shutil
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from finetune_api.spec import LoraSpec, Scheme

from finetune_trainer.context import RunContext
from finetune_trainer.errors import SpecError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Name = Literal["native", "unsloth"]


class Backend(Protocol):
    """What a backend's module has."""

    NAME: Name

    def load_base(self, folder: Path, dtype: str, *, trust_remote_code: bool) -> "PreTrainedModel":
        """The base model on its device, every weight from a safetensors file; `dtype` is the spec's.

        Raises:
            DataError: no such architecture, a damaged file, or weights that are missing.
        """

    def add_adapter(self, base: "PreTrainedModel", lora: LoraSpec, scheme: Scheme) -> "PeftModel":
        """The base model with a fresh LoRA adapter, drawn from torch's seed; its layers are peft's own where a scheme will replace them.

        Raises:
            SpecError: a target module that the model does not have, its output head, or one that peft has no adapter for.
        """


def choose(wanted: str, scheme: Scheme, *, gpu: bool, unsloth: bool) -> Name:
    """The backend of a run. Pure.

    Args:
        wanted: the spec's training.backend.
        scheme: the spec's quantization scheme.
        gpu: whether the run has one.
        unsloth: whether unsloth is installed, and with it the older trl that it asks for, whose loss needs a GPU or unsloth's patches.

    Raises:
        SpecError: the one that is asked for can't work here.
    """
    if wanted == "unsloth" and not unsloth:
        raise SpecError(
            "spec.training.backend is unsloth, which is not installed here; use an environment or image made from requirements/unsloth.txt, "
            "or choose auto or native."
        )
    if wanted == "native" and unsloth and not gpu:
        raise SpecError(
            "spec.training.backend is native, which trains on a CPU only where unsloth is not installed (the trl that unsloth asks for needs a GPU); "
            "choose auto or unsloth, or use an environment made from requirements/trainer.txt."
        )
    if wanted == "auto":
        return "unsloth" if unsloth and (scheme is Scheme.NONE or not gpu) else "native"
    return "unsloth" if wanted == "unsloth" else "native"


def chosen(ctx: RunContext) -> Name:
    """The backend of this run; a note where unsloth has no GPU to be fast on.

    Raises:
        SpecError: the one that is asked for can't work here.
    """
    import torch

    # The pod of a preflight has no GPU; the pod of the run has what the spec asks for, or stops (load.require_gpu).
    gpu = ctx.spec.resources.gpus > 0 if ctx.job.in_cluster else torch.cuda.is_available()
    name = choose(ctx.spec.training.backend, ctx.spec.quantization.scheme, gpu=gpu, unsloth=has_unsloth())
    if name == "unsloth" and not gpu:
        ctx.reporter.note(
            "unsloth finds no GPU here: the training runs through its CPU path, which is good for a trial and no faster than native."
        )
    return name


def has_unsloth() -> bool:
    """Whether the package is installed; any folder of that name could be imported."""
    try:
        return bool(version("unsloth"))
    except PackageNotFoundError:
        return False


def take(ctx: RunContext) -> Backend:
    """Imports the backend of this run.

    Raises:
        SpecError: the one that is asked for can't work here.
    """
    if chosen(ctx) == "unsloth":
        return import_unsloth()
    from finetune_trainer.backends import native

    return native


def import_unsloth() -> Backend:
    """The unsloth backend; to be called before anything imports transformers, peft or trl.

    Unsloth writes Python code at run time and imports it: from a folder of this process, not from one in the current directory.
    """
    compiled = tempfile.mkdtemp(prefix="unsloth-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["UNSLOTH_COMPILE_LOCATION"] = compiled
    with redirect_stdout(StringIO()):  # a run has sentences of its own
        from finetune_trainer.backends import unsloth
    return unsloth

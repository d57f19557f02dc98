"""What made a run slow, in sentences: from numbers that this run measured, and only where they are large. Pure; called by pipeline.py.

The sentences go to report.json, to the terminal, and with the termination message to status. docs/troubleshooting.md lists them.
"""

from collections.abc import Callable
from dataclasses import dataclass

LEAST_SECONDS = 60.0  # a run that is over sooner is not slow
LARGE_SHARE = 0.25
CPU_SECONDS = 600.0


@dataclass(frozen=True)
class Measured:
    """One attempt in numbers; times in seconds.

    Attributes:
        stages: time of each stage.
        parts: time of parts of stages: `model` and `data` of Loading, `rounding`, `switch` and `mirror` of Training.
        steps: optimizer steps of this attempt.
        device: cpu or cuda.
        dtype: of the base weights.
        computes_bfloat16: whether the device has bfloat16 arithmetic.
        threads: that PyTorch computes with.
        cores: that this process may use.
        micro_batches: that the longest rows of a step were computed in.
        enough: how many they would have been, had memory been plenty; the same where it was, or where nobody knows.
        in_cluster: whether it ran in a pod.
        keeps_models: whether the next run finds the model in its cache.
    """

    stages: dict[str, float]
    parts: dict[str, float]
    steps: int
    device: str
    dtype: str
    computes_bfloat16: bool
    threads: int
    cores: int
    micro_batches: int
    enough: int
    in_cluster: bool
    keeps_models: bool

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.stages.values())

    def is_large(self, seconds: float) -> bool:
        """Whether a time is a large share of the whole."""
        return seconds >= LARGE_SHARE * self.total

    @property
    def trained_long(self) -> bool:
        """Whether training took most of the time."""
        return self.steps > 0 and self.stages.get("Training", 0.0) >= 0.5 * self.total


def hints(measured: Measured) -> tuple[str, ...]:
    """One sentence for each thing that took a large share of the time and can be changed; none for a run that took less than a minute."""
    if measured.total < LEAST_SECONDS:
        return ()
    return tuple(sentence for kind in KINDS if (sentence := kind(measured)))


def _cpu(run: Measured) -> str:
    """Training on a CPU"""
    training = run.stages.get("Training", 0.0)
    if run.device != "cpu" or not run.trained_long or training < CPU_SECONDS:
        return ""
    mend = "set resources.gpus to 1" if run.in_cluster else "a machine with a GPU is faster"
    return f"Training took {training:.0f} s for {run.steps} steps on the CPU: {mend}."


def _threads(run: Measured) -> str:
    """Idle cores"""
    if run.device != "cpu" or not run.trained_long or run.threads * 2 >= run.cores:
        return ""
    return f"PyTorch computed with {run.threads} of {run.cores} cores: unset OMP_NUM_THREADS."


def _precision(run: Measured) -> str:
    """Precision"""
    if run.dtype != "float32" or not run.computes_bfloat16 or not run.trained_long:
        return ""
    return (
        f"Training computed in float32, though this {'GPU' if run.device == 'cuda' else 'CPU'} has bfloat16 arithmetic: "
        "model.dtype bfloat16 takes half the memory for the weights, and mostly less time."
    )


def _batch(run: Measured) -> str:
    """Small micro-batches"""
    if run.micro_batches <= run.enough or not run.trained_long:
        return ""
    more = "use a machine with more memory"
    if run.in_cluster:
        more = "choose a resources.gpuType with more memory" if run.device == "cuda" else "raise resources.memory"
    return (
        f"A step took up to {run.micro_batches} micro-batches where {run.enough} would do, for memory was short: "
        f"{more}, or lower training.maxLength."
    )


def _rounding(run: Measured) -> str:
    """Rounding"""
    seconds = run.parts.get("rounding", 0.0)
    if not run.is_large(seconds):
        return ""
    return (
        f"Choosing scales and rounding of the weights took {seconds:.0f} of {run.total:.0f} s, whatever the number of steps: "
        "8 bits need no such choice (quantization.scheme int8 or fp8-fp8)."
    )


def _held_out(run: Measured) -> str:
    """Held-out losses"""
    seconds = run.stages.get("Evaluating", 0.0) + run.parts.get("switch", 0.0)
    if not run.is_large(seconds):
        return ""
    return f"Measuring held-out losses took {seconds:.0f} of {run.total:.0f} s: hold out fewer rows (dataset.evaluation)."


def _mirror(run: Measured) -> str:
    """Checkpoints"""
    seconds = run.parts.get("mirror", 0.0)
    if not run.is_large(seconds):
        return ""
    return (
        f"Mirroring checkpoints took {seconds:.0f} of {run.total:.0f} s: raise training.checkpointEvery, "
        "choose a nearer storage.checkpoints.uri, or let the workspace last (storage.workspace.persistentVolumeClaim)."
    )


def _model(run: Measured) -> str:
    """Fetching the model"""
    seconds = run.parts.get("model", 0.0)
    if not run.is_large(seconds) or run.keeps_models:
        return ""
    return f"Fetching the model took {seconds:.0f} of {run.total:.0f} s: a claim keeps it for the next run (storage.cache.persistentVolumeClaim)."


def _data(run: Measured) -> str:
    """Data"""
    seconds = run.parts.get("data", 0.0)
    if not run.is_large(seconds):
        return ""
    return f"Fetching and tokenizing the data took {seconds:.0f} of {run.total:.0f} s: give dataset.source fewer rows, or a nearer place."


KINDS: tuple[Callable[[Measured], str], ...] = (_cpu, _threads, _precision, _batch, _rounding, _held_out, _mirror, _model, _data)

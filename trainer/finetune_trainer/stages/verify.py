"""Verify: the proof that what is shipped is what was trained, measured on every job in a fresh process.

By weights: every dequantized weight of the exported folder has the digest of the one that training used. By logits: the largest difference
on the recorded batch is 0.0. Kernels that dequantize give these logits themselves; of others each layer is held against the arithmetic of the
training, on the same input, within rounding; where no kernel runs, that is said. And it writes a sentence, if it can.
"""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from finetune_api import names
from finetune_api.status import VerifiedBy

from finetune_trainer.context import RunContext
from finetune_trainer.errors import CapacityError, ProofError
from finetune_trainer.failures import speaks_of_memory

_ROUNDING_STEPS = 2.0
"""Of the worst output channel of the worst layer, as qat/kernels.py counts them: rounding stays below 0.5, a scale that is 5 % off is above."""


@dataclass(frozen=True)
class Proof:
    """What was measured.

    Attributes:
        weights_equal: every weight equals the trained one bit for bit.
        weights: how many were compared.
        max_logit_difference: the largest, over the whole recorded batch.
        verified_by: how far the proof goes on this machine.
        kernel: what computes the shipped model here; empty where nothing does, and the logits are those of its dequantized weights.
        kernel_error: of the worst layer, in rounding steps; None where the kernel dequantizes, so that the logits themselves show it, or did
            not run.
        generated: a greedy continuation by the shipped model; empty where it can't generate.
    """

    weights_equal: bool
    weights: int
    max_logit_difference: float
    verified_by: str
    kernel: str
    kernel_error: float | None
    generated: str

    @property
    def holds(self) -> bool:
        """Whether the shipped model is the trained one, as far as this machine can tell."""
        return self.weights_equal and self.max_logit_difference == 0.0 and (self.kernel_error or 0.0) <= _ROUNDING_STEPS


def run(ctx: RunContext) -> Proof:
    """Loads the exported folder with plain transformers in a fresh process and holds it against the record.

    Raises:
        CapacityError: the process was ended by a signal, or out of memory.
        ProofError: it does not load, computes what is no number, or differs and the spec does not accept that; the sentence names the first weight,
            the difference or the layer.
    """
    measured = _measure(ctx)
    expected = json.loads((ctx.proof / names.PROOF_EXPECTED).read_text())["weights"]
    differing = sorted(name for name in expected.keys() | measured["weights"].keys() if expected.get(name) != measured["weights"].get(name))
    errors, logits = measured["kernel_errors"], measured["max_logit_difference"]
    if measured["generation_failure"]:
        ctx.reporter.note(
            f"The shipped model wrote no sentence: transformers' generate failed ({measured['generation_failure']}); try it with the base model."
        )
    _require_numbers({"the logits": logits} | errors)
    proof = Proof(
        weights_equal=not differing,
        weights=len(expected),
        max_logit_difference=logits,
        verified_by=VerifiedBy.WEIGHTS_AND_LOGITS if measured["kernel"] else VerifiedBy.WEIGHTS,
        kernel=measured["kernel"],
        kernel_error=max(errors.values()) if errors else None,
        generated=measured["generated"],
    )
    if proof.holds:
        return proof
    difference = _difference(proof, differing, errors)
    if not ctx.spec.quantization.accept_inexact:
        raise ProofError(f"{difference}; nothing was published. Run the job again, and report this with report.json if it comes back.")
    ctx.reporter.note(f"{difference}; it is shipped all the same, since quantization.acceptInexact is true.")
    return proof


def _require_numbers(differences: dict[str, float]) -> None:
    """What is NaN or infinite is no inexactness that a job could accept."""
    for name, difference in differences.items():
        if not math.isfinite(difference):
            raise ProofError(
                f"The exported model is not the trained one: {name} come out as {difference} in a fresh process, which no job accepts; nothing was "
                "published. Run the job again, and report this if it comes back."
            )


def _difference(proof: Proof, differing: list[str], errors: dict[str, float]) -> str:
    """What the proof found."""
    head = "The exported model is not the trained one: "
    if differing:
        return f"{head}{len(differing)} of {proof.weights} weights differ, the first is {differing[0]}"
    if proof.max_logit_difference != 0.0:
        return f"{head}a logit differs by {proof.max_logit_difference:.3g} although all weights are equal"
    worst = max(errors, key=lambda name: errors[name])
    return f"{head}{proof.kernel} computes {worst} {errors[worst]:.3g} rounding steps off, where {_ROUNDING_STEPS:.0f} are allowed, although all weights are equal"


def _measure(ctx: RunContext) -> dict:
    recorded = [str(ctx.proof / name) for name in (names.PROOF_REFERENCE, names.PROOF_EXPECTED)]
    command = [sys.executable, "-P", "-m", "finetune_trainer.stages.verify_folder", str(ctx.quantized), *recorded]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_clean_environment())
    if done.returncode:
        log = ctx.workdir / "verify.log"  # not beside the proof, which is published and must stay what convert wrote
        log.write_text(done.stderr)
        _refuse(done, log)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _refuse(done: subprocess.CompletedProcess[str], log: Path) -> NoReturn:
    """A process that the system ended, or that found no memory, says nothing about the exported model."""
    last = (done.stderr.strip().splitlines() or ["no output"])[-1][:300].rstrip(".")
    if done.returncode < 0 or speaks_of_memory(done.stderr):
        code = done.returncode
        ended = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ran out of memory ({last})"
        raise CapacityError(
            f"The fresh process that proves the exported model {ended}; the whole output is in {log}. "
            "Give the job more memory (resources.memory) or a GPU with more, and run it again."
        )
    raise ProofError(f"The exported model does not load in a fresh process: {last} (the whole output is in {log}).")


def _clean_environment() -> dict[str, str]:
    """The environment without what would let the fresh process reach a network or a Hub."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

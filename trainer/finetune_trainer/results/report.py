"""report.json: everything that was measured, and what it was measured with. Pure, besides asking for versions and peak memory."""

import platform
import resource
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from finetune_api.job import JobDescription
from finetune_api.status import Qat, Quality

from finetune_trainer import VERSION
from finetune_trainer.finished import REPORT_FORMAT
from finetune_trainer.qat.prepare import Prepared
from finetune_trainer.reporting.progress import four_digits
from finetune_trainer.stages.convert import Converted
from finetune_trainer.stages.data import Data
from finetune_trainer.stages.evaluate import Losses
from finetune_trainer.stages.load import Loaded
from finetune_trainer.stages.train import Trained
from finetune_trainer.stages.verify import Proof

_SHOWN_LOSSES = ("base", "tuned", "nearest", "ptq", "quantized")
_PACKAGES = ("torch", "torchao", "transformers", "peft", "trl", "unsloth", "unsloth_zoo", "safetensors")


def build_report(
    job: JobDescription,
    loaded: Loaded,
    data: Data,
    trained: Trained,
    losses: Losses,
    converted: Converted | None,
    proof: Proof | None,
    seconds: dict[str, float],
    hints: tuple[str, ...],
) -> dict[str, Any]:
    """The report as JSON values; what was not measured is null or absent."""
    return {
        "formatVersion": REPORT_FORMAT,
        "job": job.name,
        "trainDigest": job.train_digest,
        "runDigest": job.run_digest,
        "artifacts": [artifact.value for artifact in job.spec.wanted_artifacts],
        "sources": {"model": loaded.resolved, "dataset": data.resolved, "heldOut": data.held_out_resolved},
        "license": loaded.license,
        "identities": {"model": loaded.identity, **data.identities},
        "data": _data(data),
        "training": {
            "backend": loaded.backend.NAME,
            "steps": trained.plan.steps,
            "resumedFrom": trained.resumed_from,
            "lastLoss": trained.final_loss,
        },
        "losses": asdict(losses),
        "qat": quantized_layers(job, trained.prepared),
        "bytes": asdict(converted) if converted else None,
        "proof": asdict(proof) | {"holds": proof.holds} if proof else None,
        "seconds": seconds,
        "hints": list(hints),
        "peakMemoryBytes": peak_memory_bytes(),
        "seed": job.spec.training.seed,
        "versions": versions(),
    }


def _data(data: Data) -> dict[str, Any]:
    cuts = {"dropped": data.cuts.dropped, "cut": data.cuts.cut, "lostTokens": data.cuts.tokens}
    return {"form": data.form, "train": len(data.train), "heldOut": len(data.held_out), "heldOutAlsoTrained": data.also_trained, **cuts}


def quality(losses: dict[str, Any], proof: dict[str, Any] | None, shortfall: str) -> Quality:
    """What was measured, as status shows it.

    Args:
        losses: the report's.
        proof: the report's; None when nothing was exported.
        shortfall: what the gate found; empty when nothing.
    """
    shown: dict[str, Any] = {f"{name}_loss": four_digits(losses[name]) for name in _SHOWN_LOSSES if losses.get(name) is not None}
    shown |= {name: f"{losses[name]:.0%}" for name in ("nearest_recovered", "recovered", "agreement") if losses.get(name) is not None}
    if shown:
        shown["shortfall"] = shortfall
    if proof:
        shown |= {"shipped_matches_trained": proof["holds"], "verified_by": proof["verified_by"]}
    return Quality(**shown)


def qat(report: dict[str, Any]) -> Qat | None:
    """What was quantized, as status shows it."""
    known = report["qat"]
    return Qat(scheme=known["scheme"], layers=known["layers"], coverage=f"{known['coverage']:.0%}") if known else None


def quantized_layers(job: JobDescription, prepared: Prepared | None) -> dict[str, Any] | None:
    """Which layers are quantized, and which are not and why."""
    if prepared is None:
        return None
    names = {"names": list(prepared.layers), "skipped": prepared.skipped}
    return {"scheme": job.spec.quantization.scheme.value, "layers": len(prepared.layers), "coverage": prepared.coverage, **names}


def peak_memory_bytes() -> int:
    """Largest resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions() -> dict[str, str]:
    """Versions of what computed the result."""
    found = {"finetune-operator": VERSION, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

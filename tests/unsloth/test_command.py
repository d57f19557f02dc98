"""`finetune run` as a user of the unsloth environment runs it; what it leaves is read here, in the main one. Called by `make test-unsloth`.

FINETUNE_UNSLOTH_PYTHON is that environment's Python; without it there is nothing to test.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer.context import RunContext
from finetune_trainer.held_out import mean_loss, measure
from finetune_trainer.stages import data, load
from peft import PeftModel
from safetensors.torch import load_file
from support.run_contexts import RecordingReporter
from support.tiny_jobs import description, tiny_job
from transformers import AutoModelForCausalLM

PYTHON = os.environ.get("FINETUNE_UNSLOTH_PYTHON", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="FINETUNE_UNSLOTH_PYTHON is not set (make test-unsloth)")


def finetune_run(folder: Path, changes: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """In `folder`, as current directory too."""
    job = tiny_job(folder, changes | {"training": {"backend": "unsloth"}})
    command = [PYTHON, "-m", "finetune_trainer.cli", "run", str(job), "--workdir", "work", "--cache", "cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def trained_adapter(folder: Path) -> PeftModel:
    """The published adapter in plain peft."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "published" / "lora_model")


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "published" / "report.json").read_text()))


def test_its_adapter_has_the_same_loss_in_plain_peft(tmp_path: Path) -> None:
    done = finetune_run(tmp_path, {"quantization": {"scheme": "none"}})
    assert done.returncode == 0, done.stderr
    report = report_of(tmp_path)
    assert report["training"]["backend"] == "unsloth"
    assert report["versions"]["unsloth"]
    ctx = RunContext(description(tmp_path / "job.yaml"), tmp_path / "work", tmp_path / "cache", RecordingReporter())
    rows = data.run(ctx, load.tokenizer_of(ctx, tmp_path / "model"))
    model = trained_adapter(tmp_path)
    assert mean_loss(measure(model, rows.held_out, fake_quant=False).rows) == report["losses"]["tuned"] < report["losses"]["base"]


def test_its_exact_model_is_the_same_here_bit_for_bit(tmp_path: Path) -> None:
    done = finetune_run(tmp_path, {"outputs": {"artifacts": ["adapter", "quantized"]}})
    assert done.returncode == 0, done.stderr
    assert report_of(tmp_path)["proof"]["max_logit_difference"] == 0.0
    recorded = load_file(tmp_path / "published" / "proof" / "reference.safetensors")
    batch = {name: recorded[name] for name in ("input_ids", "attention_mask")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published" / "model-torchao")
    with torch.no_grad():
        assert torch.equal(model(**batch, use_cache=False).logits, recorded["logits"])
    # Nothing of unsloth's own: neither its banner nor the folder of code that it writes.
    assert "Unsloth" not in done.stdout + done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"model", "rows.jsonl", "job.yaml", "work", "cache", "published"}

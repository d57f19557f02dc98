"""`finetune estimate`: the parts, this machine and the GPUs, from the configuration alone."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api.exits import ExitCode
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.memory import fit
from finetune_trainer.memory.estimate import Needed
from finetune_trainer.memory.gpus import GPU_BYTES
from finetune_trainer.plan import Plan
from support.exact_models import tiny_mixture
from support.tiny_jobs import finetune, tiny_job
from transformers import JetMoeConfig, JetMoeForCausalLM, PreTrainedConfig


def estimate(job: Path, *options: str) -> int:
    return finetune("estimate", str(job), "--cache", str(job.parent / "cache"), *options)


def test_every_part_and_every_gpu_is_shown_without_weights_or_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(tmp_path)
    (tmp_path / "rows.jsonl").unlink()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    assert estimate(job) == 0
    said = capfd.readouterr().out
    for words in ("one row of 64 tokens needs", "weights", "adapter", "optimizer", "activations", "peak", "this machine", *GPU_BYTES):
        assert words in said
    assert not (tmp_path / "work-tiny").exists()


def test_one_gpu_alone_can_be_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert estimate(tiny_job(tmp_path), "--gpu", "nvidia-l4") == 0
    said = capfd.readouterr().out
    assert "nvidia-l4" in said
    assert "this machine" not in said
    assert "nvidia-b200" not in said


@pytest.mark.parametrize("percent", [1, 60, 99])
def test_a_share_of_steps_under_quantization_leaves_no_phase_out(percent: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps would all be quantization-aware ones, which take less than those of plain LoRA."""
    asked: list[Plan] = []
    original = fit.estimates_of

    def estimates_of(spec: FineTuneJobSpec, config: PreTrainedConfig, plan: Plan, *rest: Any, **options: Any) -> Needed:
        asked.append(plan)
        return original(spec, config, plan, *rest, **options)

    monkeypatch.setattr(fit, "estimates_of", estimates_of)
    assert estimate(tiny_job(tmp_path, {"quantization": {"qatPercent": percent}}), "--gpu", "nvidia-l4") == 0
    assert all(0 < plan.switch_step < plan.steps for plan in asked)
    assert asked


def test_a_model_that_cant_be_traced_is_told_in_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """JetMoE counts the tokens of each of its experts in Python."""
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}
    JetMoeForCausalLM(JetMoeConfig(**sizes, kv_channels=16, num_local_experts=4)).save_pretrained(tmp_path / "model")
    job = tiny_job(tmp_path, {"lora": {"targetModules": "kv_proj"}, "quantization": {"scheme": "none"}})
    assert estimate(job) == ExitCode.CAPACITY
    [said] = capfd.readouterr().err.strip().splitlines()
    assert "This model can't be estimated" in said
    assert "; give it a run" in said


def test_a_mixture_of_experts_is_estimated_and_no_library_says_anything(tmp_path: Path) -> None:
    tiny_mixture().save_pretrained(tmp_path / "model")
    job = tiny_job(tmp_path, {"quantization": {"scheme": "none"}})
    ended = subprocess.run(
        [sys.executable, "-m", "finetune_trainer.cli", "estimate", str(job), "--gpu", "nvidia-l4"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""
    assert "nvidia-l4" in ended.stdout


def test_a_gpu_that_is_not_in_the_table_is_refused_with_those_that_are(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert estimate(tiny_job(tmp_path), "--gpu", "rtx-9000") == ExitCode.SPEC
    assert "known are nvidia-tesla-t4" in capfd.readouterr().err

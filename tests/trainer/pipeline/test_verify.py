"""The fresh process of the proof: how it ends when it is killed or finds no memory, and that it runs a model's own code where the spec allows it."""

import json
import sys
from pathlib import Path

import pytest
from finetune_api.exits import ExitCode
from finetune_trainer.errors import CapacityError, ProofError
from finetune_trainer.stages import verify
from support.run_contexts import context, refused, run_spec
from support.tiny_jobs import finetune, run, tiny_job

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AUTO_MAP = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


def verified_by(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verifies with a shell script in the place of Python."""
    ctx = context(folder, run_spec())
    ctx.proof.mkdir()
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    verify.run(ctx)


@pytest.mark.parametrize("signal", [9, 11])
def test_a_process_that_was_killed_says_nothing_about_the_model(signal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(CapacityError, f"ended by signal {signal}", "resources.memory", "verify.log"):
        verified_by(f"kill -{signal} $$", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.",
        "OSError: [Errno 12] Cannot allocate memory",
        "MemoryError",
    ],
)
def test_a_process_that_finds_no_memory_says_nothing_about_the_model(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(CapacityError, "ran out of memory", words.rstrip("."), "resources.memory"):
        verified_by(f'echo "{words}" >&2; exit 1', tmp_path, monkeypatch)
    assert words in (tmp_path / "work" / "proof" / "verify.log").read_text()


def test_a_model_that_does_not_load_fails_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ProofError, "does not load in a fresh process", "ValueError: no such layer"):
        verified_by('echo "ValueError: no such layer" >&2; exit 1', tmp_path, monkeypatch)


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job whose model brings Python code of its own."""
    from transformers import dynamic_module_utils

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))  # read at import
    job = tiny_job(tmp_path, {"model": {"trustRemoteCode": True}, "outputs": {"artifacts": ["adapter", "quantized"]}})
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "own", "auto_map": AUTO_MAP}))
    (tmp_path / "model" / "own.py").write_text(OWN_CODE)
    return job


def test_a_model_with_code_of_its_own_is_proved_with_that_code(own_code: Path) -> None:
    report = run(own_code, own_code.parent / "work")
    assert report["proof"]["max_logit_difference"] == 0.0
    assert (own_code.parent / "published" / "model-torchao" / "own.py").is_file()


def test_the_record_says_whether_code_of_the_model_may_run(tmp_path: Path) -> None:
    run(tiny_job(tmp_path, {"outputs": {"artifacts": ["adapter", "quantized"]}}), tmp_path / "work")
    assert json.loads((tmp_path / "work" / "proof" / "expected.json").read_text())["trust_remote_code"] is False


def test_code_that_the_spec_does_not_trust_is_refused_before_training(own_code: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = json.loads(own_code.read_text())
    job["spec"]["model"]["trustRemoteCode"] = False
    own_code.write_text(json.dumps(job))
    folder = own_code.parent
    assert finetune("run", str(own_code), "--workdir", str(folder / "work"), "--cache", str(folder / "cache")) == ExitCode.SPEC
    assert "spec.model.trustRemoteCode" in capfd.readouterr().err

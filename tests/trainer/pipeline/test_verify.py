"""The fresh process of the proof: how it ends when it is killed or finds no memory, and that it runs a model's own code where the spec allows it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from finetune_api import names
from finetune_api.exits import ExitCode
from finetune_trainer.errors import CapacityError, ProofError
from finetune_trainer.stages import verify
from finetune_trainer.stages.verify import Proof
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


def verified_by(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, accept: bool = False) -> Proof:
    """Verifies with a shell script in the place of Python."""
    ctx = context(folder, run_spec(quantization={"acceptInexact": accept}))
    ctx.proof.mkdir(exist_ok=True)
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    return verify.run(ctx)


@pytest.mark.parametrize("signal", [9, 11])
def test_a_process_that_was_killed_says_nothing_about_the_model(signal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(CapacityError, f"ended by signal {signal}", "resources.memory", "verify.log"):
        verified_by(f"kill -{signal} $$", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes.",
        "torch.AcceleratorError: CUDA error: out of memory",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "OSError: [Errno 12] Cannot allocate memory",
        "MemoryError",
    ],
)
def test_a_process_that_finds_no_memory_says_nothing_about_the_model(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(CapacityError, "ran out of memory", words.rstrip("."), "resources.memory"):
        verified_by(f'echo "{words}" >&2; exit 1', tmp_path, monkeypatch)
    assert words in (tmp_path / "work" / "verify.log").read_text()


def test_a_model_that_does_not_load_fails_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ProofError, "does not load in a fresh process", "ValueError: no such layer"):
        verified_by('echo "ValueError: no such layer" >&2; exit 1', tmp_path, monkeypatch)


def test_a_file_in_the_current_directory_is_no_module_of_the_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project's own file of that name would fail each proof, behind hours of training."""
    job = tiny_job(tmp_path, {"outputs": {"artifacts": ["quantized"]}})
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "safetensors.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path / "project")
    assert run(job, tmp_path / "work")["proof"]["holds"]


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *, accept: bool = False, **changes: Any) -> Proof:
    """The proof of a folder of which the fresh process says this."""
    said = {"weights": {"a": "1"}, "max_logit_difference": 0.0, "kernel": "mslk on cuda", "kernel_errors": {}} | changes
    said = {"generated": "The", "generation_failure": ""} | said
    (folder / "work" / "proof").mkdir(parents=True)
    (folder / "work" / "proof" / names.PROOF_EXPECTED).write_text(json.dumps({"weights": {"a": "1"}}))
    (folder / "said.json").write_text(json.dumps(said))
    return verified_by(f"cat {folder}/said.json", folder, monkeypatch, accept=accept)


def test_the_worst_layer_of_a_kernel_is_part_of_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = measured(tmp_path, monkeypatch, kernel_errors={"up_proj": 0.5, "down_proj": 1.9})
    assert (proof.verified_by, proof.kernel_error) == ("weights and logits", 1.9)


def test_a_kernel_that_was_not_run_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = measured(tmp_path, monkeypatch, kernel="")
    assert (proof.verified_by, proof.kernel_error) == ("weights; kernel not run", None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kernel_errors": {"up_proj": 2.1, "down_proj": 2.5}}, ["mslk on cuda computes down_proj 2.5 rounding steps off, where 2 are"]),
        ({"kernel_errors": {"up_proj": 0.5, "down_proj": float("nan")}}, ["down_proj come out as nan in a fresh process"]),
        ({"kernel_errors": {"up_proj": float("inf")}}, ["up_proj come out as inf"]),
        ({"max_logit_difference": 0.25}, ["a logit differs by 0.25 although all weights are equal"]),
        ({"max_logit_difference": float("nan")}, ["the logits come out as nan"]),
        ({"weights": {"a": "2"}}, ["1 of 1 weights differ, the first is a"]),
        ({"weights": {"a": "1", "b": "1"}}, ["the first is b"]),
    ],
)
def test_whatever_differs_fails_the_proof(
    changes: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refused(ProofError, "The exported model is not the trained one", "nothing was published", *words):
        measured(tmp_path, monkeypatch, **changes)


def test_no_job_accepts_what_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ProofError, "the logits come out as nan", "which no job accepts"):
        measured(tmp_path, monkeypatch, accept=True, max_logit_difference=float("nan"))


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


def test_a_model_that_cannot_generate_is_proved_all_the_same(own_code: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours of training are not lost to what transformers can't do with the base model either."""
    own = own_code.parent / "model" / "own.py"
    own.write_text(
        f"{OWN_CODE}    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **_):\n        raise ValueError('no cache of this kind')\n"
    )
    proof = run(own_code, own_code.parent / "work")["proof"]
    assert (proof["holds"], proof["generated"]) == (True, "")
    assert "generate failed (ValueError: no cache of this kind)" in capsys.readouterr().out


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

"""`finetune preflight` on a laptop: what it says, what it leaves, and that no weight is read for it. What it refuses is in test_bad_input.py."""

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from finetune_api import names, termination
from finetune_api.exits import ExitCode
from finetune_api.status import Stage
from finetune_api.termination import TerminationMessage
from finetune_trainer import base_model, pipeline
from finetune_trainer.errors import CapacityError, DataError
from finetune_trainer.reporting.session import ENV_TERMINATION_LOG
from finetune_trainer.stages import rehearse
from support.run_contexts import context, notes, refused, run_spec
from support.tiny_jobs import STEPS, description, finetune, tiny_job
from support.tiny_model import SIZES, save_with_tokenizer, sums, tiny_tokenizer
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM


def preflight(job: Path) -> int:
    return finetune("preflight", str(job), "--workdir", str(job.parent / "work"), "--cache", str(job.parent / "cache"))


def huge_model(folder: Path) -> int:
    """A whole model of 20 wide layers whose weights are a hole in a file; returns their bytes, far more than any machine of the tests has memory for."""
    width, layers = 32768, 20
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=64,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    header, end = {}, 0
    for name, parameter in base_model.empty_base(folder, trust_remote_code=False).named_parameters():
        size = parameter.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def test_what_was_checked_is_said_in_a_few_lines_and_nothing_is_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job = tiny_job(tmp_path)
    assert preflight(job) == 0
    said = capfd.readouterr().out
    for words in (
        "14 linear layers are quantized (100%",
        "32 rows to train on, 8 held out, 0 dropped, 0 cut",
        f"{STEPS} optimizer steps, the last 2",
        "published",
    ):
        assert words in " ".join(said.split())  # a long path breaks the line
    assert len(said.splitlines()) < 20
    assert not (tmp_path / "published").exists()
    assert list((tmp_path / "work").iterdir()) == []


def test_a_model_that_no_memory_holds_is_refused_and_no_weight_is_read(tmp_path: Path) -> None:
    (tmp_path / "huge").mkdir()
    size = huge_model(tmp_path / "huge")
    assert size > 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    job = description(tiny_job(tmp_path, {"model": {"source": f"file://{tmp_path}/huge"}}))
    with refused(CapacityError, f"weights {2 * size / 1e9:.2f} GB", "this machine has", "training.maxLength", "model.dtype"):
        pipeline.preflight(job, tmp_path / "work", tmp_path / "cache")


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ({"gpus": 0, "memory": "16Gi"}, "a pod with resources.memory 16Gi has 16.11 GB"),
        ({"gpus": 1, "gpuType": "nvidia-l4"}, "resources.gpuType nvidia-l4 has 23.08 GB"),
        ({"gpus": 1, "memory": "16Gi"}, "raise resources.memory"),
    ],
)
def test_a_pod_that_can_not_hold_the_training_is_never_asked_for(tmp_path: Path, resources: dict[str, Any], told: str) -> None:
    (tmp_path / "huge").mkdir()
    huge_model(tmp_path / "huge")
    ctx = context(tmp_path, run_spec(resources=resources), in_cluster=True)
    config = base_model.empty_base(tmp_path / "huge", trust_remote_code=False).config
    rows = SimpleNamespace(train=[SimpleNamespace(input_ids=range(64))], held_out=[])
    with refused(CapacityError, told):
        rehearse._require_fit(ctx, config, rows)


def test_a_model_that_needs_a_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_package(*_: Any, **__: Any) -> None:
        raise ImportError("\nTimmWrapperModel requires the timm library but it was not found in your environment. You can install it")

    job = tiny_job(tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", needs_package)
    for call in (pipeline.preflight, pipeline.run):
        with refused(
            DataError, "needs a Python package that is not installed here (TimmWrapperModel requires the timm library", "trainer's image"
        ):
            call(description(job), tmp_path / "work", tmp_path / "cache")


def test_a_model_whose_body_has_another_name_than_its_class_says_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    config = Llama4TextConfig(**SIZES, intermediate_size_mlp=64, head_dim=16, num_local_experts=2)
    save_with_tokenizer(Llama4ForCausalLM(config), tmp_path / "model")
    job = description(tiny_job(tmp_path, {"quantization": {"scheme": "none"}}))
    for call in (pipeline.preflight, pipeline.run):
        with refused(DataError, "can't be trained", "Llama4ForCausalLM", "it has no 'language_model'", "choose another model"):
            call(job, tmp_path / "work", tmp_path / "cache")


def test_a_run_that_passed_makes_the_steps_that_were_announced(tmp_path: Path) -> None:
    job = description(tiny_job(tmp_path, {"quantization": {"groupSize": 64}}))
    found = pipeline.preflight(job, tmp_path / "work", tmp_path / "cache")
    report = pipeline.run(job, tmp_path / "work", tmp_path / "cache")
    assert report["training"]["steps"] == found.plan.steps
    assert report["sources"] == {"model": found.model, "dataset": found.data.resolved, "heldOut": ""}
    nothing = {"dropped": 0, "cut": 0, "lostTokens": 0, "heldOutAlsoTrained": 0}
    assert report["data"] == {"form": "instruction", "train": len(found.data.train), "heldOut": len(found.data.held_out), **nothing}


def test_the_termination_message_of_a_success_has_the_revisions_and_what_to_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(log))
    rows = [*sums(40), {"instruction": "long " * 40, "output": "cut off"}]
    found = pipeline.preflight(description(tiny_job(tmp_path, rows=rows)), tmp_path / "work", tmp_path / "cache")
    expected = TerminationMessage(
        stage=Stage.PREFLIGHT,
        reason="Succeeded",
        exit_code=0,
        message="14 linear layers are quantized (100% of the linear weights, in groups of 32); not quantized: lm_head. "
        "1 rows were dropped: nothing of their completion fits into training.maxLength (64 tokens). "
        "8 tokens of them would have been trained; raise training.maxLength, or shorten the rows.",
        model=f"file://{tmp_path}/model",
        dataset=found.data.resolved,
    )
    assert log.read_bytes() == expected.encode().encode()
    assert b'"exitCode":0' in log.read_bytes()


def test_the_termination_message_of_a_refusal_is_the_one_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    job, written = tiny_job(tmp_path, {"dataset": {"source": f"file://{tmp_path}/nowhere.jsonl"}}), []
    for command in ("preflight", "run"):
        log = tmp_path / command
        monkeypatch.setenv(ENV_TERMINATION_LOG, str(log))
        assert finetune(command, str(job), "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")) == ExitCode.DATA
        written.append(log.read_bytes())
    message = termination.parse(written[0].decode())
    assert message is not None
    assert (message.stage, message.reason, message.exit_code) == (Stage.PREFLIGHT, "InvalidData", ExitCode.DATA)
    assert capfd.readouterr().err.splitlines()[0] == f"InvalidData: {message.message}"
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("resources", "told"),
    [
        ({"gpus": 1}, ["resources.gpuType is not set", "kernels"]),
        ({"gpus": 1, "gpuType": "nvidia-h100"}, ["resources.gpuType nvidia-h100 is unknown; known are", "nvidia-h100-80gb", "kernels"]),
        ({"gpus": 1, "gpuType": "nvidia-h100-80gb"}, ["driver and kernels", "(nvidia-h100-80gb) is held against the estimate"]),
        ({"gpus": 0}, []),
    ],
)
def test_what_takes_a_gpu_is_said_to_be_unchecked(tmp_path: Path, resources: dict[str, Any], told: list[str]) -> None:
    ctx = context(tmp_path, run_spec(resources=resources), in_cluster=True)
    rehearse._note_unchecked(ctx)
    said = " ".join(notes(ctx))
    assert ("Not checked" in said) == bool(told)
    for words in told:
        assert words in said


def test_a_pods_preflight_takes_its_job_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination-log"))
    monkeypatch.setenv(names.ENV_JOB, context(tmp_path, run_spec("file:///model"), in_cluster=True).job.to_json())
    assert finetune("preflight", "--workdir", str(tmp_path / "work"), "--cache", str(tmp_path / "cache")) == ExitCode.SPEC
    message = termination.parse((tmp_path / "termination-log").read_text())
    assert message is not None
    assert (message.stage, message.exit_code) == (Stage.PREFLIGHT, ExitCode.SPEC)
    assert "file:// works only on a laptop" in message.message

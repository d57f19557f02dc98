"""What a GPU changes, as far as a machine without one can tell: a pod that was promised one and sees none, and a model that leaves it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_trainer import pipeline, sources
from finetune_trainer.base_model import recomputes_activations
from finetune_trainer.errors import CapacityError
from finetune_trainer.memory.gpus import GPU_BYTES
from finetune_trainer.plan import Plan
from finetune_trainer.qat.prepare import exact_layers, mode_of, plain_name
from finetune_trainer.qat.scales import fit_scales
from finetune_trainer.stages import convert, load, train, verify
from support.exact_models import exact_model, logits_of, token_ids
from support.run_contexts import context, refused, run_spec
from support.tiny_jobs import run, tiny_job
from support.tiny_model import save_with_tokenizer, tiny_llama
from transformers import CTRLConfig, CTRLLMHeadModel, PreTrainedModel
from trl import SFTConfig


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(("cuda", "found"), [("13.0", "built for CUDA 13.0"), (None, "built for the CPU alone")])
def test_a_pod_that_asked_for_a_gpu_and_sees_none_is_refused_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, found: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(sources, "fetch_model", lambda _: pytest.fail("something was fetched"))
    ctx = context(tmp_path, run_spec(resources={"gpus": 1}), in_cluster=True)
    with refused(CapacityError, "spec.resources.gpus is 1", found, "newer NVIDIA driver", "resources.gpus to 0"):
        pipeline._make(ctx, ctx.reporter)


def test_a_pod_that_asked_for_no_gpu_trains_on_its_cpu(tmp_path: Path) -> None:
    load.require_gpu(context(tmp_path, run_spec(resources={"gpus": 0}), in_cluster=True))


def test_a_laptop_takes_what_it_has(tmp_path: Path) -> None:
    load.require_gpu(context(tmp_path, run_spec(resources={"gpus": 1})))


CUDA_13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")  # what torch 2.13.0+cu130 is built for
GPUS: list[tuple[str, tuple[int, int], tuple[str, ...], bool]] = [
    ("Tesla T4", (7, 5), CUDA_13, True),
    ("NVIDIA A100-SXM4-80GB", (8, 0), CUDA_13, True),
    ("NVIDIA L4, which runs what is built for an earlier GPU of its generation", (8, 9), CUDA_13, True),
    ("NVIDIA H200", (9, 0), CUDA_13, True),
    ("a later generation, where there is code to translate for it", (13, 0), (*CUDA_13, "compute_120"), True),
    ("a later generation, where there is none", (13, 0), CUDA_13, False),
    ("Tesla V100-SXM2-16GB", (7, 0), CUDA_13, False),
    ("Tesla V100-SXM2-16GB, with an older PyTorch", (7, 0), ("sm_70", "sm_90a"), True),
    ("one of another maker", (9, 0), ("gfx90a",), True),
    ("one that PyTorch says nothing of", (9, 0), (), True),
]


def with_gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], built: tuple[str, ...] = CUDA_13) -> None:
    """A machine with this GPU, as far as PyTorch says."""
    for function, answer in (
        ("is_available", True),
        ("get_device_name", name),
        ("get_device_capability", capability),
        ("get_arch_list", list(built)),
    ):
        monkeypatch.setattr(torch.cuda, function, lambda *_, said=answer: said)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(("name", "capability", "built", "runs"), GPUS, ids=[case[0] for case in GPUS])
@pytest.mark.parametrize("in_cluster", [True, False])
def test_a_gpu_is_used_where_pytorch_is_built_for_it_and_refused_where_it_is_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    capability: tuple[int, int],
    built: tuple[str, ...],
    runs: bool,
    in_cluster: bool,
) -> None:
    with_gpu(monkeypatch, name, capability, built)
    ctx = context(tmp_path, run_spec(resources={"gpus": 1}), in_cluster=in_cluster)
    if runs:
        return load.require_gpu(ctx)
    mend = "scheduling.nodeSelector" if in_cluster else "CUDA_VISIBLE_DEVICES"
    with refused(CapacityError, f"{name} has compute capability {capability[0]}.{capability[1]}", "sm_75, sm_80", "CUDA 13.0", mend):
        load.require_gpu(ctx)
    return None


def test_the_table_of_gpus_has_none_that_the_image_can_not_use() -> None:
    assert len(GPU_BYTES) >= 9
    assert [name for name in GPU_BYTES if re.search(r"v100|p100|p40?$|k80|m60", name)] == []


def test_a_model_on_a_gpu_leaves_it_with_all_that_it_keeps_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = exact_model(targets="q_proj")
    fit_scales(model)
    logits_of(model, token_ids())
    done: list[Any] = []
    monkeypatch.setattr(type(model), "device", torch.device("cuda", 0), raising=False)
    monkeypatch.setattr(type(model), "to", lambda _, device: done.append(device))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    mode, states = mode_of(model), [layer.exact for _, layer in exact_layers(model)]
    assert any(state.cached for state in states)
    assert any(state.clip_ratio is not None for state in states)
    assert mode.last_input._codes is not None
    convert.make_room(model)
    assert done == ["cpu", "emptied"]
    assert all((state.cached, state.clip_ratio, state.rounding_offset) == (None, None, None) for state in states)
    assert mode.last_input._codes is None


def test_a_model_on_the_cpu_gives_up_what_was_exported_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("there is no GPU to empty"))
    model = exact_model()
    quantized = {f"{name}.weight" for name, _ in exact_layers(model)}
    convert.make_room(model)
    left = {
        plain_name(name.replace(".base_layer", "")): weight.numel() for name, weight in model.named_parameters() if ".lora_" not in name
    }
    assert {name for name, size in left.items() if size == 0} == quantized


def test_room_is_made_after_the_export_and_before_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    for module, name in ((convert, "run"), (convert, "make_room"), (verify, "run")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, f=original, n=f"{module.__name__}.{name}": order.append(n) or f(*args))
    run(tiny_job(tmp_path, {"outputs": {"artifacts": ["adapter", "quantized"]}}), tmp_path / "work")
    assert [name.removeprefix("finetune_trainer.stages.") for name in order] == ["convert.run", "convert.make_room", "verify.run"]


def test_a_machine_with_several_gpus_trains_on_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SFTConfig._setup_devices.func

    def found(self: SFTConfig) -> torch.device:
        device = original(self)
        self._n_gpu = 4
        return device

    monkeypatch.setattr(SFTConfig, "_setup_devices", property(found))
    steps = Plan(steps=2, switch_step=1, micro_batch=4, accumulation=2, warmup_steps=0)
    arguments = train._arguments(context(tmp_path, run_spec()), steps, on_gpu=False, checkpointed=False)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 8)


def tiny_ctrl() -> CTRLLMHeadModel:
    return CTRLLMHeadModel(CTRLConfig(vocab_size=260, n_positions=512, n_embd=64, dff=128, n_layer=2, n_head=4))


@pytest.mark.parametrize(("model", "can"), [(tiny_llama, True), (tiny_ctrl, False)])
def test_activations_that_are_computed_again_as_on_a_gpu_change_no_bit(
    model: Callable[[], PreTrainedModel], can: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_with_tokenizer(model(), tmp_path / "model")
    made: list[SFTConfig] = []
    monkeypatch.setattr(train, "SFTConfig", lambda **options: made.append(SFTConfig(**options)) or made[-1])

    def adapter_of(name: str) -> bytes:
        (tmp_path / name).mkdir()
        run(tiny_job(tmp_path / name, {"model": {"source": f"file://{base}"}}), tmp_path / name / "work")
        return (tmp_path / name / "published" / "lora_model" / "adapter_model.safetensors").read_bytes()

    kept = adapter_of("kept")
    monkeypatch.setattr(train, "recomputes_activations", lambda model, on_gpu: recomputes_activations(model, on_gpu=True))
    assert adapter_of("computed-again") == kept
    assert [arguments.activation_checkpointing for arguments in made] == [False, can]

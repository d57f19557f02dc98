"""What holds for every backend. In the main environment that is native alone, in the environment of `make test-unsloth` both."""

from pathlib import Path

import pytest
import torch
from finetune_api.spec import LoraSpec, Scheme
from finetune_trainer.backends import Backend, has_unsloth, import_unsloth, native
from finetune_trainer.errors import DataError, SpecError
from finetune_trainer.qat.prepare import prepare
from finetune_trainer.qat.trial import require_effect
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.exact_models import logits_of, quantization, token_ids
from support.tiny_model import save_tiny_model

BACKENDS: list[Backend] = [native, import_unsloth()] if has_unsloth() else [native]
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.NAME)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def adapted(backend: Backend, folder: Path, scheme: Scheme = Scheme.NONE, **lora: object) -> PeftModel:
    base = backend.load_base(folder, "auto", trust_remote_code=False)
    torch.manual_seed(7)
    return backend.add_adapter(base, LoraSpec(rank=4, **lora), scheme)


@each_backend
@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_every_weight_is_the_files_own(backend: Backend, folder: Path, dtype: str, expected: torch.dtype) -> None:
    loaded = dict(backend.load_base(folder, dtype, trust_remote_code=False).named_parameters())
    written = load_file(folder / "model.safetensors")
    assert written.keys() == loaded.keys()
    for name, weight in written.items():
        assert torch.equal(loaded[name], weight.to(expected)), name


@each_backend
def test_a_weight_that_is_missing_is_refused(backend: Backend, folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"lacks 1 weights, the first is model\.layers\.0\.mlp\.down_proj\.weight"):
        backend.load_base(tmp_path, "auto", trust_remote_code=False)


@each_backend
@pytest.mark.parametrize("scheme", [Scheme.NONE, Scheme.INT8_INT4])
def test_a_fresh_adapter_changes_no_logit_and_is_on_every_linear_but_the_head(backend: Backend, folder: Path, scheme: Scheme) -> None:
    model = adapted(backend, folder, scheme)
    tokens = token_ids()
    with model.disable_adapter():
        plain = logits_of(model, tokens)
    assert torch.equal(logits_of(model, tokens), plain)
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == 14
    assert {name.rsplit(".", 3)[-3] for name, item in model.named_parameters() if item.requires_grad} == {"lora_A", "lora_B"}


@each_backend
def test_the_same_seed_draws_the_adapter_that_native_draws(backend: Backend, folder: Path) -> None:
    expected = dict(adapted(native, folder).named_parameters())
    drawn = dict(adapted(backend, folder).named_parameters())
    assert expected.keys() == drawn.keys()
    assert all(torch.equal(drawn[name], weight) for name, weight in expected.items())


@each_backend
@pytest.mark.parametrize("scheme", [Scheme.NONE, Scheme.INT8_INT4])
def test_the_output_head_is_refused_as_a_target(backend: Backend, folder: Path, scheme: Scheme) -> None:
    with pytest.raises(SpecError, match="'lm_head', which is this model's output head"):
        adapted(backend, folder, scheme, target_modules="q_proj,lm_head")


@each_backend
def test_exact_layers_are_called(backend: Backend, folder: Path) -> None:
    model = adapted(backend, folder, Scheme.INT8_INT4)
    assert len(prepare(model, quantization()).layers) == 14
    require_effect(model, token_ids(rows=1))

"""Layers whose weight a model reads past them get no adapter and no quantized weight, unless the quantized model calls them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_api.spec import LoraSpec
from finetune_trainer.adapter import add_adapter
from finetune_trainer.errors import SpecError
from finetune_trainer.language_model import bypassed_linears
from finetune_trainer.qat.prepare import exact_layers, prepare
from peft import LoraConfig, PeftModel, get_peft_model
from support.exact_models import quantization
from support.tiny_jobs import run, tiny_job
from support.tiny_model import save_with_tokenizer, tiny_llama
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

SIZES = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2}
MAMBA = SIZES | {"state_size": 8, "time_step_rank": 32, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 0}


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**MAMBA))


def falcon_mamba() -> PreTrainedModel:
    return FalconMambaForCausalLM(FalconMambaConfig(**MAMBA))


def rwkv() -> PreTrainedModel:
    return RwkvForCausalLM(RwkvConfig(**SIZES, attention_hidden_size=64, intermediate_size=128, context_length=512))


KINDS: list[tuple[Callable[[], PreTrainedModel], set[str]]] = [
    (tiny_llama, set()),
    (mamba, {"dt_proj"}),
    (falcon_mamba, {"dt_proj"}),
    (rwkv, {"output", "value"}),
]


def last_names(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(("model", "bypassed"), KINDS)
def test_a_weight_that_is_read_past_its_layer_is_found(model: Callable[[], PreTrainedModel], bypassed: set[str]) -> None:
    assert last_names(bypassed_linears(model())) == bypassed


@pytest.mark.parametrize(("model", "bypassed"), KINDS[1:])
def test_it_is_found_without_weights_too(model: Callable[[], PreTrainedModel], bypassed: set[str]) -> None:
    with torch.device("meta"):
        empty = model()
    assert last_names(bypassed_linears(empty)) == bypassed


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", [tiny_llama, rwkv])
def test_looking_changes_nothing(model: Callable[[], PreTrainedModel], training: bool) -> None:
    looked_at = model().train(training)
    weights, random_state = {name: item.clone() for name, item in looked_at.state_dict().items()}, torch.get_rng_state()
    bypassed_linears(looked_at)
    assert looked_at.training == training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(item, weights[name]) for name, item in looked_at.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in looked_at.modules())


def test_a_model_that_does_not_run_as_it_stands_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mamba()
    monkeypatch.setattr(model.backbone.layers[1], "forward", lambda *_, **__: 1 / 0)
    assert bypassed_linears(model) == []


def test_by_default_it_gets_no_adapter_and_is_refused_by_name() -> None:
    adapted = [name for name, _ in add_adapter(mamba(), LoraSpec(rank=4)).named_modules() if name.endswith(".lora_A")]
    assert last_names([name.removesuffix(".lora_A") for name in adapted]) == {"in_proj", "x_proj"}
    with pytest.raises(SpecError, match=r"spec\.lora\.targetModules names 'dt_proj', whose weight .* change nothing; leave it out"):
        add_adapter(mamba(), LoraSpec(rank=4, target_modules="in_proj,dt_proj"))


def adapted(base: PreTrainedModel, *targets: str) -> PeftModel:
    return get_peft_model(base, LoraConfig(r=4, target_modules=list(targets), task_type="CAUSAL_LM"))


def test_it_is_not_quantized_and_the_reason_is_told() -> None:
    prepared = prepare(adapted(mamba(), "in_proj"), quantization())
    assert {reason for name, reason in prepared.skipped.items() if name.endswith("dt_proj")} == {"has a weight that is read past the layer"}
    assert prepared.coverage < 1


def test_an_adapter_on_it_could_not_be_merged() -> None:
    with pytest.raises(SpecError, match=r"targetModules: backbone\.layers\.0\.mixer\.dt_proj.*leave it out"):
        prepare(adapted(mamba(), "dt_proj"), quantization())


def test_what_the_quantized_model_calls_is_called_in_training_and_quantized() -> None:
    model = adapted(falcon_mamba(), "in_proj")
    assert prepare(model, quantization()).coverage == 1.0
    assert "dt_proj" in last_names([name for name, _ in exact_layers(model)])
    assert "_is_quantized" not in model.get_base_model().config.to_dict()


@pytest.mark.filterwarnings("ignore")  # transformers, of kernels that are not there
@pytest.mark.parametrize(
    ("model", "dtype"), [(mamba, "bfloat16"), (falcon_mamba, "bfloat16"), (falcon_mamba, "float32"), (rwkv, "float32")]
)
def test_the_exported_model_is_the_trained_one(model: Callable[[], PreTrainedModel], dtype: str, tmp_path: Path) -> None:
    base = save_with_tokenizer(model(), tmp_path / "model")
    changes = {"model": {"source": f"file://{base}", "dtype": dtype}, "quality": {"onFailure": "Warn"}}
    report = run(tiny_job(tmp_path, changes | {"outputs": {"artifacts": ["quantized"]}}), tmp_path / "work")
    assert report["proof"]["holds"]

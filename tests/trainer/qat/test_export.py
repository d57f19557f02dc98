"""What is trained is what is shipped: the exported model, in memory and reloaded by plain transformers, computes the training's logits."""

import json
import tracemalloc
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_api.spec import LoraSpec, Scheme
from finetune_trainer.adapter import add_adapter
from finetune_trainer.base_model import note_untied
from finetune_trainer.errors import DataError
from finetune_trainer.qat import export
from finetune_trainer.qat.export import exported_tensor, plain_model, tensor_digest, trained_digests, weight_digests
from finetune_trainer.qat.kernels import reference_arithmetic
from finetune_trainer.qat.linear import base_linear, fake_quantized_weight, merged_weight
from finetune_trainer.qat.prepare import exact_layers, prepare
from finetune_trainer.qat.schemes import SCHEMES as TABLE
from finetune_trainer.qat.tensors import QUANTIZED, dequantized
from finetune_trainer.qat.trial import training_logits
from finetune_trainer.stages.convert import reference_batch
from peft import PeftModel
from safetensors import safe_open
from support.exact_models import DTYPES, KERNELS, SCHEMES, WIDE, exact_layer, exact_model, lora_model, lora_opt, quantization
from support.tiny_model import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

SKIPPED = {"lm_head": "output head"}
IDS, MASK = reference_batch(260)


def exported(model: PeftModel, scheme: Scheme) -> PreTrainedModel:
    return plain_model(model, scheme, SKIPPED, trust_remote_code=False)


def reloaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Saved, and loaded as any user of transformers does."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@torch.no_grad()
def plain_logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits


def state_of(model: PeftModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_consumed_model_writes_the_same_weights_and_holds_each_once(
    scheme: Scheme, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(exact_model(scheme), scheme).save_pretrained(tmp_path / "kept")
    consumed = plain_model(exact_model(scheme), scheme, SKIPPED, trust_remote_code=False, consume=True)
    quantized = [name for name, weight in consumed.named_parameters() if isinstance(weight, QUANTIZED)]
    weights = [weakref.ref(consumed.get_parameter(name)) for name in quantized]
    flatten, left = export.flatten_tensor_state_dict, []

    def flatten_one(tensors: dict[str, Tensor]) -> Any:
        left.append(sum(weight() is not None for weight in weights))
        return flatten(tensors)

    monkeypatch.setattr(export, "flatten_tensor_state_dict", flatten_one)
    consumed.save_pretrained(tmp_path / "consumed")
    assert sorted(set(left), reverse=True) == list(range(len(weights), left[-1] - 1, -1))
    assert left[-1] <= 1
    kept, written = (safe_open(tmp_path / name / "model.safetensors", "pt") for name in ("kept", "consumed"))
    assert written.metadata() == kept.metadata()
    assert sorted(written.keys()) == sorted(kept.keys())
    assert all(torch.equal(written.get_tensor(name), kept.get_tensor(name)) for name in kept.keys())  # noqa: SIM118 no mapping


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", KERNELS)
def test_the_exported_model_has_the_logits_of_the_training(scheme: Scheme, dtype: torch.dtype) -> None:
    model = exact_model(scheme, dtype=dtype)
    difference = plain_logits(exported(model, scheme)) - training_logits(model, IDS, MASK)
    assert float(difference.abs().max()) == 0.0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_is_consumed_gives_up_each_weight_before_the_next_is_exported(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = weight_digests(exported(exact_model(scheme), scheme)), exact_model(scheme)
    weights = [weakref.ref(base_linear(layer).weight.untyped_storage()) for _, layer in exact_layers(model)]
    given_up: list[int] = []

    def export_one(*arguments: Any) -> Tensor:
        given_up.append(sum(weight() is None for weight in weights))
        return exported_tensor(*arguments)

    monkeypatch.setattr(export, "exported_tensor", export_one)
    assert weight_digests(plain_model(model, scheme, SKIPPED, trust_remote_code=False, consume=True)) == expected
    assert given_up == list(range(len(weights)))
    assert not any(weight() for weight in weights)
    assert not any(layer.exact.cached for _, layer in exact_layers(model))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_saved_and_reloaded_model_has_the_logits_of_the_training(scheme: Scheme, dtype: torch.dtype, tmp_path: Path) -> None:
    model = exact_model(scheme, dtype=dtype)
    loaded = reloaded(exported(model, scheme), tmp_path)
    assert loaded.dtype == dtype
    with nullcontext() if scheme in KERNELS else reference_arithmetic(loaded):
        assert float((plain_logits(loaded) - training_logits(model, IDS, MASK)).abs().max()) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reloaded_weights_are_those_that_training_used(scheme: Scheme, dtype: torch.dtype, tmp_path: Path) -> None:
    model = exact_model(scheme, dtype=dtype)
    assert weight_digests(reloaded(exported(model, scheme), tmp_path)) == trained_digests(model)


@pytest.mark.parametrize("changes", [{"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}, {"targets": "q_proj"}])
def test_untied_heads_biases_and_frozen_layers_are_exported_exactly(changes: dict[str, object], tmp_path: Path) -> None:
    model = exact_model(**changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    loaded = reloaded(exported(model, Scheme.INT8_INT4), tmp_path)
    assert float((plain_logits(loaded) - training_logits(model, IDS, MASK)).abs().max()) == 0.0
    assert weight_digests(loaded) == trained_digests(model)


def test_a_head_of_its_own_is_exported_though_config_json_ties_it_to_the_embedding(tmp_path: Path) -> None:
    """As peft's modules_to_save leaves it; transformers loads both and says that config.json is wrong."""
    base = tiny_llama(tie_word_embeddings=False)
    base.config.tie_word_embeddings = True
    base.save_pretrained(tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118 not a mapping
    loaded_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    note_untied(loaded_base)
    model = add_adapter(loaded_base, LoraSpec(rank=4))
    prepare(model, quantization())
    loaded = reloaded(exported(model, Scheme.INT8_INT4), tmp_path / "exported")
    assert loaded.config.tie_word_embeddings is False
    assert weight_digests(loaded) == trained_digests(model)
    assert float((plain_logits(loaded) - training_logits(model, IDS, MASK)).abs().max()) == 0.0


def test_buffers_that_are_saved_are_proved_too() -> None:
    """Under the names of the exported model; what is not saved, such as rotary frequencies, comes from its code."""
    model = exact_model()
    layer = base_linear(exact_layer(model, "0.self_attn.q_proj"))
    layer.register_buffer("gain", torch.tensor([2.0]))
    layer.register_buffer("table", torch.tensor([2.0]), persistent=False)
    name = "model.layers.0.self_attn.q_proj"
    before = trained_digests(model)
    layer.gain += 1
    assert trained_digests(model)[f"{name}.gain"] != before[f"{name}.gain"]
    assert f"{name}.table" not in before
    assert weight_digests(layer)["gain"] == trained_digests(model)[f"{name}.gain"]
    assert "table" not in weight_digests(layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_on_layers_that_are_not_quantized_are_merged_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = lora_model(dtype=dtype, hidden_size=128, intermediate_size=96)
    skipped = prepare(model, quantization(group_size=128)).skipped  # down_proj does not fit
    loaded = reloaded(plain_model(model, Scheme.INT8_INT4, skipped, trust_remote_code=False), tmp_path)
    assert float((plain_logits(loaded) - training_logits(model, IDS, MASK)).abs().max()) == 0.0
    assert weight_digests(loaded) == trained_digests(model)


def test_a_base_model_with_dropout_is_exported_exactly(tmp_path: Path) -> None:
    model = lora_opt(dropout=0.5, attention_dropout=0.5)
    prepare(model, quantization())
    loaded = reloaded(exported(model, Scheme.INT8_INT4), tmp_path)
    assert float((plain_logits(loaded) - training_logits(model, IDS, MASK)).abs().max()) == 0.0
    assert weight_digests(loaded) == trained_digests(model)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reloaded_model_is_quantized_where_training_was_and_nowhere_else(scheme: Scheme, tmp_path: Path) -> None:
    model = exact_model(scheme)
    loaded = reloaded(exported(model, scheme), tmp_path)
    found = {name: type(parameter).__name__ for name, parameter in loaded.named_parameters() if isinstance(parameter, QUANTIZED)}
    assert found.keys() == {f"{name}.weight" for name, _ in exact_layers(model)}
    assert set(found.values()) == {TABLE[scheme].tensor_name.partition(",")[0]}
    assert len(found) == 14


def test_the_configuration_names_what_is_not_quantized(tmp_path: Path) -> None:
    model = lora_model(hidden_size=128, intermediate_size=96)
    skipped = prepare(model, quantization(group_size=128)).skipped
    plain_model(model, Scheme.INT8_INT4, skipped, trust_remote_code=False).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["quantization_config"]["modules_to_not_convert"] == sorted(skipped)
    assert written["use_cache"] is True


def test_the_reloaded_model_generates(tmp_path: Path) -> None:
    loaded = reloaded(exported(exact_model(), Scheme.INT8_INT4), tmp_path)
    generated = loaded.generate(IDS[:1], attention_mask=MASK[:1], max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert generated.shape == (1, IDS.shape[1] + 3)


def test_exporting_leaves_the_trained_model_as_it_is(tmp_path: Path) -> None:
    model = exact_model().train()
    state, logits, cached = state_of(model), training_logits(model, IDS, MASK), model.get_base_model().config.use_cache
    exported(model, Scheme.INT8_INT4).save_pretrained(tmp_path)
    assert model.training
    assert model.get_base_model().config.use_cache == cached
    assert getattr(model.get_base_model().config, "quantization_config", None) is None
    assert torch.equal(training_logits(model, IDS, MASK), logits)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_exported_model_shares_what_is_not_quantized() -> None:
    model = exact_model()
    embeddings = exported(model, Scheme.INT8_INT4).get_input_embeddings().weight
    assert embeddings.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def test_nothing_of_the_exported_model_is_left_without_values() -> None:
    plain = exported(exact_model(), Scheme.INT8_INT4)
    assert not [name for name, value in (*plain.named_parameters(), *plain.named_buffers()) if value.is_meta]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_exported_tensor_dequantizes_to_the_weight_of_the_training(scheme: Scheme, dtype: torch.dtype) -> None:
    model = exact_model(scheme, dtype=dtype)
    layers = list(exact_layers(model))
    assert len(layers) == 14
    assert all(torch.equal(dequantized(exported_tensor(name, layer, scheme)), fake_quantized_weight(layer)) for name, layer in layers)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_trained_weight_that_is_not_finite_is_not_exported(scheme: Scheme) -> None:
    model = exact_model(scheme)
    layer = exact_layer(model, "k_proj")
    with torch.no_grad():
        layer.lora_B["default"].weight[1, 1] = float("nan")
    with pytest.raises(DataError, match="The trained weight of k_proj has values that are not finite"):
        exported_tensor("k_proj", layer, scheme)


@pytest.mark.parametrize(("scheme", "most"), [(Scheme.INT8, 1.1), (Scheme.INT4, 0.6), (Scheme.FP8_INT4, 0.6), (Scheme.FP8_FP8, 1.1)])
def test_a_file_holds_as_few_bytes_as_the_scheme_promises(scheme: Scheme, most: float, tmp_path: Path) -> None:
    model = exact_model(scheme, dtype=torch.bfloat16, **WIDE)
    exported(model, scheme).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        linears = [file.get_tensor(name) for name in file.keys() if "_proj" in name]  # noqa: SIM118 not a mapping
    assert sum(item.nbytes for item in linears) <= most * sum(layer.weight.numel() for _, layer in exact_layers(model))


def test_exporting_a_weight_that_was_quantized_before_would_ship_another_one() -> None:
    layer = exact_layer(exact_model(), "q_proj")
    quantizer = layer.exact.quantizer
    assert quantizer is not None
    once = quantizer.dequantize(quantizer.quantize(merged_weight(layer)))
    assert not torch.equal(quantizer.dequantize(quantizer.quantize(once)), fake_quantized_weight(layer))


def test_digests_change_with_one_bit_of_one_weight() -> None:
    model = exact_model()
    before = trained_digests(model)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[5, 7] = torch.nextafter(weight[5, 7], torch.tensor(9.0))
    changed = {name for name, digest in trained_digests(model).items() if digest != before[name]}
    assert changed == {"model.embed_tokens.weight", "lm_head.weight"}


def test_digests_tell_dtypes_and_shapes_apart() -> None:
    zeros = torch.zeros(4, 2)
    assert len({tensor_digest(item) for item in (zeros, zeros.view(2, 4), torch.zeros(4, 2, dtype=torch.int32))}) == 3


def test_a_digest_takes_no_memory_of_the_tensors_size() -> None:
    tensor = torch.zeros(2**20)
    tracemalloc.start()
    try:
        tensor_digest(tensor)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < tensor.nbytes / 10

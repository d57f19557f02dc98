"""Preparing a model: which layers become exact, which stay as they are and are listed, and what is refused with a sentence."""

from typing import Any

import pytest
import torch
from finetune_api.spec import LoraSpec, Scheme
from finetune_trainer.adapter import add_adapter, summary
from finetune_trainer.errors import ProofError, SpecError
from finetune_trainer.qat.linear import ExactFrozenLinear, ExactLoraLinear, fake_quantized_weight
from finetune_trainer.qat.prepare import (
    exact_layers,
    fake_quantization,
    merged_layers,
    mode_of,
    prepare,
    serving_note,
    set_fake_quantization,
)
from finetune_trainer.qat.trial import require_effect, require_served_function
from peft import LoraConfig, PeftModel, get_peft_model
from support.exact_models import (
    SCHEMES,
    WIDE,
    exact_layer,
    exact_model,
    logits_of,
    lora_model,
    lora_opt,
    quantization,
    tiny_mixture,
    token_ids,
)
from support.tiny_model import tiny_llama
from transformers import FalconH1Config, FalconH1ForCausalLM, GPT2Config, GPT2LMHeadModel

NARROW = {"hidden_size": 128, "intermediate_size": 96}  # all but down_proj divide into groups of 128
PER_LAYER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def peft_model(**config: Any) -> PeftModel:
    """A tiny model with an adapter that the trainer itself would not make."""
    return get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **config))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_of_every_layer_becomes_exact(scheme: Scheme) -> None:
    model = lora_model(**WIDE)
    prepared = prepare(model, quantization(scheme))
    assert len(prepared.layers) == 2 * len(PER_LAYER)
    assert {name.rpartition(".")[2] for name in prepared.layers} == set(PER_LAYER)
    assert prepared.coverage == 1.0


def test_layers_are_named_as_the_merged_model_knows_them() -> None:
    model = lora_model(targets="q_proj")
    names = {name for name, _ in tiny_llama().named_modules()}
    prepared = prepare(model, quantization())
    assert set(prepared.layers) | set(prepared.skipped) <= names
    assert [name for name, _ in exact_layers(model)] == list(prepared.layers)


def test_frozen_linears_are_made_exact_too() -> None:
    model = lora_model(targets="q_proj")
    prepared = prepare(model, quantization())
    kinds = [type(layer) for _, layer in exact_layers(model)]
    assert (kinds.count(ExactLoraLinear), kinds.count(ExactFrozenLinear)) == (2, 12)
    assert len(prepared.layers) == 14


@pytest.mark.parametrize("ending", ["k_proj", "o_proj", "down_proj"])
def test_a_frozen_linear_computes_with_its_fake_quantized_weight(ending: str) -> None:
    layer = exact_layer(exact_model(Scheme.INT8, targets="q_proj"), ending)
    assert isinstance(layer, ExactFrozenLinear)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(fake_quantized_weight(layer), layer.weight)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, fake_quantized_weight(layer)))


def test_the_output_head_stays_as_it_is_and_is_listed() -> None:
    model = lora_model(tie_word_embeddings=False)
    assert prepare(model, quantization()).skipped == {"lm_head": "output head"}
    assert type(model.get_base_model().lm_head) is torch.nn.Linear


def test_layers_that_do_not_fit_the_group_are_listed_with_the_reason() -> None:
    prepared = prepare(lora_model(**NARROW, targets="down_proj"), quantization(group_size=128))
    reasons = {name.rpartition(".")[2]: reason for name, reason in prepared.skipped.items()}
    assert reasons.pop("lm_head") == "output head"
    assert reasons == {"down_proj": "input size 96 does not divide into groups of 128"}


def test_coverage_is_the_share_of_linear_weights_that_are_quantized() -> None:
    prepared = prepare(lora_model(**NARROW), quantization(group_size=128))
    attention, mlp = 2 * 128 * 128 + 2 * 128 * 64, 3 * 128 * 96
    assert prepared.coverage == pytest.approx(1 - 128 * 96 / (attention + mlp))


def test_a_skipped_layer_with_an_adapter_computes_merged_as_export_has_it() -> None:
    model = lora_model(**NARROW)
    prepared = prepare(model, quantization(group_size=128))
    merged = dict(merged_layers(model))
    assert set(merged) == set(prepared.skipped) - {"lm_head"}
    layer = merged["model.layers.0.mlp.down_proj"]
    x = torch.randn(3, 96, generator=torch.Generator().manual_seed(0))
    factors = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ (layer.weight + layer.scaling["default"] * factors[1] @ factors[0]).T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_on_the_output_head_is_refused(tied: bool) -> None:
    with pytest.raises(SpecError, match=r"spec\.lora\.targetModules names 'lm_head'.*output head.*leave it out"):
        lora_model(targets="q_proj,lm_head", tie_word_embeddings=tied)


def test_the_output_head_is_not_among_the_layers_that_are_offered() -> None:
    with pytest.raises(
        SpecError, match=r"; choose from its linear layers: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\."
    ):
        lora_model(targets="no_such_proj")


def test_less_than_half_of_the_weights_is_refused_with_what_would_fit() -> None:
    with pytest.raises(SpecError, match=r"int8-int4 in groups of 128 would quantize only 22%.*choose groupSize 64 or scheme"):
        prepare(lora_model(), quantization(group_size=128))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft, of its own pattern
def test_a_mixture_is_refused_before_its_experts_are_trained_for_nothing() -> None:
    """peft puts its adapter on the experts too, which are no layers that export merges."""
    with pytest.raises(SpecError, match=r"spec\.lora\.targetModules: LoRA on model\.layers\.0\.mlp\.(experts|gate) .*choose scheme none"):
        prepare(add_adapter(tiny_mixture(moe_intermediate_size=8), LoraSpec(rank=4)), quantization())


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft, of its own pattern
def test_a_mixture_of_experts_alone_is_not_told_to_leave_them_out() -> None:
    """Without their adapters it would be refused again: its attention is less than half of its weights."""
    with pytest.raises(
        SpecError, match=r"would quantize only \d+% of this model's linear weights.*its experts share tensors.*; choose scheme none\.$"
    ):
        prepare(add_adapter(tiny_mixture(), LoraSpec(rank=4)), quantization())


def test_a_mixture_whose_attention_alone_is_trained_counts_its_experts_as_not_quantized() -> None:
    with pytest.raises(SpecError, match=r"would quantize only \d+% of this model's linear weights.*its experts share tensors"):
        prepare(add_adapter(tiny_mixture(), LoraSpec(rank=4, target_modules="q_proj,k_proj,v_proj,o_proj")), quantization())


def test_layers_that_share_a_weight_are_refused() -> None:
    """As Zamba's attention does: each has an adapter of its own, so the exported weights would differ, and be tied again."""
    base = tiny_llama()
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        SpecError,
        match=r"the layers model\.layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj .* share one weight.*; choose scheme none\.$",
    ):
        prepare(add_adapter(base, LoraSpec(rank=4)), quantization())


class Transposing(torch.nn.Linear):
    """As Falcon's layers: torchao's tensors can't be transposed, so what is shipped would not run."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 torch's name
        return input @ self.weight.T


def test_a_frozen_layer_that_computes_in_a_way_of_its_own_is_not_quantized_and_counts() -> None:
    model = lora_model(targets="q_proj")
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    layer.__class__ = Transposing
    prepared = prepare(model, quantization())
    assert prepared.skipped == {"lm_head": "output head", "model.layers.0.mlp.up_proj": "computes in a way of its own"}
    assert type(layer) is Transposing
    assert prepared.coverage == pytest.approx(1 - layer.weight.numel() / linear_weights(model))


def test_an_adapter_on_a_layer_that_computes_in_a_way_of_its_own_is_refused() -> None:
    model = lora_model()
    model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().__class__ = Transposing
    with pytest.raises(SpecError, match=r"targetModules: model\.layers\.0\.mlp\.up_proj computes in a way of its own.*leave it out"):
        prepare(model, quantization())


def test_a_model_of_such_layers_alone_is_refused() -> None:
    model = lora_model()
    for module in list(model.get_base_model().modules()):
        if type(module) is torch.nn.Linear and module.bias is None and module.in_features >= 64 and module.out_features < 260:
            module.__class__ = Transposing
    with pytest.raises(SpecError, match=r"quantize only 0%.*its layers compute in a way of their own.*choose scheme none"):
        prepare(model, quantization())


def linear_weights(model: PeftModel) -> int:
    """Of all linear layers but the output head."""
    return sum(layer.weight.numel() for name, layer in model.get_base_model().named_modules() if name.endswith("_proj"))


def empty_hybrid() -> FalconH1ForCausalLM:
    """Without weights."""
    config = FalconH1Config(
        vocab_size=260, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, mamba_d_ssm=64,
        mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16,
    )  # fmt: skip
    with torch.device("meta"):
        return FalconH1ForCausalLM(config)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_peft_has_no_adapter_for_is_refused_by_name_and_left_out_by_default() -> None:
    with pytest.raises(
        SpecError, match=r"spec\.lora\.targetModules 'in_proj,out_proj' does not suit this model \(.*out_proj.*name the layers that do"
    ):
        add_adapter(empty_hybrid(), LoraSpec(rank=4, target_modules="in_proj,out_proj"))
    model = add_adapter(empty_hybrid(), LoraSpec(rank=4))
    adapted = adapted_names(model)
    assert {"in_proj", "q_proj", "gate_proj"} <= adapted
    assert "out_proj" not in adapted
    assert summary(model).endswith("in 8 layers; without an adapter: out_proj (1).")


def adapted_names(model: PeftModel) -> set[str]:
    """The last names of the layers with an adapter."""
    return {name.removesuffix(".lora_A").rpartition(".")[2] for name, _ in model.named_modules() if name.endswith(".lora_A")}


class Pair(torch.nn.Linear):
    """As Llama 4's router."""

    def forward(self, input: torch.Tensor) -> Any:  # noqa: A002 torch's name
        return super().forward(input), input


class Grouped(torch.nn.Linear):
    """As DeepSeek 4's output projection: it takes rows in groups."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 torch's name
        return super().forward(input.transpose(1, 2))


@pytest.mark.parametrize(("kind", "is_adapted"), [(Pair, False), (Grouped, False), (Transposing, True)])
def test_by_default_what_computes_no_linear_map_gets_no_adapter(kind: type[torch.nn.Linear], is_adapted: bool) -> None:
    base = tiny_llama()
    base.model.layers[0].mlp.up_proj.__class__ = kind
    names = {name for name, _ in add_adapter(base, LoraSpec(rank=4)).named_modules()}
    assert ("base_model.model.model.layers.0.mlp.up_proj.lora_A" in names) == is_adapted
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_A" in names


def test_lora_dropout_is_refused() -> None:
    with pytest.raises(SpecError, match=r"LoRA dropout on model\.layers\.0\.self_attn\.q_proj does not fit"):
        prepare(peft_model(lora_dropout=0.1), quantization())


def test_dora_is_refused() -> None:
    with pytest.raises(SpecError, match=r"DoRA or another LoRA variant on model\.layers\.0\.self_attn\.q_proj does not fit"):
        prepare(peft_model(use_dora=True), quantization())


@pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning"
)  # peft, which then sets it
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_of_other_layers_than_linear_ones_is_refused_by_their_class(scheme: Scheme) -> None:
    """GPT-2 computes with transformers' Conv1D, which stores its weight [in, out]."""
    sizes = {"vocab_size": 260, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    model = add_adapter(GPT2LMHeadModel(GPT2Config(**sizes)), LoraSpec(rank=4))
    with pytest.raises(SpecError, match=r"needs nn\.Linear layers, but found Conv1D; choose scheme none\."):
        prepare(model, quantization(scheme))


def test_a_weight_that_is_stored_transposed_is_refused_by_name() -> None:
    """As peft has a linear layer of somebody else's making."""
    model = peft_model()
    model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj").fan_in_fan_out = True
    with pytest.raises(SpecError, match=r"model\.layers\.1\.self_attn\.q_proj stores its weight transposed.*; choose scheme none\."):
        prepare(model, quantization())


def test_preparing_changes_no_name_and_no_value_of_the_state_dict() -> None:
    model = lora_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model, quantization())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_prepared_but_switched_off_computes_what_it_did() -> None:
    model = lora_model()
    before = logits_of(model, token_ids())
    prepare(model, quantization(), enabled=False)
    assert torch.equal(logits_of(model, token_ids()), before)


def test_the_switch_changes_the_output_and_back() -> None:
    model = exact_model()
    quantized = logits_of(model, token_ids())
    set_fake_quantization(model, enabled=False)
    assert not torch.equal(logits_of(model, token_ids()), quantized)
    set_fake_quantization(model, enabled=True)
    assert torch.equal(logits_of(model, token_ids()), quantized)


def test_training_and_evaluation_mode_compute_the_same() -> None:
    model = exact_model()
    assert torch.equal(logits_of(model.train(), token_ids()), logits_of(model.eval(), token_ids()))


def test_dropout_of_the_base_model_is_switched_off() -> None:
    model = lora_model(attention_dropout=0.5)
    base = model.get_base_model()
    base.model.embed_dropout = torch.nn.Dropout(0.5)
    prepare(model, quantization())
    model.train()
    assert torch.equal(logits_of(model, token_ids()), logits_of(model, token_ids()))
    assert (base.config.attention_dropout, base.model.layers[0].self_attn.attention_dropout, base.model.embed_dropout.p) == (0, 0, 0)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "layerdrop"])
def test_dropout_that_a_model_keeps_as_a_number_is_switched_off(name: str) -> None:
    model = lora_opt(**{name: 0.5})
    prepare(model, quantization())
    model.train()
    calls = [logits_of(model, token_ids()) for _ in range(5)]
    assert all(torch.equal(call, calls[0]) for call in calls)


def test_switches_of_a_model_that_was_not_prepared_do_nothing() -> None:
    model = lora_model()
    before = logits_of(model, token_ids())
    set_fake_quantization(model, enabled=True)
    with fake_quantization(model, enabled=True):
        assert torch.equal(logits_of(model, token_ids()), before)
    assert mode_of(model) is None


def test_a_preparation_with_an_effect_passes_and_leaves_the_switch_alone() -> None:
    model = exact_model()
    set_fake_quantization(model, enabled=False)
    require_effect(model, token_ids(rows=1))
    mode = mode_of(model)
    assert mode is not None
    assert not mode.enabled


def test_a_model_that_draws_random_numbers_in_training_is_refused_before_the_first_step() -> None:
    model = exact_model()
    layer = model.get_base_model().model.layers[0]
    layer.register_forward_hook(lambda module, _, output: output + torch.randn_like(output) if module.training else output)
    for mode in (model.train, model.eval):
        mode()
        with pytest.raises(SpecError, match=r"spec\.model\.source.*training mode.*scheme none"):
            require_effect(model, token_ids(rows=1))
        assert model.training == (mode == model.train)


def test_a_model_that_computes_another_function_in_training_is_refused_before_the_first_step() -> None:
    model = exact_model()
    require_served_function(model, token_ids(rows=1))
    model.get_base_model().model.layers[0].register_forward_hook(lambda module, _, output: output * 1.01 if module.training else output)
    with pytest.raises(SpecError, match=r"spec\.model\.source.*other logits in training mode than where it serves.*acceptInexact"):
        require_served_function(model, token_ids(rows=1))


def test_a_preparation_without_an_effect_is_refused() -> None:
    model = lora_model()
    with pytest.raises(ProofError, match="Fake quantization changes nothing"):
        require_effect(model, token_ids(rows=1))


def test_a_dtype_that_the_schemes_kernels_do_not_take_is_said() -> None:
    assert "kernels that serve int4 compute in bfloat16, but this model is float32" in serving_note(lora_model(), Scheme.INT4)
    assert not serving_note(lora_model(dtype=torch.bfloat16), Scheme.INT4)
    assert not serving_note(lora_model(), Scheme.INT8_INT4)

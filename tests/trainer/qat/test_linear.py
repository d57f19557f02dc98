"""The exact linear layer: its low-rank backward pass against plain autograd, and what it keeps and shares on the way."""

from typing import Any

import pytest
import torch
from finetune_api.spec import Scheme
from finetune_trainer.qat.linear import ExactFrozenLinear, ExactLinear, ExactLoraLinear, adapter_factors, base_linear, merged_weight
from finetune_trainer.qat.prepare import mode_of
from finetune_trainer.qat.quantizers import ActivationCodes
from finetune_trainer.qat.quantizers.activations import Int8Activations
from peft import PeftModel
from support.exact_models import SCHEMES, exact_layer, exact_model, logits_of, token_ids
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

FLOAT64: dict[str, Any] = {"dtype": torch.float64, "attention_bias": True}


def straight_through(value: Tensor, quantized: Tensor) -> Tensor:
    """The quantized value with the gradient of the value."""
    return value + (quantized - value).detach()


def naive(layer: ExactLinear, x: Tensor, merged: Tensor) -> Tensor:
    """The layer's formula as autograd would have it, from a merged weight that autograd follows."""
    quantizer = layer.exact.quantizer
    weight = straight_through(merged, quantizer.dequantize(quantizer.quantize(merged.detach())))
    if activations := layer.exact.activations:
        x = straight_through(x, activations.dequantize(activations.quantize(x.detach()), x.dtype))
    return F.linear(x, weight, base_linear(layer).bias)


def factors_of(layer: ExactLinear) -> tuple[Tensor, Tensor, float]:
    factors = adapter_factors(layer)
    assert factors is not None
    return factors


def random_input(layer: ExactLinear, seed: int = 0) -> Tensor:
    """float64 [3, 5, in]; one token is all zeros."""
    values = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    values[1, 2] = 0.0
    return values.requires_grad_()


def adapter_gradients(model: PeftModel, *, keep_codes: bool, checkpointing: bool) -> dict[str, Tensor]:
    """Gradients of all adapter weights over two micro-batches, as one optimizer step sees them."""
    mode = mode_of(model)
    assert mode is not None
    mode.keep_codes = keep_codes
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for seed in range(2):
        ids = token_ids(seed=seed)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_both_factors_and_of_the_input_are_those_of_autograd(scheme: Scheme) -> None:
    layer = exact_layer(exact_model(scheme, **FLOAT64), "q_proj")
    a, b, scaling = factors_of(layer)
    x = random_input(layer)
    grad = torch.randn(3, 5, layer.out_features, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad(naive(layer, x, base_linear(layer).weight + scaling * (b @ a)), (a, b, x), grad)
    found = torch.autograd.grad(layer(x), (a, b, x), grad)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_output_is_the_formula_bias_included(scheme: Scheme) -> None:
    layer = exact_layer(exact_model(scheme, **FLOAT64), "q_proj")
    torch.nn.init.normal_(base_linear(layer).bias)
    x = random_input(layer)
    torch.testing.assert_close(layer(x), naive(layer, x, merged_weight(layer)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_frozen_layer_passes_the_gradient_of_its_quantized_weight_on(scheme: Scheme) -> None:
    layer = exact_layer(exact_model(scheme, targets="q_proj", **FLOAT64), "k_proj")
    assert isinstance(layer, ExactFrozenLinear)
    x = random_input(layer)
    expected = torch.autograd.grad(naive(layer, x, layer.weight).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x), expected, rtol=1e-10, atol=1e-12)


def test_the_frozen_weight_and_its_bias_get_no_gradient() -> None:
    layer = exact_layer(exact_model(**FLOAT64), "q_proj")
    layer(random_input(layer)).sum().backward()
    assert base_linear(layer).weight.grad is None
    assert base_linear(layer).bias.grad is None


def test_factors_get_their_gradient_when_the_input_wants_none() -> None:
    layer = exact_layer(exact_model(**FLOAT64), "q_proj")
    a, b, _ = factors_of(layer)
    x = random_input(layer)
    wanted = torch.autograd.grad(layer(x).sum(), (a, b))
    found = torch.autograd.grad(layer(x.detach()).sum(), (a, b))
    assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_a_factor_that_is_frozen_gets_no_gradient() -> None:
    layer = exact_layer(exact_model(**FLOAT64), "q_proj")
    a, b, _ = factors_of(layer)
    a.requires_grad_(False)
    layer(random_input(layer)).sum().backward()
    assert a.grad is None
    assert b.grad is not None


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("keep_codes", "checkpointing"), [(True, False), (False, True), (True, True)])
def test_keeping_codes_and_checkpointing_change_no_gradient(scheme: Scheme, keep_codes: bool, checkpointing: bool) -> None:
    plain = adapter_gradients(exact_model(scheme), keep_codes=False, checkpointing=False)
    changed = adapter_gradients(exact_model(scheme), keep_codes=keep_codes, checkpointing=checkpointing)
    assert len(plain) == 28
    assert plain.keys() == changed.keys()
    assert all(torch.equal(plain[name], changed[name]) for name in plain)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpointed_layer_has_the_gradients_of_a_plain_one(scheme: Scheme) -> None:
    layer = exact_layer(exact_model(scheme, **FLOAT64), "q_proj")
    layer.exact.mode.keep_codes = True
    a, b, _ = factors_of(layer)
    x = random_input(layer)
    plain = torch.autograd.grad(layer(x).sum(), (a, b, x))
    layer.exact.mode.drop_caches()
    again = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).sum(), (a, b, x))
    assert all(torch.equal(one, two) for one, two in zip(plain, again, strict=True))


def test_gradients_of_a_bfloat16_model_come_in_the_adapters_own_dtype() -> None:
    layer = exact_layer(exact_model(dtype=torch.bfloat16), "q_proj")
    a, b, _ = factors_of(layer)
    x = random_input(layer).to(torch.bfloat16).detach().requires_grad_()
    layer(x).sum().backward()
    assert (a.grad.dtype, b.grad.dtype, x.grad.dtype) == (a.dtype, b.dtype, torch.bfloat16)


@pytest.fixture
def quantized_activations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every activation that the exact layers quantize to int8 from now on."""
    seen: list[Tensor] = []
    quantize = Int8Activations.quantize

    def counted(quantizer: Int8Activations, activation: Tensor) -> ActivationCodes:
        seen.append(activation)
        return quantize(quantizer, activation)

    monkeypatch.setattr(Int8Activations, "quantize", counted)
    return seen


def test_layers_that_read_the_same_input_quantize_it_once(quantized_activations: list[Tensor]) -> None:
    logits_of(exact_model(), token_ids())
    assert len(quantized_activations) == 2 * 4  # in each layer: q, k and v; o; gate and up; down


def test_layers_that_read_the_same_input_save_one_copy_of_its_codes() -> None:
    model = exact_model()
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    saved: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int8 and tensor.shape == x.shape:
            saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = [exact_layer(model, name)(x) for name in ("q_proj", "k_proj", "v_proj")]
    assert len(outputs) == 3
    assert len(saved) == 1


def test_nothing_as_large_as_the_input_is_saved_but_its_int8_codes() -> None:
    layer = exact_layer(exact_model(), "q_proj")
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    assert [item.dtype for item in saved if item.numel() >= x.numel()] == [torch.int8]


def test_an_input_that_was_changed_in_place_is_quantized_anew() -> None:
    layer = exact_layer(exact_model(), "q_proj")
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    layer(x)
    x.mul_(2)
    assert torch.equal(layer(x), layer(x.clone()))


def test_inference_mode_computes_the_same() -> None:
    model = exact_model()
    expected = logits_of(model, token_ids())
    with torch.inference_mode():
        found = model(input_ids=token_ids(), use_cache=False).logits
    assert torch.equal(found, expected)


def test_a_weight_only_scheme_leaves_activations_alone(quantized_activations: list[Tensor]) -> None:
    logits_of(exact_model(Scheme.INT8), token_ids())
    assert not quantized_activations


def test_a_layer_that_is_switched_off_computes_what_peft_does() -> None:
    layer = exact_layer(exact_model(), "q_proj")
    assert isinstance(layer, ExactLoraLinear)
    a, b, scaling = factors_of(layer)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    layer.exact.mode.enabled = False
    assert torch.equal(layer(x), base_linear(layer)(x) + (x @ a.T @ b.T) * scaling)


def test_the_merged_weight_is_made_in_float32_and_cast_once() -> None:
    layer = exact_layer(exact_model(dtype=torch.bfloat16), "q_proj")
    a, b, scaling = factors_of(layer)
    wide = base_linear(layer).weight.double() + scaling * (b.double() @ a.double())
    merged = merged_weight(layer)
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), wide, rtol=2**-8, atol=1e-6)  # half a unit in the last place


def test_disabling_adapters_between_forward_and_backward_is_an_error() -> None:
    model = exact_model()
    output = exact_layer(model, "q_proj")(torch.randn(2, 64))
    with model.disable_adapter(), pytest.raises(RuntimeError, match="adapters were disabled"):
        output.sum().backward()

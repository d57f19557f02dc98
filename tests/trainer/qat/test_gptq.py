"""Rounding by what a layer computes: against the update of GPTQ's paper, and as training, export and proof see it."""

import pytest
import torch
from finetune_api.spec import Scheme
from finetune_trainer.example import Example
from finetune_trainer.qat import gptq
from finetune_trainer.qat.export import plain_model, trained_digests, weight_digests
from finetune_trainer.qat.gptq import calibration_rows, choose_rounding, compensated
from finetune_trainer.qat.linear import adapted_weight, base_linear, fake_quantized_weight, merged_weight, weight_codes
from finetune_trainer.qat.prepare import exact_layers, set_fake_quantization
from finetune_trainer.qat.scales import fit_scales
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.exact_models import DTYPES, SCHEMES, exact_layer, exact_model, logits_of, token_ids
from torch import Tensor

COARSE = (Scheme.INT4, Scheme.INT8_INT4, Scheme.FP8_INT4)
BOUNDS = (-8, 7)


def examples(count: int = 24, longest: int = 40) -> list[Example]:
    """Rows of different lengths."""
    rows = [tuple(token_ids(1, longest - index % 10, seed=index)[0].tolist()) for index in range(count)]
    return [Example(row, row) for row in rows]


def ready(scheme: Scheme = Scheme.INT8_INT4, **changes: object) -> PeftModel:
    """Prepared, with the scales of its weights alone."""
    model = exact_model(scheme, **changes)
    fit_scales(model)
    return model


def nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((values - zero) / scale).round().clamp(*BOUNDS) * scale + zero


def by_the_paper(weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, block: int) -> Tensor:
    """GPTQ's equation 2, column by column, each time with the inverse of what is left; what each weight had become at its turn, in float64."""
    left = weight.clone()
    for column in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[column:, column:])
        rounded = nearest(left[:, column], scale[:, column // block], zero[:, column // block])
        error = (left[:, column] - rounded) / inverse[0, 0]
        left[:, column + 1 :] -= error[:, None] * inverse[0, 1:]
    return left


@settings(max_examples=25)
@given(seed=st.integers(0, 2**20), groups=st.integers(1, 6), block=st.sampled_from([16, 32]), outputs=st.integers(1, 9))
def test_each_weight_takes_the_share_of_the_errors_that_the_paper_says(seed: int, groups: int, block: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = groups * block
    read = torch.randn(3 * inputs, inputs, generator=generator, dtype=torch.float64)
    read[:, 1:] += read[:, :-1]  # neighbours say the same in part
    hessian = read.T @ read
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    scale = torch.rand(outputs, groups, generator=generator, dtype=torch.float64) + 0.2
    zero = torch.randn(outputs, groups, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    found = compensated(weight, factor, scale, zero, [column // block for column in range(inputs)], BOUNDS)
    torch.testing.assert_close(found, by_the_paper(weight, hessian, scale, zero, block), rtol=1e-6, atol=1e-6)


def test_inputs_that_share_nothing_leave_each_weight_to_itself() -> None:
    weight, scale = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), torch.full((4, 2), 0.3)
    assert torch.equal(compensated(weight, torch.eye(64), scale, None, [0] * 32 + [1] * 32, BOUNDS), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", COARSE)
def test_the_quantized_model_comes_closer_to_the_unquantized_one(scheme: Scheme, dtype: torch.dtype) -> None:
    model, others = ready(scheme, dtype=dtype), [token_ids(4, 32, seed=1000 + seed) for seed in range(8)]
    set_fake_quantization(model, enabled=False)
    plain = [logits_of(model, ids).float() for ids in others]
    set_fake_quantization(model, enabled=True)

    def error() -> float:
        return sum(float((logits_of(model, ids).float() - wanted).square().mean()) for ids, wanted in zip(others, plain, strict=True))

    before = error()
    choose_rounding(model, examples(200))
    assert error() < 0.75 * before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", COARSE)
def test_a_shift_leaves_the_scales_alone_and_moves_weights_by_less_than_five_steps(scheme: Scheme, dtype: torch.dtype) -> None:
    model = ready(scheme, dtype=dtype)
    choose_rounding(model, examples())
    shifted = {name: weight_codes(layer) for name, layer in exact_layers(model)}
    for name, layer in exact_layers(model):
        layer.exact.rounding_offset, layer.exact.cached = None, None
        codes = weight_codes(layer)
        assert torch.equal(codes.scale, shifted[name].scale), name
        assert torch.equal(codes.zero, shifted[name].zero) if codes.zero is not None else shifted[name].zero is None
        assert not torch.equal(codes.codes, shifted[name].codes), name
        assert int((codes.codes.int() - shifted[name].codes.int()).abs().max()) <= 5


def test_scales_are_fitted_to_what_counts_in_the_inputs() -> None:
    model = ready()
    before = {name: layer.exact.clip_ratio for name, layer in exact_layers(model)}
    choose_rounding(model, examples())
    assert all(not torch.equal(layer.exact.clip_ratio, before[name]) for name, layer in exact_layers(model))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_exported_is_what_training_uses(scheme: Scheme) -> None:
    model = ready(scheme)
    choose_rounding(model, examples())
    exported = plain_model(model, scheme, {"lm_head": "output head"}, trust_remote_code=False)
    assert weight_digests(exported) == trained_digests(model)


@pytest.mark.parametrize("scheme", [Scheme.INT8, Scheme.FP8_FP8])
def test_a_fine_grid_is_left_alone(scheme: Scheme) -> None:
    model = ready(scheme)
    before = trained_digests(model)
    choose_rounding(model, examples())
    assert trained_digests(model) == before
    assert all(layer.exact.rounding_offset is None for _, layer in exact_layers(model))


def test_frozen_layers_that_are_quantized_get_theirs_too_and_other_linears_none() -> None:
    model = exact_model(targets="q_proj")
    choose_rounding(model, examples())
    layers = dict(exact_layers(model))
    assert len(layers) == 14
    assert all(layer.exact.rounding_offset is not None for layer in layers.values())
    assert not any(torch.equal(merged_weight(layer), adapted_weight(layer)) for layer in layers.values())


def test_the_weights_that_training_shares_with_the_file_are_not_touched() -> None:
    model = ready()
    before = {name: base_linear(layer).weight.clone() for name, layer in exact_layers(model)}
    choose_rounding(model, examples())
    assert all(torch.equal(base_linear(layer).weight, before[name]) for name, layer in exact_layers(model))


def test_the_same_rows_make_the_same_choice_whatever_was_chosen_before() -> None:
    model = ready()
    choose_rounding(model, examples())
    first = trained_digests(model)
    choose_rounding(model, examples(3))
    other = trained_digests(model)
    choose_rounding(model, examples())
    assert trained_digests(model) == first != other
    fit_scales(model)
    assert all(layer.exact.rounding_offset is None for _, layer in exact_layers(model))


def test_padding_has_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pad = ready(), gptq.pad
    choose_rounding(model, examples())
    expected = trained_digests(model)
    monkeypatch.setattr(gptq, "pad", lambda rows, _, device: pad(rows, 7, device))
    choose_rounding(model, examples())
    assert trained_digests(model) == expected


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_inputs_that_say_nothing_leave_a_layer_to_the_nearest_values(value: float) -> None:
    model = ready()
    layer = exact_layer(model, "down_proj")
    expected = fake_quantized_weight(layer)
    with torch.no_grad():
        layer.register_forward_pre_hook(lambda _, inputs: torch.full_like(inputs[0], value))
    layer.exact.clip_ratio = None
    choose_rounding(model, examples())
    assert layer.exact.rounding_offset is None
    assert torch.equal(fake_quantized_weight(layer), expected)


def test_a_layer_that_no_input_reaches_has_the_scales_of_its_weights() -> None:
    model = ready()
    layer = exact_layer(model, "down_proj")
    expected = fake_quantized_weight(layer)
    layer.exact.clip_ratio = None
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    mlp.forward = lambda hidden: hidden
    choose_rounding(model, examples())
    assert layer.exact.rounding_offset is None
    assert torch.equal(fake_quantized_weight(layer), expected)
    assert exact_layer(model, "q_proj").exact.rounding_offset is not None


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60))
def test_rows_are_the_first_that_fit_padded_and_at_least_one(lengths: list[int]) -> None:
    rows = [Example((5,) * length, (5,) * length) for length in lengths]
    found = calibration_rows(rows)
    assert list(found) == rows[: len(found)]
    assert len(found) == 1 or len(found) * max(lengths[: len(found)]) <= gptq.TOKENS
    if len(found) < len(rows):
        assert (len(found) + 1) * max(lengths[: len(found) + 1]) > gptq.TOKENS

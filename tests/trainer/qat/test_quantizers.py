"""The quantizers give torchao 0.18's own numbers, bit for bit: weights and activations, float32 and bfloat16, any scale."""

import pytest
import torch
from finetune_api.spec import Scheme
from finetune_trainer.qat.quantizers import ActivationCodes, WeightCodes, dequantize_activation, quantize_activation
from finetune_trainer.qat.schemes import torchao_config, weight_quantizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.exact_models import DTYPES, SCHEMES, quantization
from torch import Tensor, nn
from torchao.quantization import quantize_
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

GROUP = 32
SCALES = (0.0, 1e-44, 1e-40, 1.2e-38, 1e-30, 1e-3, 1.0, 300.0, 1e30)


def torchao_weight(weight: Tensor, scheme: Scheme) -> IntxUnpackedToInt8Tensor:
    """What torchao's own `quantize_` makes of a linear layer's weight."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, torchao_config(quantization(scheme)))
    assert isinstance(layer.weight, IntxUnpackedToInt8Tensor)
    return layer.weight


def torchao_activation(activation: Tensor) -> Tensor:
    """The activation as torchao's linear layer reads it: the output of a layer whose weight is the identity, exactly."""
    features = activation.shape[-1]
    identity = torchao_weight(torch.eye(features, dtype=activation.dtype), Scheme.INT8_INT4)
    exact = IntxUnpackedToInt8Tensor(
        qdata=torch.eye(features, dtype=torch.int8),
        scale=torch.ones_like(identity.scale),
        zero_point=torch.zeros_like(identity.zero_point),
        target_dtype=identity.target_dtype,
        block_size=identity.block_size,
        dtype=identity.dtype,
        activation_quantization=identity.activation_quantization,
    )
    return nn.functional.linear(activation, exact)


def random_rows(rows: int, columns: int, scale: float, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal values times the scale [rows, columns]: the first row is zero, the last has an outlier."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    values[0] = 0.0
    values[-1, 0] *= 1000
    return values.to(dtype)


def assert_bit_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 9), groups=st.integers(1, 4), scale=st.sampled_from(SCALES) | st.floats(1e-6, 1e3), seed=st.integers(0, 2**32 - 1)
)
@example(rows=4, groups=2, scale=1e-44, seed=0)
@example(rows=4, groups=2, scale=1e30, seed=0)
def test_weight_codes_and_scales_are_those_of_torchao(
    dtype: torch.dtype, scheme: Scheme, rows: int, groups: int, scale: float, seed: int
) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, dtype)
    ours, theirs = weight_quantizer(quantization(scheme)).quantize(weight), torchao_weight(weight, scheme)
    assert_bit_equal(ours.codes, theirs.qdata)
    assert_bit_equal(ours.scale, theirs.scale)
    assert not theirs.zero_point.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(2, 9), groups=st.integers(1, 4), scale=st.sampled_from(SCALES) | st.floats(1e-6, 1e3), seed=st.integers(0, 2**32 - 1)
)
def test_a_dequantized_weight_is_that_of_torchao(
    dtype: torch.dtype, scheme: Scheme, rows: int, groups: int, scale: float, seed: int
) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, dtype)
    quantizer = weight_quantizer(quantization(scheme))
    assert_bit_equal(quantizer.dequantize(quantizer.quantize(weight)), torchao_weight(weight, scheme).dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 9), groups=st.integers(1, 4), scale=st.sampled_from(SCALES) | st.floats(1e-6, 1e3), seed=st.integers(0, 2**32 - 1)
)
@example(rows=2, groups=1, scale=1e-44, seed=0)
@example(rows=2, groups=1, scale=1.2e-38, seed=0)
def test_a_fake_quantized_activation_is_that_of_torchao(dtype: torch.dtype, rows: int, groups: int, scale: float, seed: int) -> None:
    activation = random_rows(rows, groups * GROUP, scale, seed, dtype)
    assert_bit_equal(dequantize_activation(quantize_activation(activation)), torchao_activation(activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_activations_of_one_sign_are_quantized_as_torchao_does(dtype: torch.dtype, sign: int) -> None:
    activation = (random_rows(5, 64, 1.0, 0, dtype).abs() + 3) * sign
    assert_bit_equal(dequantize_activation(quantize_activation(activation)), torchao_activation(activation))


def test_each_token_of_a_batch_is_quantized_by_itself() -> None:
    batch = random_rows(6, 64, 1.0, 0, torch.float32).view(2, 3, 64)
    alone = torch.stack([torch.stack([dequantize_activation(quantize_activation(token)) for token in row]) for row in batch])
    assert_bit_equal(dequantize_activation(quantize_activation(batch)), alone)


def test_an_activation_of_zeros_stays_zero() -> None:
    assert not dequantize_activation(quantize_activation(torch.zeros(2, 64))).any()


def test_a_weight_of_zeros_stays_zero() -> None:
    quantizer = weight_quantizer(quantization())
    assert not quantizer.dequantize(quantizer.quantize(torch.zeros(2, 64))).any()


@pytest.mark.parametrize(("scheme", "low", "high"), [(Scheme.INT8, -128, 127), (Scheme.INT8_INT4, -8, 7)])
def test_weight_codes_use_their_grid_and_never_leave_it(scheme: Scheme, low: int, high: int) -> None:
    codes = weight_quantizer(quantization(scheme)).quantize(torch.linspace(-1, 1, 4096).view(2, 2048)).codes
    assert low <= int(codes.min()) <= low + 1
    assert int(codes.max()) == high


def test_quantizing_leaves_its_input_alone() -> None:
    weight, activation = random_rows(4, 64, 1.0, 0, torch.float32), random_rows(4, 64, 1.0, 1, torch.float32)
    before = weight.clone(), activation.clone()
    weight_quantizer(quantization()).quantize(weight)
    quantize_activation(activation)
    assert_bit_equal(weight, before[0])
    assert_bit_equal(activation, before[1])


def test_dequantizing_leaves_its_codes_alone() -> None:
    quantizer = weight_quantizer(quantization())
    weight: WeightCodes = quantizer.quantize(random_rows(4, 64, 1.0, 0, torch.float32))
    activation: ActivationCodes = quantize_activation(random_rows(4, 64, 1.0, 1, torch.float32))
    before = [item.clone() for item in (*weight, *activation)]
    quantizer.dequantize(weight)
    dequantize_activation(activation)
    assert all(torch.equal(item, copy) for item, copy in zip((*weight, *activation), before, strict=True))


def squared_error(weight: Tensor, scheme: Scheme, shrink: Tensor | None) -> Tensor:
    """For each group, [out, groups]."""
    quantizer = weight_quantizer(quantization(scheme))
    found = quantizer.dequantize(quantizer.quantize(weight, shrink))
    return (found.double() - weight.double()).square().view(weight.shape[0], -1, quantizer.block(weight.shape[1])).sum(dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_shrink_of_one_changes_nothing(scheme: Scheme, dtype: torch.dtype) -> None:
    quantizer, weight = weight_quantizer(quantization(scheme)), random_rows(6, 64, 1.0, 0, dtype)
    plain = quantizer.quantize(weight)
    ones = torch.ones(plain.scale.shape)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(quantizer.quantize(weight, ones), plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=20, deadline=None)
@given(rows=st.integers(2, 9), groups=st.integers(1, 4), scale=st.sampled_from(SCALES), seed=st.integers(0, 2**32 - 1))
def test_the_least_squares_shrink_is_never_worse_than_none_in_any_group(
    dtype: torch.dtype, scheme: Scheme, rows: int, groups: int, scale: float, seed: int
) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, dtype)
    shrink = weight_quantizer(quantization(scheme)).least_squares_shrink(weight)
    assert ((shrink > 0) & (shrink <= 1)).all()
    with_shrink, without = squared_error(weight, scheme, shrink), squared_error(weight, scheme, None)
    assert (with_shrink <= without * (1 + 1e-5)).all()


def test_the_least_squares_shrink_lowers_the_error_of_four_bits() -> None:
    weight = random_rows(64, 256, 1.0, 0, torch.float32)[1:-1]  # the outlier's error is no rounding
    shrink = weight_quantizer(quantization()).least_squares_shrink(weight)
    assert squared_error(weight, Scheme.INT8_INT4, shrink).sum() < 0.95 * squared_error(weight, Scheme.INT8_INT4, None).sum()


def test_the_least_squares_shrink_does_not_depend_on_how_many_rows_are_searched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, weight = weight_quantizer(quantization()), random_rows(9, 64, 1.0, 0, torch.float32)
    whole = quantizer.least_squares_shrink(weight)
    monkeypatch.setattr("finetune_trainer.qat.quantizers._WEIGHTS_AT_ONCE", 2 * 64)
    assert torch.equal(quantizer.least_squares_shrink(weight), whole)


def test_fake_quantization_is_not_idempotent() -> None:
    quantizer = weight_quantizer(quantization())
    weight = random_rows(64, 64, 1.0, 0, torch.float32)
    once = quantizer.dequantize(quantizer.quantize(weight))
    assert not torch.equal(quantizer.dequantize(quantizer.quantize(once)), once)

"""The quantizers give torchao 0.18's own numbers, bit for bit: weights and activations, float32 and bfloat16, any scale; and what all of them keep."""

import pytest
import torch
from finetune_api.spec import Scheme
from finetune_trainer.qat.quantizers import ActivationQuantizer, WeightQuantizer
from finetune_trainer.qat.quantizers.activations import Int8Activations
from finetune_trainer.qat.quantizers.float8 import LEAST_LARGEST, Float8Activations, MslkFloat8Activations
from finetune_trainer.qat.quantizers.int4 import pack, unpack
from finetune_trainer.qat.schemes import SCHEMES as TABLE
from finetune_trainer.qat.tensors import dequantized
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.exact_models import DTYPES, KERNELS, SCHEMES
from torch import Tensor, nn
from torchao.quantization import Float8Tensor, PerRow, quantize_
from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import Int4WeightFakeQuantizer
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

GROUP = 32
SCALES = (0.0, 1e-44, 1e-40, 1.2e-38, 1e-30, 1e-3, 1.0, 300.0, 1e30)
ACTIVATIONS = (Int8Activations(), Float8Activations(), MslkFloat8Activations())
WEIGHTS = {
    "rows": st.integers(2, 9),
    "groups": st.integers(1, 4),
    "scale": st.sampled_from(SCALES) | st.floats(1e-6, 1e3),
    "seed": st.integers(0, 2**32 - 1),
}


def quantizer_of(scheme: Scheme) -> WeightQuantizer:
    """The scheme's quantizer, in small groups where it has groups: what a grid does, it does in groups of any size."""
    return TABLE[scheme].quantizer(GROUP if TABLE[scheme].group_sizes else None)


def fake_quantized(weight: Tensor, scheme: Scheme, clip_ratio: Tensor | None = None) -> Tensor:
    quantizer = quantizer_of(scheme)
    return quantizer.dequantize(quantizer.quantize(weight, clip_ratio))


def fake_quantized_activation(quantizer: ActivationQuantizer, activation: Tensor) -> Tensor:
    return quantizer.dequantize(quantizer.quantize(activation), activation.dtype)


def torchao_weight(weight: Tensor, scheme: Scheme) -> IntxUnpackedToInt8Tensor:
    """What torchao's own `quantize_` makes of a linear layer's weight."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(layer, TABLE[scheme].config(GROUP))
    assert isinstance(layer.weight, IntxUnpackedToInt8Tensor)
    return layer.weight


def torchao_int8_activation(activation: Tensor) -> Tensor:
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


def torchao_float8(values: Tensor, least: float = LEAST_LARGEST) -> Float8Tensor:
    """Rows in float8 by torchao's own conversion."""
    return Float8Tensor.from_hp(values, granularity=PerRow(), hp_value_lb=least)


def torchao_int4_fake_quantized(weight: Tensor, activations: torch.dtype) -> Tensor:
    """By torchao's own fake quantizer, which has float32 scales."""
    return Int4WeightFakeQuantizer(Int4WeightFakeQuantizeConfig(group_size=GROUP, activation_dtype=activations))(weight)


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
@pytest.mark.parametrize("scheme", KERNELS)
@settings(max_examples=30)
@given(**WEIGHTS)
@example(rows=4, groups=2, scale=1e-44, seed=0)
@example(rows=4, groups=2, scale=1e30, seed=0)
def test_integer_weights_are_those_of_torchao(dtype: torch.dtype, scheme: Scheme, rows: int, groups: int, scale: float, seed: int) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, dtype)
    ours, theirs = quantizer_of(scheme).quantize(weight), torchao_weight(weight, scheme)
    assert_bit_equal(ours.codes, theirs.qdata)
    assert_bit_equal(ours.scale, theirs.scale)
    assert not theirs.zero_point.any()
    assert_bit_equal(quantizer_of(scheme).dequantize(ours), theirs.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(**WEIGHTS)
def test_float8_weights_are_those_of_torchao(dtype: torch.dtype, rows: int, groups: int, scale: float, seed: int) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, dtype)
    ours, theirs = quantizer_of(Scheme.FP8_FP8).quantize(weight), torchao_float8(weight)
    assert_bit_equal(ours.codes.view(torch.uint8), theirs.qdata.view(torch.uint8))
    assert_bit_equal(ours.scale, theirs.scale)
    assert_bit_equal(quantizer_of(Scheme.FP8_FP8).dequantize(ours), theirs.dequantize())


@settings(max_examples=30)
@given(**WEIGHTS)
def test_int4_weights_in_float32_are_those_of_torchaos_fake_quantizer(rows: int, groups: int, scale: float, seed: int) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, torch.float32)
    assert_bit_equal(fake_quantized(weight, Scheme.INT4), torchao_int4_fake_quantized(weight, torch.bfloat16))


@settings(max_examples=30)
@given(rows=st.integers(1, 9), groups=st.integers(1, 4), power=st.integers(-12, 3), seed=st.integers(0, 2**32 - 1))
def test_fp8_int4_weights_that_float8_holds_are_those_of_torchaos_fake_quantizer_as_float8(
    rows: int, groups: int, power: int, seed: int
) -> None:
    drawn = torch.randn(rows, groups * GROUP, generator=torch.Generator().manual_seed(seed)) * 100
    drawn[:, 0] = 448.0  # the largest of float8, so that its scale is a power of two
    weight = drawn.clamp(-448, 448).to(torch.float8_e4m3fn).float() * 2.0**power
    theirs = torchao_int4_fake_quantized(weight, torch.float8_e4m3fn)  # `code * scale`, which the kernel rounds to float8
    assert_bit_equal(fake_quantized(weight, Scheme.FP8_INT4), theirs.to(torch.float8_e4m3fn).float())


def test_small_fp8_int4_weights_get_the_steps_of_float8() -> None:
    weight = random_rows(4, GROUP, 0.004, 0, torch.bfloat16)
    assert torch.equal(fake_quantized(weight, Scheme.FP8_INT4) * 2**9 % 1, torch.zeros(4, GROUP))


@pytest.mark.parametrize("scheme", [Scheme.INT4, Scheme.FP8_INT4])
@settings(max_examples=30)
@given(**WEIGHTS)
def test_four_bit_codes_of_bfloat16_are_those_of_float32_and_only_scales_are_cast(
    scheme: Scheme, rows: int, groups: int, scale: float, seed: int
) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, torch.bfloat16)
    narrow, wide = quantizer_of(scheme).quantize(weight), quantizer_of(scheme).quantize(weight.float())
    assert narrow.zero is not None
    assert wide.zero is not None
    assert_bit_equal(narrow.codes, wide.codes)
    assert_bit_equal(narrow.scale, wide.scale.to(torch.bfloat16))
    assert_bit_equal(narrow.zero, wide.zero.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=20)
@given(**WEIGHTS)
def test_torchaos_tensor_stands_for_what_its_codes_do(
    dtype: torch.dtype, scheme: Scheme, rows: int, groups: int, scale: float, seed: int
) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, dtype)
    codes = quantizer_of(scheme).quantize(weight)
    exported = TABLE[scheme].tensor(codes, quantizer_of(scheme).block(weight.shape[1]))
    assert exported.shape == weight.shape
    assert exported.dtype == dtype
    assert_bit_equal(dequantized(exported), quantizer_of(scheme).dequantize(codes))
    assert dequantized(exported).isfinite().all()


@given(rows=st.integers(1, 5), pairs=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_packed_codes_come_back_and_take_half_the_bytes(rows: int, pairs: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, 2 * pairs), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes)
    assert packed.shape == (rows, pairs)
    assert_bit_equal(unpack(packed), codes)


def test_the_even_code_lies_in_the_low_half_of_its_byte() -> None:
    assert pack(torch.tensor([[1, -8]], dtype=torch.int8)).view(torch.uint8).item() == 0x81


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=50)
@given(**WEIGHTS)
@example(rows=2, groups=1, scale=1e-44, seed=0)
@example(rows=2, groups=1, scale=1.2e-38, seed=0)
def test_int8_activations_are_those_of_torchao(dtype: torch.dtype, rows: int, groups: int, scale: float, seed: int) -> None:
    activation = random_rows(rows, groups * GROUP, scale, seed, dtype)
    assert_bit_equal(fake_quantized_activation(Int8Activations(), activation), torchao_int8_activation(activation))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=50)
@given(**WEIGHTS)
def test_float8_activations_are_those_of_torchao(dtype: torch.dtype, rows: int, groups: int, scale: float, seed: int) -> None:
    activation = random_rows(rows, groups * GROUP, scale, seed, dtype)
    assert_bit_equal(fake_quantized_activation(Float8Activations(), activation), torchao_float8(activation).dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(**WEIGHTS)
def test_mslks_float8_activations_have_a_float32_scale(dtype: torch.dtype, rows: int, groups: int, scale: float, seed: int) -> None:
    activation = random_rows(rows, groups * GROUP, scale, seed, dtype)
    ours, theirs = MslkFloat8Activations().quantize(activation), torchao_float8(activation.float(), least=1 / 512)
    assert_bit_equal(ours.codes.view(torch.uint8), theirs.qdata.view(torch.uint8))
    assert_bit_equal(ours.scale, theirs.scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_activations_of_one_sign_are_quantized_as_torchao_does(dtype: torch.dtype, sign: int) -> None:
    activation = (random_rows(5, 64, 1.0, 0, dtype).abs() + 3) * sign
    assert_bit_equal(fake_quantized_activation(Int8Activations(), activation), torchao_int8_activation(activation))


@pytest.mark.parametrize("quantizer", ACTIVATIONS)
def test_each_token_of_a_batch_is_quantized_by_itself(quantizer: ActivationQuantizer) -> None:
    batch = random_rows(6, 64, 1.0, 0, torch.float32).view(2, 3, 64)
    alone = torch.stack([torch.stack([fake_quantized_activation(quantizer, token) for token in row]) for row in batch])
    assert_bit_equal(fake_quantized_activation(quantizer, batch), alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantizer", ACTIVATIONS)
def test_an_activation_of_zeros_stays_zero(quantizer: ActivationQuantizer, dtype: torch.dtype) -> None:
    assert torch.equal(fake_quantized_activation(quantizer, torch.zeros(2, 64, dtype=dtype)), torch.zeros(2, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_of_zeros_stays_zero(scheme: Scheme, dtype: torch.dtype) -> None:
    assert torch.equal(fake_quantized(torch.zeros(2, 64, dtype=dtype), scheme), torch.zeros(2, 64, dtype=dtype))


@pytest.mark.parametrize(
    ("scheme", "low", "high"),
    [(Scheme.INT8, -128, 127), (Scheme.INT8_INT4, -8, 7), (Scheme.INT4, -8, 7), (Scheme.FP8_INT4, -8, 7), (Scheme.FP8_FP8, -448, 448)],
)
def test_weight_codes_use_their_grid_and_never_leave_it(scheme: Scheme, low: int, high: int) -> None:
    codes = quantizer_of(scheme).quantize(torch.linspace(-1, 1, 4096).view(2, 2048)).codes.float()
    assert low <= int(codes.min()) <= low + 1
    assert int(codes.max()) == high


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_that_is_not_finite_shows_in_its_scale(scheme: Scheme, bad: float) -> None:
    weight = random_rows(4, 64, 1.0, 0, torch.float32)
    weight[2, 40] = bad
    assert quantizer_of(scheme).quantize(weight).scale.isfinite().logical_not().sum() == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantizing_and_dequantizing_leave_their_input_alone(scheme: Scheme) -> None:
    quantizer, weight = quantizer_of(scheme), random_rows(4, 64, 1.0, 0, torch.float32)
    clip_ratio = quantizer.least_squares_clip_ratio(weight)
    kept = weight.clone(), clip_ratio.clone()
    codes = quantizer.quantize(weight, clip_ratio)
    assert_bit_equal(weight, kept[0])
    assert_bit_equal(clip_ratio, kept[1])
    first, again = quantizer.dequantize(codes), quantizer.dequantize(codes)
    assert_bit_equal(first, again)


@pytest.mark.parametrize("quantizer", ACTIVATIONS)
def test_an_activation_and_its_codes_are_left_alone(quantizer: ActivationQuantizer) -> None:
    activation = random_rows(4, 64, 1.0, 1, torch.float32)
    kept = activation.clone()
    codes = quantizer.quantize(activation)
    first, again = quantizer.dequantize(codes, torch.float32), quantizer.dequantize(codes, torch.float32)
    assert_bit_equal(activation, kept)
    assert_bit_equal(first, again)


def squared_error(weight: Tensor, scheme: Scheme, clip_ratio: Tensor | None) -> Tensor:
    """For each group, [out, groups]."""
    error = (fake_quantized(weight, scheme, clip_ratio).double() - weight.double()).square()
    return error.view(weight.shape[0], -1, quantizer_of(scheme).block(weight.shape[1])).sum(dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_shrink_of_one_changes_nothing(scheme: Scheme, dtype: torch.dtype) -> None:
    quantizer, weight = quantizer_of(scheme), random_rows(6, 64, 1.0, 0, dtype)
    plain = quantizer.quantize(weight)
    ones = quantizer.quantize(weight, torch.ones(plain.scale.shape))
    assert_bit_equal(ones.scale, plain.scale)
    assert_bit_equal(quantizer.dequantize(ones), quantizer.dequantize(plain))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=20)
@given(rows=st.integers(2, 9), groups=st.integers(1, 4), scale=st.sampled_from(SCALES), seed=st.integers(0, 2**32 - 1))
def test_the_least_squares_shrink_is_never_worse_than_none_in_any_group(
    dtype: torch.dtype, scheme: Scheme, rows: int, groups: int, scale: float, seed: int
) -> None:
    weight = random_rows(rows, groups * GROUP, scale, seed, dtype)
    clip_ratio = quantizer_of(scheme).least_squares_clip_ratio(weight)
    assert ((clip_ratio > 0) & (clip_ratio <= 1)).all()
    clipped, without = squared_error(weight, scheme, clip_ratio), squared_error(weight, scheme, None)
    assert (clipped <= without * (1 + 1e-5)).all()


@pytest.mark.parametrize(("scheme", "share"), [(Scheme.INT8_INT4, 0.9), (Scheme.INT4, 0.96), (Scheme.FP8_INT4, 0.98)])
def test_the_least_squares_shrink_lowers_the_error_of_four_bits(scheme: Scheme, share: float) -> None:
    weight = random_rows(64, 256, 1.0, 0, torch.float32)[1:-1]  # the outlier's error is no rounding
    clip_ratio = quantizer_of(scheme).least_squares_clip_ratio(weight)
    assert squared_error(weight, scheme, clip_ratio).sum() < share * squared_error(weight, scheme, None).sum()


def test_the_least_squares_shrink_does_not_depend_on_how_many_rows_are_searched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, weight = quantizer_of(Scheme.INT4), random_rows(9, 64, 1.0, 0, torch.float32)
    whole = quantizer.least_squares_clip_ratio(weight)
    monkeypatch.setattr("finetune_trainer.qat.quantizers.weights._WEIGHTS_AT_ONCE", 2 * 64)
    assert torch.equal(quantizer.least_squares_clip_ratio(weight), whole)


@pytest.mark.parametrize("scheme", [Scheme.INT8, Scheme.INT8_INT4, Scheme.INT4, Scheme.FP8_INT4])
def test_fake_quantization_is_not_idempotent(scheme: Scheme) -> None:
    once = fake_quantized(random_rows(64, 64, 1.0, 0, torch.float32), scheme)
    assert not torch.equal(fake_quantized(once, scheme), once)

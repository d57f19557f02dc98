"""Which layers a scheme fits, in which groups, and what is said when that is too little."""

import pytest
from finetune_api.spec import QuantizationSpec, Scheme
from finetune_trainer.errors import SpecError
from finetune_trainer.qat.fit import LEAST_COVERAGE, Shapes, best_fit, fit
from hypothesis import given
from hypothesis import strategies as st
from support.exact_models import SCHEMES

SMOLLM2: Shapes = {  # (out, in) of one layer; 576 = 9 * 64, 1536 = 12 * 128
    "q_proj": (576, 576),
    "k_proj": (192, 576),
    "v_proj": (192, 576),
    "o_proj": (576, 576),
    "gate_proj": (1536, 576),
    "up_proj": (1536, 576),
    "down_proj": (576, 1536),
}
LLAMA: Shapes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "gate_proj": (14336, 4096), "down_proj": (4096, 14336)}
SHAPES = st.dictionaries(st.text(min_size=1, max_size=3), st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("scheme", "shapes", "group_size"),
    [
        (Scheme.INT4, LLAMA, 128),
        (Scheme.INT4, SMOLLM2, 64),
        (Scheme.INT4, {"a": (96, 96)}, 32),
        (Scheme.INT8_INT4, LLAMA, 32),
        (Scheme.FP8_INT4, LLAMA, 128),
        (Scheme.INT8, SMOLLM2, None),
        (Scheme.FP8_FP8, SMOLLM2, None),
    ],
)
def test_the_largest_group_that_covers_most_weights_is_taken(scheme: Scheme, shapes: Shapes, group_size: int | None) -> None:
    found = best_fit(QuantizationSpec(scheme=scheme), shapes)
    assert (found.group_size, found.coverage, found.unfit) == (group_size, 1.0, {})


def test_a_group_size_of_the_spec_is_obeyed_and_what_does_not_fit_is_listed() -> None:
    shapes = LLAMA | {"odd": (64, 96)}
    found = best_fit(QuantizationSpec(scheme=Scheme.INT4, group_size=64), shapes)
    assert found.group_size == 64
    assert found.unfit == {"odd": "input size 96 does not divide into groups of 64"}


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            QuantizationSpec(scheme=Scheme.FP8_INT4),
            "spec.quantization: fp8-int4 in groups of 128 would quantize only 25% of this model's linear weights, less than half "
            "(for one: input size 576 does not divide into groups of 128); choose scheme fp8-fp8 or scheme int4 or scheme int8 or scheme int8-int4.",
        ),
        (
            QuantizationSpec(scheme=Scheme.INT4, group_size=128),
            "spec.quantization: int4 in groups of 128 would quantize only 25% of this model's linear weights, less than half "
            "(for one: input size 576 does not divide into groups of 128); choose groupSize 64 or scheme fp8-fp8 or scheme int8 or scheme int8-int4.",
        ),
    ],
)
def test_silly_coverage_is_refused_with_what_would_fit(spec: QuantizationSpec, sentence: str) -> None:
    with pytest.raises(SpecError) as refused:
        best_fit(spec, SMOLLM2)
    assert str(refused.value) == sentence


def test_float8_needs_multiples_of_16() -> None:
    found = fit(Scheme.FP8_FP8, None, {"a": (32, 48), "b": (40, 48), "c": (48, 40)})
    assert found.unfit == {"b": "40 x 48 are not multiples of 16", "c": "48 x 40 are not multiples of 16"}


def test_experts_that_share_a_tensor_count_as_weights_that_stay_as_they_are() -> None:
    experts = 3 * sum(out * size for out, size in SMOLLM2.values())
    with pytest.raises(SpecError, match=r"quantize only 25% .*for one: its experts share tensors.*; choose scheme none\.$"):
        best_fit(QuantizationSpec(scheme=Scheme.INT8), SMOLLM2, experts)
    assert best_fit(QuantizationSpec(scheme=Scheme.INT8), SMOLLM2, experts // 3).coverage == LEAST_COVERAGE


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(SpecError, match=r"it has no linear layer besides the output head.*choose scheme none"):
        best_fit(QuantizationSpec(scheme=Scheme.INT8), {})


@given(scheme=st.sampled_from(SCHEMES), shapes=SHAPES)
def test_a_refusal_offers_only_what_would_be_taken(scheme: Scheme, shapes: Shapes) -> None:
    try:
        found = best_fit(QuantizationSpec(scheme=scheme), shapes)
    except SpecError as refused:
        offered = [word for word in str(refused).partition("; choose ")[2].rstrip(".").split(" or ") if word != "scheme none"]
        for choice in offered:
            kind, _, value = choice.partition(" ")
            other = QuantizationSpec(scheme=scheme, group_size=value) if kind == "groupSize" else QuantizationSpec(scheme=Scheme(value))
            assert best_fit(other, shapes).coverage >= LEAST_COVERAGE
    else:
        assert found.coverage >= LEAST_COVERAGE
        assert set(found.unfit) <= set(shapes)

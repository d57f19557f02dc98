"""What computes a shipped layer on this machine, and how far it is from the arithmetic of the training."""

import math

import pytest
import torch
from finetune_api.spec import Scheme
from finetune_trainer.qat.export import plain_model
from finetune_trainer.qat.kernels import REFERENCE, kernel_errors, kernel_of, quantized_layers, reference_arithmetic, steps_off
from finetune_trainer.qat.schemes import SCHEMES as TABLE
from finetune_trainer.qat.tensors import activations_of, dequantized, reference_linear
from finetune_trainer.qat.trial import training_logits
from finetune_trainer.stages import verify
from finetune_trainer.stages.convert import reference_batch
from support.exact_models import DTYPES, KERNELS, exact_model
from transformers import PreTrainedModel

IDS, MASK = reference_batch(260)
BATCH = {"input_ids": IDS, "attention_mask": MASK}
CPU = torch.device("cpu")


def shipped(scheme: Scheme, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = exact_model(scheme, dtype=dtype, attention_bias=True)
    return plain_model(model, scheme, {"lm_head": "output head"}, trust_remote_code=False)


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        (Scheme.INT8, REFERENCE),
        (Scheme.INT8_INT4, REFERENCE),
        (Scheme.FP8_FP8, "torch._scaled_mm"),
        (Scheme.INT4, ""),
        (Scheme.FP8_INT4, ""),
    ],
)
def test_a_cpu_runs_some_schemes_and_says_of_others_that_it_does_not(scheme: Scheme, kernel: str) -> None:
    assert kernel_of(shipped(scheme), CPU) == kernel
    assert TABLE[scheme].runs_on_cpu == bool(kernel)


@pytest.mark.parametrize("scheme", [Scheme.INT4, Scheme.FP8_INT4])
def test_where_no_kernel_is_said_to_run_none_does(scheme: Scheme) -> None:
    with pytest.raises((AttributeError, TypeError)):
        shipped(scheme)(**BATCH)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_float8_kernel_of_the_cpu_is_the_training_within_rounding(dtype: torch.dtype) -> None:
    errors = kernel_errors(shipped(Scheme.FP8_FP8, dtype), BATCH)
    assert len(errors) == 14
    assert max(errors.values()) < 0.5


@pytest.mark.parametrize("inputs", [512, 4096])
@pytest.mark.parametrize("scheme", [Scheme.INT4, Scheme.FP8_INT4, Scheme.FP8_FP8])
def test_a_wrong_kernel_is_above_the_limit_in_the_dtype_that_is_served_however_many_products_there_are(scheme: Scheme, inputs: int) -> None:
    layer = one_layer(scheme, inputs)
    x = torch.randn(64, inputs, generator=torch.Generator().manual_seed(1)).bfloat16()
    right, scaled = reference_linear(x, layer.weight, None), dequantized(layer.weight).double()
    channel, token = torch.ones(right.shape[-1]), torch.ones(len(x), 1)
    channel[7], token[5] = 1.05, 1.3
    wrong = {
        "another scale": right * 1.05,
        "another scale of one channel": (right * channel).bfloat16(),
        "another scale of one token": (right * token).bfloat16(),
        "nothing": right * 0,
        "the next group's scale": (x.double() @ scaled.roll(128, 1).T).bfloat16(),
        **({"the input as it is": (x.double() @ scaled.T).bfloat16()} if TABLE[scheme].activations else {}),
    }
    assert steps_off(layer, x, right) == 0.0
    read = activations_of(layer.weight)
    exact = (read.dequantize(read.quantize(x), x.dtype) if read else x).double() @ scaled.T
    assert steps_off(layer, x, exact.bfloat16()) < 0.5
    assert {name: error for name, result in wrong.items() if (error := steps_off(layer, x, result)) <= verify._ROUNDING_STEPS} == {}


def one_layer(scheme: Scheme, inputs: int) -> torch.nn.Linear:
    """A shipped layer of 64 outputs in bfloat16."""
    info = TABLE[scheme]
    quantizer = info.quantizer(128 if info.group_sizes else None)
    weight = torch.randn(64, inputs, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    layer = torch.nn.Linear(inputs, 64, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(info.tensor(quantizer.quantize(weight), quantizer.block(inputs)), requires_grad=False)
    return layer


@pytest.mark.parametrize("scheme", KERNELS)
def test_kernels_that_dequantize_have_no_error_at_all(scheme: Scheme) -> None:
    assert set(kernel_errors(shipped(scheme), BATCH).values()) == {0.0}


def test_a_kernel_that_reads_another_scale_is_found_in_its_layer() -> None:
    model = shipped(Scheme.FP8_FP8)
    name, layer = next(item for item in quantized_layers(model) if item[0].endswith("1.mlp.up_proj"))
    layer.forward = lambda x: torch.nn.Linear.forward(layer, x * 1.001)
    errors = kernel_errors(model, BATCH)
    assert max(errors, key=lambda key: errors[key]) == name
    assert errors[name] > 100


def test_a_kernel_that_gives_no_number_is_found() -> None:
    """From its layer on every input is none either, so that each layer alone would look as if it had no error."""
    model = shipped(Scheme.INT8)
    name, layer = list(quantized_layers(model))[1]
    layer.forward = lambda x: torch.nn.Linear.forward(layer, x) * math.nan
    errors = kernel_errors(model, BATCH)
    assert errors[name] == math.inf
    assert max(errors.values()) == math.inf


def test_reference_arithmetic_ends_with_its_block() -> None:
    model = shipped(Scheme.FP8_FP8, torch.bfloat16)
    with torch.no_grad():
        before = model(**BATCH, use_cache=False).logits
        with reference_arithmetic(model):
            inside = model(**BATCH, use_cache=False).logits
        after = model(**BATCH, use_cache=False).logits
    assert torch.equal(before, after)
    assert not torch.equal(before, inside)


def test_reference_arithmetic_is_that_of_training_with_biases() -> None:
    trained = exact_model(Scheme.INT4, attention_bias=True)
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    model = plain_model(trained, Scheme.INT4, {"lm_head": "output head"}, trust_remote_code=False)
    with torch.no_grad(), reference_arithmetic(model):
        assert torch.equal(model(**BATCH, use_cache=False).logits, training_logits(trained, IDS, MASK))

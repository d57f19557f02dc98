"""Exact QAT on an NVIDIA GPU (`make bench-gpu`): training against plain peft LoRA, the kernels that serve each scheme, and quantized products in training.

Llama-shaped models of 1 and 8 billion random weights in bfloat16, rank 32, all linears, gradient checkpointing and trl's fused loss, as the trainer has
them. One JSON line per figure; a part that fails says so and the next one runs. int4 and fp8-int4 need mslk, or benchmarks/fbgemm on PYTHONPATH.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from finetune_api.spec import FineTuneJobSpec, LoraSpec, QuantizationSpec, Scheme
from finetune_trainer.adapter import add_adapter
from finetune_trainer.memory.estimate import Lengths
from finetune_trainer.memory.fit import estimates_of
from finetune_trainer.plan import Plan
from finetune_trainer.qat import linear
from finetune_trainer.qat.export import exported_tensor
from finetune_trainer.qat.kernels import kernel_of, steps_off
from finetune_trainer.qat.prepare import exact_layers, follow_optimizer, mode_of, prepare
from finetune_trainer.qat.quantizers import WeightQuantizer
from finetune_trainer.qat.quantizers.float8 import MslkFloat8Activations
from finetune_trainer.qat.schemes import SCHEMES
from finetune_trainer.qat.tensors import dequantized, reference_linear
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.trainer.utils import add_fused_lm_head

RANK, TOKENS = 32, 2048
ROWS = {"1B": 8, "8B": 4}
WARM_STEPS, TIMED_STEPS = 2, 5
MODELS: dict[str, dict[str, Any]] = {  # the shapes of Llama 3.2 1B and Llama 3.1 8B
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
PARTS = ("estimates", "kernels", "products", "training")
ARMS = (
    "lora",
    "int8-int4",
    "int4",
    "int8",
    "fp8-int4",
    "fp8-fp8",
    "int8-int4 kept",
    "int8-int4 compiled kept",
    "fp8-fp8 by-its-kernel",
    "fp8-fp8 compiled kept by-its-kernel",
    "lora",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--sizes", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--arms", nargs="+", default=ARMS)
    parser.add_argument("--profile", action="store_true", help="the kernels that take most time in a step of each arm")
    chosen = parser.parse_args()
    if set(chosen.parts) != {"estimates"} and not torch.cuda.is_available():
        sys.exit("bench-gpu needs an NVIDIA GPU, and PyTorch finds none here; --parts estimates needs none")
    for what, part, arguments in parts(chosen):
        attempt(what, part, *arguments)


def parts(chosen: argparse.Namespace) -> Iterator[tuple[str, Callable[..., dict[str, Any]], tuple[Any, ...]]]:
    """(name, what measures it, its arguments) of all that was asked for."""
    if "estimates" in chosen.parts:
        yield from ((f"estimate {size} {arm}", estimate_figures, (size, arm)) for size in chosen.sizes for arm in ("lora", *SCHEMES))
    if set(chosen.parts) - {"estimates"}:
        yield "device", device_figures, ()
    if "kernels" in chosen.parts:
        yield from ((f"kernel {scheme.value}", kernel_figures, (scheme,)) for scheme in SCHEMES)
        yield "activations of mslk", activation_figures, ()
        yield from ((f"compiled {scheme.value}", compiled_figures, (scheme,)) for scheme in SCHEMES)
    if "products" in chosen.parts:
        yield "products", product_figures, ()
    if "training" in chosen.parts:
        yield from (
            (f"training {size} {arm}", training_figures, (size, arm, chosen.profile)) for size in chosen.sizes for arm in chosen.arms
        )


def device_figures() -> dict[str, Any]:
    """Where it runs."""
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}


def say(**figures: Any) -> None:
    """One line."""
    print(json.dumps(figures), flush=True)


def attempt(what: str, part: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Runs a part and says its figures; one that fails must not cost the others their time on the GPU."""
    started = time.perf_counter()
    try:
        say(part=what, **part(*arguments), seconds=round(time.perf_counter() - started, 1))
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        say(part=what, failed=f"{type(error).__name__}: {str(error)[:300]}")
    gc.collect()
    torch.cuda.empty_cache()


def training_figures(size: str, arm: str, profile: bool) -> dict[str, Any]:
    """Seconds of a step, tokens a second and the peak of what PyTorch allocates."""
    torch.manual_seed(0)
    scheme = None if arm == "lora" else Scheme(arm.split()[0])
    model = lora_model(size)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad], lr=1e-4, fused=True)
    if scheme:
        prepare(model, QuantizationSpec(scheme=scheme))
        follow_optimizer(model, optimizer)
        mode_of(model).keep_codes = "kept" in arm
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    model.train()
    with variants(arm.split()[1:]):
        torch.cuda.reset_peak_memory_stats()
        seconds, losses = steps(model, optimizer, ROWS[size])
        peak = torch.cuda.max_memory_allocated()
        if profile:
            print_profile(model, optimizer, ROWS[size])
    step = statistics.median(seconds[WARM_STEPS:])
    return {
        "step_seconds": round(step, 4),
        "tokens_per_second": round(ROWS[size] * TOKENS / step),
        "peak_gb": round(peak / 1e9, 3),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "spread": [round(min(seconds[WARM_STEPS:]), 4), round(max(seconds[WARM_STEPS:]), 4)],
    }


def lora_model(size: str, layers: int | None = None) -> PeftModel:
    """A random Llama with an adapter, on the GPU, as the trainer loads one there: checkpointed."""
    with torch.device("cuda"):
        base = AutoModelForCausalLM.from_config(
            configuration(size, **({"num_hidden_layers": layers} if layers else {})), dtype=torch.bfloat16
        )
    model = add_adapter(base, LoraSpec(rank=RANK))
    base.activation_checkpointing_enable({"use_reentrant": False})
    return model


def configuration(size: str, **changes: Any) -> LlamaConfig:
    """The shape of one of the models."""
    return LlamaConfig(vocab_size=128_256, num_key_value_heads=8, max_position_embeddings=TOKENS, **(MODELS[size] | changes))


def steps(
    model: PeftModel, optimizer: torch.optim.Optimizer, rows: int, count: int = WARM_STEPS + TIMED_STEPS
) -> tuple[list[float], list[float]]:
    """Seconds and losses of optimizer steps of one micro-batch, on other random tokens each."""
    seconds, losses = [], []
    for _ in range(count):
        input_ids = torch.randint(0, model.config.vocab_size, (rows, TOKENS), device="cuda")
        torch.cuda.synchronize()
        started = time.perf_counter()
        loss = -model(input_ids=input_ids, labels=input_ids, fused_lm_head=True, use_cache=False).log_probs.sum() / input_ids.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(round(float(loss), 5))
    return seconds, losses


def estimate_figures(size: str, arm: str) -> dict[str, Any]:
    """Peak as `finetune estimate` has it for steps of this kind; needs no GPU."""
    rows = ROWS[size]
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"source": "builtin://smollm2-135m-instruct"},
            "dataset": {"source": "builtin://python-docs"},
            "lora": {"rank": RANK},
            "training": {"batchSize": rows, "maxLength": TOKENS},
            "quantization": {"scheme": "none"} if arm == "lora" else {"scheme": arm, "qatPercent": 100},
            "outputs": {"destinations": [{"uri": "file:///nowhere"}]},
        }
    )
    plan = Plan(steps=1, switch_step=int(arm == "lora"), micro_batch=rows, accumulation=1, warmup_steps=0)
    found = estimates_of(spec, configuration(size), plan, Lengths(TOKENS, 0), on_gpu=True)(rows, False)
    return {"estimate_gb": round(found.peak / 1e9, 3)}


@contextmanager
def variants(words: list[str]) -> Iterator[None]:
    """The quantizers compiled, or the forward pass through the kernel that serves: trials of what the trainer does not do."""
    with ExitStack() as stack:
        if "compiled" in words:
            for quantizer in (WeightQuantizer, *{type(item.activations) for item in SCHEMES.values() if item.activations}):
                stack.enter_context(
                    replaced(quantizer, **{name: compiled(getattr(quantizer, name)) for name in ("quantize", "dequantize")})
                )
        if "by-its-kernel" in words:
            stack.enter_context(replaced(linear._StraightThrough, forward=staticmethod(scaled_forward)))
        yield


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fused into few kernels, with the roundings between its operations kept."""
    torch._dynamo.config.recompile_limit = 64  # one for each shape of weights and each scheme
    return torch.compile(function, dynamic=False, options={"emulate_precision_casts": True})


@torch.no_grad()
def compiled_figures(scheme: Scheme) -> dict[str, Any]:
    """Whether compiled quantizers give the same bits, and how fast both are: microseconds apart and fused."""
    info = SCHEMES[scheme]
    weight = torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16) * 0.02
    clip_ratio = (
        torch.rand(8192, 2048 // info.quantizer(info.group_sizes[0] if info.group_sizes else None).block(2048), device="cuda") * 0.4 + 0.6
    )
    pairs: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("weights", info.quantizer(info.group_sizes[0] if info.group_sizes else None), (weight, clip_ratio))
    ]
    if info.activations:
        pairs.append(("activations", info.activations, (torch.randn(8192, 2048, device="cuda", dtype=torch.bfloat16),)))
    return {what: _compiled_against_apart(quantizer, arguments) for what, quantizer, arguments in pairs}


def _compiled_against_apart(quantizer: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    quantize, dequantize = (partial(compiled(getattr(type(quantizer), name)), quantizer) for name in ("quantize", "dequantize"))
    codes, fused = quantizer.quantize(*arguments), quantize(*arguments)
    last = () if isinstance(quantizer, WeightQuantizer) else (torch.bfloat16,)
    return {
        "codes_differing": int((codes.codes.float() != fused.codes.float()).sum()),
        "scales_equal": bool(torch.equal(codes.scale, fused.scale)),
        "dequantized_equal": bool(torch.equal(quantizer.dequantize(codes, *last), dequantize(codes, *last))),
        "quantize_us": [round(microseconds(lambda call=call: call(*arguments)), 1) for call in (quantizer.quantize, quantize)],
        "dequantize_us": [round(microseconds(lambda call=call: call(codes, *last)), 1) for call in (quantizer.dequantize, dequantize)],
    }


@contextmanager
def replaced(owner: type, **attributes: Any) -> Iterator[None]:
    """Attributes of a class, within the block."""
    before = {name: owner.__dict__[name] for name in attributes}
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def scaled_forward(ctx: Any, x: Tensor, a: Tensor | None, b: Tensor | None, layer: linear.ExactLinear, *activation: Tensor) -> Tensor:
    """`_StraightThrough.forward` of fp8-fp8 through torch._scaled_mm: both operands lie on the grid already."""
    ctx.layer, ctx.quantizer, ctx.dtype = layer, layer.exact.activations, x.dtype
    ctx.save_for_backward(a, b, *activation)
    codes, scale, *_ = activation
    weight = linear.weight_codes(layer)
    rows = codes.reshape(-1, codes.shape[-1])
    output = torch._scaled_mm(
        rows, weight.codes.t(), scale_a=scale.reshape(-1, 1), scale_b=weight.scale.reshape(1, -1), out_dtype=x.dtype, use_fast_accum=True
    )
    return output.view(*x.shape[:-1], -1)


def print_profile(model: PeftModel, optimizer: torch.optim.Optimizer, rows: int) -> None:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiled:
        steps(model, optimizer, rows, 1)
    print(profiled.key_averages().table(sort_by="self_cuda_time_total", row_limit=14, max_name_column_width=70), flush=True)


@torch.no_grad()
def kernel_figures(scheme: Scheme) -> dict[str, Any]:
    """The shipped tensor of one MLP layer of the 1B shape: its kernel against the arithmetic of training, and its speed against bfloat16."""
    model = lora_model("1B", layers=1)
    for name, item in model.named_parameters():
        if "lora_B" in name:
            item.normal_(std=0.01)
    prepare(model, QuantizationSpec(scheme=scheme))
    name, layer = next((name, layer) for name, layer in exact_layers(model) if name.endswith("up_proj"))
    shipped = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    shipped.weight = nn.Parameter(exported_tensor(name, layer, scheme), requires_grad=False)
    trained = linear.fake_quantized_weight(layer)
    figures: dict[str, Any] = {
        "kernel": kernel_of(nn.Sequential(shipped), torch.device("cuda")),
        "weights_equal": bool(torch.equal(dequantized(shipped.weight), trained)),
        "bytes_per_weight": round(bytes_of(shipped.weight) / trained.numel(), 3),
    }
    if not figures["kernel"]:
        return figures
    for tokens in (1, 16, 256, 4096):
        x = torch.randn(tokens, layer.in_features, device="cuda", dtype=torch.bfloat16)
        output, reference = shipped(x), reference_linear(x, shipped.weight, None)
        figures[f"steps_off_{tokens}"] = round(steps_off(shipped, x, output), 3)
        figures[f"equal_{tokens}"] = bool(torch.equal(output, reference))
        figures[f"us_{tokens}"] = [round(microseconds(call), 1) for call in (lambda x=x: shipped(x), lambda x=x: F.linear(x, trained))]
    return figures


def bytes_of(weight: Tensor) -> int:
    parts, _ = weight.__tensor_flatten__()
    return sum(getattr(weight, part).numel() * getattr(weight, part).element_size() for part in parts if getattr(weight, part) is not None)


def activation_figures() -> dict[str, Any]:
    """Our float8 activations of fp8-int4 against the library's own kernel, code by code."""
    from mslk.quantize.triton.fp8_quantize import quantize_fp8_row

    figures = {}
    for scale in (1e-4, 1.0, 300.0):
        x = torch.randn(512, 2048, device="cuda", dtype=torch.bfloat16) * scale
        x[3] = 0
        codes, reciprocal = quantize_fp8_row(x)
        ours = MslkFloat8Activations().quantize(x)
        other = codes.float() != ours.codes.float()
        figures[f"times {scale:g}"] = {
            "codes_differing": int(other.sum()),
            "of": x.numel(),
            "scales_differing": int((reciprocal.reshape(-1) != ours.scale.reshape(-1)).sum()),
            "worst_scale": float((reciprocal.reshape(-1) / ours.scale.reshape(-1) - 1).abs().max()),
        }
    return figures


def product_figures() -> dict[str, Any]:
    """TFLOP/s of one product of the 8B shape in bfloat16, float8 with a scale for each row, and int8: what quantized arithmetic could gain."""
    tokens, size, out = 8192, 4096, 14336
    x, weight = (torch.randn(rows, size, device="cuda", dtype=torch.bfloat16) for rows in (tokens, out))
    x8, weight8 = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    x_scale, weight_scale = torch.ones(tokens, 1, device="cuda"), torch.ones(1, out, device="cuda")
    xi, weighti = (x * 20).to(torch.int8), (weight * 20).to(torch.int8)
    calls: dict[str, Callable[[], Tensor]] = {
        "bfloat16": lambda: F.linear(x, weight),
        "float8 rows": lambda: torch._scaled_mm(
            x8, weight8.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16, use_fast_accum=True
        ),
        "int8": lambda: torch._int_mm(xi, weighti.t()),
    }
    return {name: round(2e-6 * tokens * size * out / microseconds(call), 1) for name, call in calls.items()}


def microseconds(call: Callable[[], Any]) -> float:
    """Median of one call, timed with the device's events."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=50, return_mode="median")) * 1e3


if __name__ == "__main__":
    main()

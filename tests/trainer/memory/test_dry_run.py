"""The dry run: shapes without values come to the same bytes as the real step does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from finetune_api.spec import FineTuneJobSpec, LoraSpec, QuantizationSpec
from finetune_trainer.adapter import add_adapter
from finetune_trainer.base_model import cast_last_hidden_state
from finetune_trainer.example import Example
from finetune_trainer.memory import dry_run
from finetune_trainer.memory.dry_run import (
    HeldOutBatch,
    Step,
    UntraceableError,
    code_bytes,
    empty_model,
    evaluate,
    factor_bytes,
    peak_bytes,
    run,
)
from finetune_trainer.memory.estimate import PARTS, Kind, Lengths, needed_by
from finetune_trainer.memory.tracking import LiveBytes
from finetune_trainer.plan import Plan
from finetune_trainer.qat.gptq import choose_rounding
from finetune_trainer.qat.linear import weight_codes
from finetune_trainer.qat.prepare import exact_layers, mode_of, prepare
from peft import PeftModel
from support.exact_models import tiny_mixture
from support.run_contexts import run_spec
from support.tiny_model import tiny_llama
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Gemma2Config,
    LlamaConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)
from trl.trainer.utils import add_fused_lm_head

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 1024}


def spec(scheme: str = "int8-int4") -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(run_spec(lora={"rank": 4}, quantization={"scheme": scheme}))


def model_of(config: PreTrainedConfig | None = None, scheme: str = "int8-int4") -> PeftModel:
    return empty_model(config or tiny_llama(**WIDE).config, spec(scheme), torch.float32)


def real_model(*, enabled: bool = True) -> PeftModel:
    model = add_adapter(tiny_llama(**WIDE), LoraSpec(rank=4)).train()
    prepare(model, QuantizationSpec(), enabled=enabled)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return model


def real_peak(traced: Step | HeldOutBatch) -> int:
    """What the same takes with real weights."""
    model = real_model(enabled=traced.quantized)
    if isinstance(traced, Step) and traced.checkpointed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    return bytes_of(model, traced)


def bytes_of(model: PeftModel, traced: Step | HeldOutBatch) -> int:
    with LiveBytes() as tracker:
        for held in (*model.parameters(), *model.buffers()):
            tracker.count(held)
        run(model, traced) if isinstance(traced, Step) else evaluate(model, traced)
    return tracker.peak


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_shapes_alone_come_to_the_bytes_of_the_real_step(quantized: bool, checkpointed: bool, padded: bool) -> None:
    step = Step(2, 96, padded=padded, quantized=quantized, checkpointed=checkpointed)
    assert peak_bytes(model_of(), step) == pytest.approx(real_peak(step), rel=0.05)


@pytest.mark.parametrize(
    "traced",
    [
        Step(2, 96, quantized=True, taught=True),
        Step(2, 96, quantized=True, accumulated=True),
        HeldOutBatch(4, 96, True),
        HeldOutBatch(1, 96),
    ],
)
def test_a_teacher_micro_batches_before_and_held_out_rows_count_as_they_do(traced: Step | HeldOutBatch) -> None:
    assert peak_bytes(model_of(), traced) == pytest.approx(real_peak(traced), rel=0.05)


DEEP = (
    Step(1, 96),
    Step(2, 96, padded=True),
    Step(2, 96, padded=True, checkpointed=True, fused_loss=True),
    Step(2, 96, padded=True, quantized=True, taught=True, accumulated=True),
    Step(4, 8, quantized=True),
    HeldOutBatch(4, 96, quantized=True),
)


@pytest.mark.parametrize("traced", DEEP)
@pytest.mark.parametrize("changes", [{}, {"vocab_size": 50_000}, {"hidden_size": 256, "intermediate_size": 256, "vocab_size": 64}])
def test_a_deep_model_takes_what_its_first_layers_say(changes: dict[str, int], traced: Step | HeldOutBatch) -> None:
    model = model_of(tiny_llama(**(WIDE | changes), num_hidden_layers=9).config)
    found = peak_bytes(model, traced)
    assert found == pytest.approx(dry_run._peak(model, traced), rel=0.002)
    assert len(model.get_base_model().model.layers) == 9


def test_layers_that_differ_are_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny_llama(**WIDE, num_hidden_layers=6).config)
    alike = peak_bytes(model, Step(1, 32))
    model.get_base_model().model.layers[5].mlp.up_proj = torch.nn.Linear(128, 512, bias=True, device="meta")
    monkeypatch.setattr(dry_run._Layers, "shortened", lambda *_: pytest.fail("some are left out"))
    assert peak_bytes(model, Step(1, 32)) != alike


def test_micro_batches_before_take_more_and_a_batch_of_held_out_rows_less() -> None:
    model = model_of()
    plain = peak_bytes(model, Step(2, 96, quantized=True))
    gradients = sum(item.numel() * 4 for item in model.parameters() if item.requires_grad)
    assert plain < peak_bytes(model, Step(2, 96, quantized=True, accumulated=True)) <= plain + gradients
    assert peak_bytes(model, HeldOutBatch(2, 96, quantized=True)) < plain


@pytest.mark.parametrize("scheme", ["int8-int4", "int8", "fp8-int4"])
def test_what_quantization_keeps_is_counted_to_the_byte(scheme: str) -> None:
    model = add_adapter(tiny_llama(**WIDE), LoraSpec(rank=4)).train()
    prepare(model, QuantizationSpec.model_validate({"scheme": scheme}), enabled=True)
    row = tuple(range(64))
    choose_rounding(model, [Example(row, row)])
    layers = [layer for _, layer in exact_layers(model)]
    mode = mode_of(model)
    assert mode is not None
    mode.keep_codes = True
    kept = [part for layer in layers for part in weight_codes(layer) if isinstance(part, torch.Tensor)]
    assert len(kept) >= 2 * len(layers) > 0
    assert code_bytes(model_of(scheme=scheme)) == sum(part.nbytes for part in kept)
    made = [part for layer in layers for part in (layer.exact.clip_ratio, *(layer.exact.rounding_offset or ())) if part is not None]
    assert factor_bytes(model_of(scheme=scheme)) == sum(part.nbytes for part in made)
    assert code_bytes(model_of(scheme="none")) == factor_bytes(model_of(scheme="none")) == 0


def test_the_model_is_empty_again_afterwards_and_the_next_answer_is_the_same() -> None:
    model = model_of()
    first, second = (peak_bytes(model, Step(1, 32, quantized=True)) for _ in range(2))
    assert first == second
    assert all(item.is_meta for item in model.parameters())


def test_checkpointing_can_be_switched_on_and_off_between_steps() -> None:
    model = model_of()
    kept, again, after = (peak_bytes(model, Step(2, 128, checkpointed=on)) for on in (False, True, False))
    assert again < 0.9 * kept
    assert after == pytest.approx(kept, rel=0.01)


def test_more_rows_take_more_and_fused_loss_kernels_less() -> None:
    model = model_of()
    sizes = [peak_bytes(model, Step(rows, 64, padded=True)) for rows in (1, 2, 4, 8)]
    assert sizes == sorted(set(sizes))
    assert peak_bytes(model, Step(8, 64, padded=True, fused_loss=True)) < sizes[-1]


@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config, Gemma2Config])
def test_decoders_of_other_families_need_no_formula(kind: type[PreTrainedConfig]) -> None:
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = model_of(kind(**settings, head_dim=16, vocab_size=260, tie_word_embeddings=True))
    weights = sum(item.numel() for item in model.parameters()) * 4
    assert peak_bytes(model, Step(1, 64, quantized=True)) > weights


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "experts in groups": lambda: tiny_mixture(num_hidden_layers=3),
    "positions counted in the mask": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=260, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4)
    ),
    "no attention": lambda: FalconMambaForCausalLM(
        FalconMambaConfig(vocab_size=260, hidden_size=64, num_hidden_layers=2, state_size=8, time_step_rank=8)
    ),
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft, of its own pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_take_what_the_real_step_does(family: str, dtype: torch.dtype) -> None:
    base = FAMILIES[family]()
    for parameter in base.parameters():
        parameter.data = parameter.data.to(dtype)
    cast_last_hidden_state(base)
    real = add_adapter(base, LoraSpec(rank=4)).train()
    add_fused_lm_head(real.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    step = Step(2, 96, padded=True)
    assert peak_bytes(empty_model(base.config, spec("none"), dtype), step) == pytest.approx(bytes_of(real, step), rel=0.05)


def kind(**changes: Any) -> Kind:
    settings = {"on_gpu": False, "checkpointed": False, "tunes": True, "adapts": True, "distills": True, "quantizes": True, "rounds": True}
    settings |= {"batch": 8, "lengths": Lengths(64, 64)}
    return Kind(**(settings | changes))


def test_the_parts_are_the_model_its_adapter_and_adamw() -> None:
    model = model_of()
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad) * 4
    found = needed_by(model, kind(adapts=False, quantizes=False, rounds=False, lengths=Lengths(64, 0)))(1, True)
    assert found.adapter == trained
    assert found.optimizer == 3 * trained
    assert found.weights == pytest.approx(sum(item.numel() for item in model.parameters()) * 4 - trained, rel=0.01)
    assert found.quantization == 0
    assert found.peak == sum(getattr(found, part) for part in PARTS)
    assert found.activations > 0
    assert "a micro-batch of 1 row of 64 tokens needs" in found.sentence


def test_the_adapter_at_the_switch_its_factors_and_kept_codes_come_on_top_of_an_adapting_step() -> None:
    model = model_of()
    needed = needed_by(model, kind(tunes=False, distills=False, quantizes=False, rounds=False, lengths=Lengths(64, 0)))
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad) * 4
    without, kept = needed(1, False), needed(1, True)
    assert without.adapter == 2 * trained
    assert without.quantization == factor_bytes(model)
    assert kept.peak - without.peak == code_bytes(model)
    assert needed(8, True) == needed(8, False)  # a batch of one micro-batch keeps none


def test_on_a_gpu_a_batch_of_one_micro_batch_keeps_codes_too() -> None:
    model = model_of()
    needed = needed_by(
        model, kind(on_gpu=True, checkpointed=True, tunes=False, distills=False, quantizes=False, rounds=False, lengths=Lengths(64, 0))
    )
    assert needed(8, True).peak - needed(8, False).peak == code_bytes(model)


def test_every_phase_is_looked_at_and_each_size_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.memory import estimate

    seen: list[Step | HeldOutBatch] = []
    monkeypatch.setattr(estimate, "peak_bytes", lambda _, traced: seen.append(traced) or 10**6)
    needed = needed_by(model_of(), kind(on_gpu=True, checkpointed=True))
    assert [needed(rows, keeps) for rows in (2, 8, 2) for keeps in (False, True)]
    steps, batches = [[item for item in seen if isinstance(item, sort)] for sort in (Step, HeldOutBatch)]
    assert [(step.rows, step.quantized, step.taught, step.accumulated) for step in steps] == [
        (2, False, False, True),
        (2, True, True, True),
        (8, False, False, False),
        (8, True, True, False),
    ]
    assert all(step.checkpointed and step.fused_loss and step.padded for step in steps)
    assert batches == [HeldOutBatch(64, 64, quantized=True, rounding=True), HeldOutBatch(32, 64, quantized=True)]


def test_held_out_rows_that_take_more_than_a_step_are_what_counts() -> None:
    model = model_of()
    without, held_out = (
        needed_by(model, kind(quantizes=False, rounds=False, lengths=Lengths(8, measured)))(1, False) for measured in (0, 512)
    )
    assert without.peak < held_out.peak


@pytest.mark.parametrize(
    ("scheme", "switch_step", "rounds"), [("int8-int4", 1, True), ("int8-int4", 0, False), ("int8", 1, False), ("none", 1, False)]
)
def test_the_rounding_is_chosen_behind_a_tuning_where_the_grid_is_coarse(scheme: str, switch_step: int, rounds: bool) -> None:
    plan = Plan(steps=2, switch_step=switch_step, micro_batch=4, accumulation=2, warmup_steps=0)
    model = model_of(scheme=scheme)
    traced = Kind.of(spec(scheme), model, plan, Lengths(8, 8), on_gpu=False).traced(4)
    assert any(isinstance(item, HeldOutBatch) and item.rounding for item in traced) == rounds


@pytest.mark.parametrize("rows", [4, 32])
@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 512}, {"hidden_size": 512, "intermediate_size": 2048}])
def test_the_choice_of_the_rounding_counts_as_it_does(sizes: dict[str, int], rows: int) -> None:
    config = tiny_llama(**(WIDE | sizes)).config
    row = tuple(range(64))
    model = add_adapter(tiny_llama(**(WIDE | sizes)), LoraSpec(rank=4)).train()
    prepare(model, QuantizationSpec(), enabled=True)
    tracker = LiveBytes()
    with tracker:
        for parameter in model.parameters():
            tracker.count(parameter)
        choose_rounding(model, [Example(row, row)] * rows)
    empty = model_of(config)
    estimated = peak_bytes(empty, HeldOutBatch(rows, 64, quantized=True, rounding=True)) + factor_bytes(empty)
    assert tracker.peak == pytest.approx(estimated, rel=0.1)


def test_the_choice_of_the_rounding_counts_where_it_takes_the_most() -> None:
    model = model_of()
    without, chosen = (needed_by(model, kind(rounds=rounds, lengths=Lengths(8, 0)))(1, False) for rounds in (False, True))
    assert chosen.peak > without.peak


def test_a_model_whose_code_looks_at_values_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    layer = model.get_base_model().model.layers[0]
    original = type(layer).forward

    def forward(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, hidden if bool(hidden.sum() > 0) else -hidden, *args, **kwargs)

    monkeypatch.setattr(type(layer), "forward", forward)
    with pytest.raises(UntraceableError, match="DataDependent"):
        peak_bytes(model, Step(1, 32))
    assert all(item.is_meta for item in model.parameters())

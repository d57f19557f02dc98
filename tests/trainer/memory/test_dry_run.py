"""The dry run: shapes without values come to the same bytes as the real step does."""

from typing import Any

import pytest
import torch
from finetune_api.spec import FineTuneJobSpec, LoraSpec, QuantizationSpec
from finetune_trainer.adapter import add_adapter
from finetune_trainer.memory.dry_run import Step, UntraceableError, empty_model, peak_bytes, run
from finetune_trainer.memory.estimate import Kind, estimate_of, remembered
from finetune_trainer.memory.tracking import LiveBytes
from finetune_trainer.qat.prepare import prepare
from peft import PeftModel
from support.run_contexts import run_spec
from support.tiny_model import tiny_llama
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen2Config
from trl.trainer.utils import add_fused_lm_head

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 1024}


def spec(scheme: str = "int8-int4") -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(run_spec(lora={"rank": 4}, quantization={"scheme": scheme}))


def model_of(config: PreTrainedConfig | None = None, scheme: str = "int8-int4") -> PeftModel:
    return empty_model(config or tiny_llama(**WIDE).config, spec(scheme), torch.float32)


def real_peak(step: Step) -> int:
    """What the same step takes with real weights."""
    model = add_adapter(tiny_llama(**WIDE), LoraSpec(rank=4)).train()
    prepare(model, QuantizationSpec(), enabled=step.quantized)
    if step.checkpointed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    with LiveBytes() as tracker:
        for held in (*model.parameters(), *model.buffers()):
            tracker.count(held)
        run(model, step)
    return tracker.peak


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_shapes_alone_come_to_the_bytes_of_the_real_step(quantized: bool, checkpointed: bool, padded: bool) -> None:
    step = Step(2, 96, padded=padded, quantized=quantized, checkpointed=checkpointed)
    assert peak_bytes(model_of(), step) == pytest.approx(real_peak(step), rel=0.05)


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


def test_the_parts_are_the_model_its_adapter_and_adamw() -> None:
    model = model_of()
    trained = sum(item.numel() for item in model.parameters() if item.requires_grad) * 4
    found = estimate_of(model, [Step(1, 64)])
    assert found.adapter == trained
    assert found.optimizer == 3 * trained
    assert found.weights == pytest.approx(sum(item.numel() for item in model.parameters()) * 4 - trained, rel=0.01)
    assert found.peak == found.weights + found.adapter + found.optimizer + found.activations
    assert found.activations > 0
    assert "a micro-batch of 1 row of 64 tokens needs" in found.sentence


def test_both_phases_are_looked_at_and_each_size_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune_trainer.memory import estimate

    steps: list[Step] = []
    monkeypatch.setattr(estimate, "peak_bytes", lambda _, step: steps.append(step) or 10**6)
    needed = remembered(model_of(), Kind(on_gpu=True, tunes=True, adapts=True), 64)
    assert needed(2) == needed(2)
    assert [step.quantized for step in steps] == [False, True]
    assert all(step.checkpointed and step.fused_loss and step.padded for step in steps)


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

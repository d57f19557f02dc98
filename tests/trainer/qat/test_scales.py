"""The teacher and the scales are fitted to the adapter at the switch, and come back from a checkpoint as they were."""

from pathlib import Path

import pytest
import torch
from finetune_trainer.held_out import HeldOut
from finetune_trainer.qat.linear import fake_quantized_weight, merged_weight
from finetune_trainer.qat.prepare import exact_layers, set_fake_quantization
from finetune_trainer.qat.scales import fit_scales
from finetune_trainer.switch import Switch
from finetune_trainer.teacher import adapter_values, in_place, teacher_hidden
from support.exact_models import exact_model, logits_of, lora_model, set_factors, token_ids

BATCH = {"input_ids": token_ids(), "attention_mask": torch.ones(2, 16, dtype=torch.long), "labels": token_ids()}


def test_fitted_scales_lower_the_squared_error_of_every_layer_frozen_ones_included() -> None:
    model = exact_model(targets="q_proj")

    def errors() -> dict[str, float]:
        return {name: float((fake_quantized_weight(layer) - merged_weight(layer)).square().sum()) for name, layer in exact_layers(model)}

    before = errors()
    fit_scales(model)
    after = errors()
    assert len(after) == 14
    assert all(after[name] < before[name] for name in after)


def test_scales_stay_while_the_adapter_learns_on() -> None:
    model = exact_model()
    fit_scales(model)
    fitted = {name: layer.exact.clip_ratio for name, layer in exact_layers(model)}
    set_factors(model, seed=9)
    assert all(layer.exact.clip_ratio is fitted[name] for name, layer in exact_layers(model))


def test_the_teacher_is_the_model_as_it_was_not_quantized() -> None:
    model, plain = exact_model(), lora_model()
    teacher, before = adapter_values(model), logits_of(model, token_ids())
    set_factors(model, seed=9)
    learnt = logits_of(model, token_ids())
    with in_place(model, teacher):
        torch.testing.assert_close(logits_of(model, token_ids()), logits_of(plain, token_ids()), rtol=0, atol=0)
    assert torch.equal(logits_of(model, token_ids()), learnt)
    assert not torch.equal(learnt, before)
    hidden = teacher_hidden(model, teacher, BATCH)
    assert not hidden.requires_grad
    assert hidden.shape == (30, 64)


def test_an_error_within_the_block_gives_the_adapter_back() -> None:
    model = exact_model()
    teacher = adapter_values(model)
    set_factors(model, seed=9)
    learnt = adapter_values(model)
    with pytest.raises(KeyError), in_place(model, {}):
        pass
    assert all(torch.equal(value, learnt[name]) for name, value in adapter_values(model).items())
    assert not any(torch.equal(value, learnt[name]) for name, value in teacher.items())


@pytest.mark.parametrize("measured", [None, HeldOut([(1.1, 3), (2.7, 5)], [1, 2, 3, 4, 5, 6, 7, 8])])
def test_what_a_checkpoint_holds_of_the_switch_comes_back_bit_for_bit(measured: HeldOut | None, tmp_path: Path) -> None:
    model = exact_model()
    switch = Switch(adapter_values(model), measured, None, measured)
    switch.save(tmp_path)
    found = Switch.load(tmp_path, torch.device("cpu"))
    assert found is not None
    assert (found.tuned, found.nearest, found.ptq) == (measured, None, measured)
    assert found.adapter.keys() == switch.adapter.keys()
    assert all(torch.equal(value, switch.adapter[name]) for name, value in found.adapter.items())


def test_a_checkpoint_of_the_tune_phase_holds_none(tmp_path: Path) -> None:
    assert Switch.load(tmp_path, torch.device("cpu")) is None


def test_fake_quantization_is_as_it_was_after_the_teacher(tmp_path: Path) -> None:
    model = exact_model()
    set_fake_quantization(model, enabled=False)
    plain = logits_of(model, token_ids())
    teacher_hidden(model, adapter_values(model), BATCH)
    assert torch.equal(logits_of(model, token_ids()), plain)

"""Kept weight codes never outlive their weights: after a step, a load, a resume or a toggle the output is that of a model without a cache."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finetune_trainer.qat.linear import weight_codes
from finetune_trainer.qat.prepare import drop_caches, fake_quantization, follow_optimizer, mode_of
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from support.exact_models import exact_layer, exact_model, logits_of, lora_model, set_factors, token_ids
from torch import Tensor

IDS = token_ids()


def caching_model(**changes: str) -> tuple[PeftModel, Tensor]:
    """A model that keeps its weight codes, with warm caches, and the logits it gave."""
    model = exact_model(**changes)
    mode = mode_of(model)
    assert mode is not None
    mode.keep_codes = True
    return model, logits_of(model, IDS)


def uncached(model: PeftModel) -> Tensor:
    """The logits of a fresh model with the same weights, which has never cached anything."""
    fresh = exact_model()
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    return logits_of(fresh, IDS)


def assert_follows_its_weights(model: PeftModel, before: Tensor) -> None:
    """The weights have changed, and the output with them."""
    after = logits_of(model, IDS)
    assert not torch.equal(after, before)
    assert torch.equal(after, uncached(model))


def plain_adamw(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW((item for item in model.parameters() if item.requires_grad), lr=0.05, foreach=False)


def fused_adamw(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW((item for item in model.parameters() if item.requires_grad), lr=0.05, fused=True)


def test_codes_are_kept_until_something_changes() -> None:
    model, _ = caching_model()
    layer = exact_layer(model, "q_proj")
    assert weight_codes(layer) is weight_codes(layer)


def test_codes_are_not_kept_unless_asked_for() -> None:
    layer = exact_layer(exact_model(), "q_proj")
    weight_codes(layer)
    assert layer.exact.cached is None


@pytest.mark.parametrize("make", [plain_adamw, fused_adamw])
def test_an_optimizer_step_drops_the_codes(make: Callable[[PeftModel], torch.optim.Optimizer]) -> None:
    model, before = caching_model()
    optimizer = make(model)
    follow_optimizer(model, optimizer)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    assert_follows_its_weights(model, before)


def test_loading_a_state_dict_drops_the_codes() -> None:
    model, before = caching_model()
    other = exact_model()
    set_factors(other, 99)
    model.load_state_dict(other.state_dict())
    assert_follows_its_weights(model, before)


def test_loading_a_state_dict_by_assignment_drops_the_codes() -> None:
    model, before = caching_model()
    other = exact_model()
    set_factors(other, 99)
    model.load_state_dict(other.state_dict(), assign=True)
    assert_follows_its_weights(model, before)


def test_setting_the_adapters_state_drops_the_codes() -> None:
    model, before = caching_model()
    other = lora_model()
    set_factors(other, 99)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other, save_embedding_layers=False))
    assert_follows_its_weights(model, before)


def test_resuming_from_a_saved_adapter_drops_the_codes(tmp_path: Path) -> None:
    model, before = caching_model()
    other = lora_model()
    set_factors(other, 99)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert_follows_its_weights(model, before)


def test_disabling_adapters_uses_the_base_weights() -> None:
    model, before = caching_model()
    without = exact_model()
    with torch.no_grad():
        for name, parameter in without.named_parameters():
            if ".lora_B" in name:
                parameter.zero_()
    with model.disable_adapter():
        disabled = logits_of(model, IDS)
    assert not torch.equal(disabled, before)
    assert torch.equal(disabled, logits_of(without, IDS))


def test_enabling_adapters_again_uses_the_merged_weights() -> None:
    model, before = caching_model()
    with model.disable_adapter():
        logits_of(model, IDS)
    assert torch.equal(logits_of(model, IDS), before)


def test_an_edit_in_place_is_seen_by_itself() -> None:
    model, before = caching_model()
    with torch.no_grad():
        exact_layer(model, "q_proj").lora_B["default"].weight.mul_(3)
    assert_follows_its_weights(model, before)


def test_a_load_drops_the_codes_whatever_the_weights_own_versions_say() -> None:
    model, _ = caching_model()
    layer = exact_layer(model, "q_proj")
    codes = weight_codes(layer)
    model.load_state_dict({}, strict=False)
    assert weight_codes(layer) is not codes


def test_an_edit_of_data_is_seen_once_caches_are_dropped() -> None:
    model, before = caching_model()
    exact_layer(model, "q_proj").lora_B["default"].weight.data *= 3
    drop_caches(model)
    assert_follows_its_weights(model, before)


def test_a_load_reaches_the_codes_of_frozen_layers() -> None:
    model, before = caching_model(targets="q_proj")
    other = exact_model(targets="q_proj", seed=7)
    model.load_state_dict(other.state_dict(), assign=True)
    after = logits_of(model, IDS)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits_of(other, IDS))


def test_a_frozen_layer_is_quantized_once_for_all_optimizer_steps() -> None:
    model = exact_model(targets="q_proj")
    optimizer = fused_adamw(model)
    follow_optimizer(model, optimizer)
    codes = weight_codes(exact_layer(model, "k_proj"))
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    optimizer.step()
    assert weight_codes(exact_layer(model, "k_proj")) is codes


def test_codes_kept_for_an_evaluation_are_freed_after_it() -> None:
    model = exact_model()
    with fake_quantization(model, enabled=True, keep_codes=True):
        logits_of(model, IDS)
        assert exact_layer(model, "q_proj").exact.cached is not None
    assert exact_layer(model, "q_proj").exact.cached is None


def test_an_evaluation_leaves_the_switches_as_they_were() -> None:
    model, _ = caching_model()
    with fake_quantization(model, enabled=False):
        pass
    mode = mode_of(model)
    assert mode is not None
    assert (mode.enabled, mode.keep_codes) == (True, True)

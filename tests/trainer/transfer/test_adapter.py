"""The saved adapter names the base model that it was trained on, as whoever loads it elsewhere can get it; the summary says what it trains."""

import json
from pathlib import Path
from typing import Any

import pytest
from finetune_api.spec import LoraSpec
from finetune_trainer.adapter import add_adapter, save_adapter, summary
from support.run_contexts import context, run_spec
from support.tiny_model import tiny_llama, tiny_tokenizer


def saved_config(folder: Path, source: str, resolved: str) -> dict[str, Any]:
    """adapter_config.json of an adapter on a model of this source."""
    model = add_adapter(tiny_llama(), LoraSpec(rank=4))
    save_adapter(model, tiny_tokenizer(), context(folder, run_spec(source)).job, resolved, folder / "lora_model")
    assert model.peft_config["default"].revision is None, "the model at hand was loaded from a folder"
    return dict(json.loads((folder / "lora_model" / "adapter_config.json").read_text()))


def test_a_base_model_on_the_hub_is_named_with_its_commit(tmp_path: Path) -> None:
    config = saved_config(tmp_path, "hf://acme/base@main", "hf://acme/base@0123")
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/base", "0123")


@pytest.mark.parametrize("resolved", ["s3://models/base", "s3://models/base?etags=ab@cd"])
def test_a_base_model_from_elsewhere_has_no_revision(resolved: str, tmp_path: Path) -> None:
    config = saved_config(tmp_path, "s3://models/base", resolved)
    assert (config["base_model_name_or_path"], config["revision"]) == ("s3://models/base", None)


def test_the_summary_counts_what_is_trained() -> None:
    model = add_adapter(tiny_llama(), LoraSpec(rank=4, target_modules="q_proj"))
    adapter, base = 2 * (4 * 64 + 64 * 4), sum(weight.numel() for weight in tiny_llama().parameters())
    assert summary(model) == f"LoRA of rank 4 trains {adapter:,} parameters ({adapter / (base + adapter):.1%}) in 2 layers."

"""The model card: what was measured and nothing else, code that loads what is there, and front matter that the Hub can read."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.spec import Artifact
from finetune_trainer.destinations.model_card import model_card
from support.run_contexts import PROOF, context, report_of, run_spec

BOTH = {Artifact.ADAPTER: "lora_model", Artifact.QUANTIZED: ""}
ADAPTER = {Artifact.ADAPTER: ""}
QUANTIZED = {Artifact.QUANTIZED: "model-torchao"}


def card(folder: Path, folders: dict[Artifact, str] | None = None, model: str = "hf://acme/base@v2", **changes: Any) -> str:
    """The card of a run of this model; `changes` replace parts of its report."""
    spec = run_spec(model, "s3://data/rows.jsonl")
    if folders == ADAPTER:
        spec["quantization"] = {"scheme": "none"}
    ctx = context(folder, spec)
    return model_card(ctx.job, report_of(ctx, **changes), BOTH if folders is None else folders)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    before, head, _ = text.split("---\n", 2)
    assert before == ""
    parsed: dict[str, Any] = yaml.safe_load(head)
    return parsed


def test_the_front_matter_of_a_quantized_model_is_valid(tmp_path: Path) -> None:
    assert front_matter(card(tmp_path)) == {
        "base_model": "acme/base",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["finetune-operator", "lora", "torchao", "qat", "int8-int4"],
    }


def test_the_front_matter_of_an_adapter_is_valid(tmp_path: Path) -> None:
    head = front_matter(card(tmp_path, ADAPTER))

    assert (head["library_name"], head["base_model_relation"]) == ("peft", "adapter")
    assert head["tags"] == ["finetune-operator", "lora"]


@pytest.mark.parametrize("folders", [BOTH, ADAPTER])
def test_the_base_models_licence_is_the_models(tmp_path: Path, folders: dict[Artifact, str]) -> None:
    stated = {"license": "other", "license_name": "acme", "license_link": "https://hub.example/acme/base/blob/0123/LICENSE"}

    assert front_matter(card(tmp_path, folders, license=stated)).items() >= stated.items()


@pytest.mark.parametrize("model", ["s3://models/base", "file:///models/base", "pvc://models/base"])
def test_a_base_model_that_is_not_on_the_hub_is_not_claimed_to_be(tmp_path: Path, model: str) -> None:
    head = front_matter(card(tmp_path, model=model))

    assert "base_model" not in head
    assert "base_model_relation" not in head


def test_the_builtin_model_is_named_as_the_hub_names_it(tmp_path: Path) -> None:
    assert front_matter(card(tmp_path, model="builtin://smollm2-135m"))["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    "row",
    [
        "| base model | 3.142 |",
        "| tuned, before quantization-aware steps | 2.25 |",
        "| tuned, quantized with nearest values | 2.75 |",
        "| tuned, quantized after training (PTQ), scales and rounding chosen | 2.5 |",
        "| shipped quantized model | 2.31 |",
    ],
)
def test_every_measured_loss_is_stated(tmp_path: Path, row: str) -> None:
    assert row in card(tmp_path)


def test_a_loss_that_was_not_measured_has_no_row(tmp_path: Path) -> None:
    text = card(tmp_path, losses={"base": 3.0, "tuned": None, "ptq": None, "quantized": 2.0, "recovered": None})

    assert "PTQ" not in text
    assert "None" not in text


@pytest.mark.parametrize("losses", [None, {}, {"base": None, "tuned": None}])
def test_without_any_loss_the_card_says_so(tmp_path: Path, losses: Any) -> None:
    text = card(tmp_path, losses=losses)

    assert "No held-out loss was measured." in text
    assert "| loss |" not in text


def test_a_loss_of_zero_is_a_loss(tmp_path: Path) -> None:
    assert "| base model | 0 |" in card(tmp_path, losses={"base": 0.0})


def test_the_proof_is_stated(tmp_path: Path) -> None:
    text = card(tmp_path)

    assert "equal the trained ones bit for bit" in text
    assert "The largest difference of a logit is 0." in text


def test_weights_that_differ_are_stated_as_loudly(tmp_path: Path) -> None:
    text = card(tmp_path, proof=PROOF | {"weights_equal": False, "max_logit_difference": 0.5})

    assert "DIFFER from the trained ones" in text
    assert "bit for bit" not in text


@pytest.mark.parametrize(("kernel", "said"), [("", True), ("torch._scaled_mm on cpu", False)])
def test_a_kernel_that_was_not_run_is_stated(tmp_path: Path, kernel: str, said: bool) -> None:
    text = card(tmp_path, proof=PROOF | {"kernel": kernel})

    assert ("No kernel of this scheme ran on the training machine" in text) == said


def test_without_a_proof_nothing_is_claimed(tmp_path: Path) -> None:
    assert "## Proof" not in card(tmp_path, proof=None)


def test_both_artifacts_are_loaded_from_where_they_stand(tmp_path: Path) -> None:
    text = card(tmp_path)

    assert 'AutoModelForCausalLM.from_pretrained(".")' in text
    assert 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("acme/base", revision="0123"), "./lora_model")' in text


def test_an_adapter_alone_is_not_loaded_as_a_model(tmp_path: Path) -> None:
    text = card(tmp_path, ADAPTER)

    assert "torchao" not in text
    assert 'AutoModelForCausalLM.from_pretrained("acme/base", revision="0123"), ".")' in text


def test_a_quantized_model_alone_loads_no_adapter(tmp_path: Path) -> None:
    text = card(tmp_path, QUANTIZED)

    assert "peft" not in text
    assert 'from_pretrained("./model-torchao")' in text


def test_a_base_model_from_elsewhere_has_no_revision(tmp_path: Path) -> None:
    text = card(tmp_path, ADAPTER, model="s3://models/base", sources={"model": "s3://models/base?etags=0123"})

    assert 'AutoModelForCausalLM.from_pretrained("path/to/the/base/model"), ".")' in text


@pytest.mark.parametrize("folders", [BOTH, ADAPTER, QUANTIZED])
def test_the_code_is_python(tmp_path: Path, folders: dict[Artifact, str]) -> None:
    blocks = card(tmp_path, folders).split("```python\n")[1:]

    assert len(blocks) == len(folders)
    for block in blocks:
        compile(block.partition("```")[0], "card", "exec")


def test_the_origin_names_what_was_resolved(tmp_path: Path) -> None:
    text = card(tmp_path)

    for fact in ("hf://acme/base@0123", "s3://data/rows.jsonl?etag=ab", "seed: 42", "torch 2.13.0", "manifest.json"):
        assert fact in text


def test_a_card_needs_nothing_of_the_report(tmp_path: Path) -> None:
    ctx = context(tmp_path, run_spec("hf://acme/base", "s3://data/rows.jsonl"))

    text = model_card(ctx.job, {}, BOTH)

    assert front_matter(text)["base_model"] == "acme/base"
    assert "s3://data/rows.jsonl" in text

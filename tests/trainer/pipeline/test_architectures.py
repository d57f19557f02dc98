"""docs/models.md says what came out for each architecture, and the common ones are proved."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import architectures

COMMON = (
    "gemma2",
    "gemma3_text",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    return dict(json.loads(architectures.RESULTS.read_text()))


def test_the_page_is_the_generated_one(known: dict[str, Any]) -> None:
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page(known), "run `make bench-architectures`"


def test_every_candidate_was_tried(known: dict[str, Any]) -> None:
    assert list(known["types"]) == sorted(architectures.candidates())


@pytest.mark.parametrize("name", COMMON)
def test_a_common_architecture_is_proved(name: str, known: dict[str, Any]) -> None:
    assert known["types"][name]["outcome"] == "proved"


@pytest.mark.parametrize(("name", "layers"), [("falcon_h1", 18), ("got_ocr2", 14)], ids=["a hybrid", "two kinds of attention"])
def test_it_goes_through_the_whole_line(name: str, layers: int) -> None:
    assert architectures.outcome(name) == {"outcome": "proved", "layers": layers, "coverage": 1.0}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")  # peft, of its own pattern
def test_what_the_scheme_refuses_is_tried_without_one() -> None:
    found = architectures.outcome("mixtral")
    assert found["outcome"] == "adapter"
    assert found["said"].endswith("choose scheme none.")


def test_a_type_of_which_no_tiny_model_can_be_made_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "LARGEST", 1)
    assert architectures.outcome("llama")["outcome"] == "not tried"


def test_a_process_that_dies_is_a_failure_and_no_end_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert architectures.tried("llama") == {"outcome": "failed", "said": "exit code 1: "}

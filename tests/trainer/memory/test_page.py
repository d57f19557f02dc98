"""docs/memory.md says what was measured, and what was measured lies within the bar of what was estimated then, and of what is estimated today."""

import sys
from pathlib import Path

import pytest
from finetune_trainer.memory.estimate import PARTS
from finetune_trainer.memory.page import BAR, DOCS_FILE, PHASES, measured, table, total, with_table
from transformers import LlamaConfig

sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))
import memory as bench

PROMISED = [
    "SmolLM2-135M: 1 x 512",
    "SmolLM2-135M: 4 x 256",
    "SmolLM2-135M: 1 x 1,024 checkpointed",
    "Llama, 2 x 1,024: 1 x 512",
    "Llama, 2 x 1,024: 4 x 256",
    "Llama, 2 x 1,024: 1 x 1,024 checkpointed",
]
PHASE = dict.fromkeys(PARTS, 2 * 10**8) | {"peak": 10**9}
MEASURED = {"measured": dict.fromkeys(PHASES, 8 * 10**8), "conversion": {"model": 100, "peak": 115}}
RESULTS = {"rows": {"a model: 1 x 512": {"estimated": dict.fromkeys(PHASES, PHASE), **MEASURED}}}


def test_the_table_is_the_generated_one() -> None:
    page = DOCS_FILE.read_text(encoding="utf-8")
    assert page == with_table(page, measured()), "run `make crd`"
    assert page.count("<!-- rows -->") == page.count("<!-- end of rows -->") == 1


def test_a_row_says_both_peaks_and_their_difference() -> None:
    assert table(RESULTS) in with_table("before <!-- rows -->\nolder\n<!-- end of rows --> after", RESULTS)
    assert "| 1.00 | 0.80 | +25.0% |" in table(RESULTS)
    assert table(RESULTS).endswith("| 1.15 |\n")


def test_the_six_rows_are_there_and_hold() -> None:
    assert list(measured()["rows"]) == PROMISED
    for name, row in measured()["rows"].items():
        estimated, found = total(row)
        assert abs(estimated / found - 1) <= BAR, name


@pytest.mark.parametrize("case", [3, 4, 5])
def test_todays_estimate_of_each_phase_holds_too(case: int, tmp_path: Path) -> None:
    """Of the model of two layers, which is traced in a second or two; what it is measured with is in benchmarks/memory.py."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 16, "vocab_size": 32000}
    LlamaConfig(**sizes, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    rows, tokens, checkpointed = bench.SHAPES[case % len(bench.SHAPES)]
    found = measured()["rows"][bench.name_of(case)]["measured"]
    estimated = bench._estimated(tmp_path, rows, tokens, checkpointed=checkpointed)
    assert {phase: estimated[phase]["peak"] for phase in PHASES} == {phase: pytest.approx(found[phase], rel=BAR) for phase in PHASES}

"""docs/memory.md says what was measured, and what was measured lies within the bar."""

from finetune_trainer.memory.estimate import PARTS
from finetune_trainer.memory.page import BAR, DOCS_FILE, PHASES, measured, table, total, with_table

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


def test_every_measured_row_holds() -> None:
    for name, row in measured()["rows"].items():
        estimated, found = total(row)
        assert abs(estimated / found - 1) <= BAR, name

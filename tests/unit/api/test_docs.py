"""docs/api.md is what the models say, docs/status.md what the states say."""

import pytest
from finetune_api.docs import DOCS_FILE, STATUS_FILE, api_markdown, status_markdown
from finetune_api.exits import REASONS
from finetune_api.fields import leaves
from finetune_api.spec import FineTuneJobSpec
from finetune_api.states import STATES, Reason


def test_the_pages_are_the_generated_ones() -> None:
    assert DOCS_FILE.read_text(encoding="utf-8") == api_markdown(), "run `make crd`"
    assert STATUS_FILE.read_text(encoding="utf-8") == status_markdown(), "run `make crd`"


@pytest.mark.parametrize("reason", sorted({*Reason, *REASONS.values()}))
def test_every_reason_has_a_row_that_says_what_it_means_and_what_to_do(reason: str) -> None:
    assert STATES[reason].means
    assert STATES[reason].action


def test_no_row_is_left_of_a_reason_that_nobody_gives() -> None:
    assert set(STATES) == {*Reason, *REASONS.values()}


def test_every_field_of_the_spec_has_a_row_with_a_description() -> None:
    rows = [line for line in api_markdown().splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    assert len(rows) == len(list(leaves(FineTuneJobSpec)))
    assert all(row.split(" | ")[3].removesuffix(" |").strip() for row in rows)

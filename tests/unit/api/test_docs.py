"""docs/api.md is what the models say."""

from finetune_api.docs import DOCS_FILE, api_markdown
from finetune_api.fields import leaves
from finetune_api.spec import FineTuneJobSpec


def test_the_page_is_the_generated_one() -> None:
    assert DOCS_FILE.read_text(encoding="utf-8") == api_markdown(), "run `make crd`"


def test_every_field_of_the_spec_has_a_row_with_a_description() -> None:
    rows = [line for line in api_markdown().splitlines() if line.startswith("| `") and line.count(" | ") == 3]
    assert len(rows) == len(list(leaves(FineTuneJobSpec)))
    assert all(row.split(" | ")[3].removesuffix(" |").strip() for row in rows)

"""docs/schemes.md is what the table and the measurements say."""

import json
import re

import pytest
from finetune_api.rules import GROUP_SIZES
from finetune_api.spec import Scheme
from finetune_trainer.qat.schemes import SCHEMES as TABLE
from finetune_trainer.qat.schemes_page import DOCS_FILE, RESULTS_FILE, bytes_per_weight, schemes_markdown
from support.exact_models import SCHEMES


def test_the_page_is_the_generated_one() -> None:
    assert DOCS_FILE.read_text(encoding="utf-8") == schemes_markdown(), "run `make crd`"


def test_every_scheme_has_a_row_in_each_table() -> None:
    assert set(TABLE) == set(SCHEMES)
    rows = [match[1] for match in re.finditer(r"^\| `([^`]+)` \|", schemes_markdown(), re.MULTILINE)]
    measured = json.loads(RESULTS_FILE.read_text(encoding="utf-8"))["schemes"] if RESULTS_FILE.exists() else {}
    assert sorted(rows) == sorted([*(scheme.value for scheme in SCHEMES), *(scheme.value for scheme in SCHEMES), *measured])


@pytest.mark.parametrize(
    ("scheme", "group", "size"),
    [
        (Scheme.INT8, None, 1.003),
        (Scheme.INT4, 128, 0.531),
        (Scheme.INT4, 32, 0.625),
        (Scheme.FP8_INT4, 128, 0.531),
        (Scheme.FP8_FP8, None, 1.004),
    ],
)
def test_bytes_per_weight_are_those_of_the_tensor(scheme: Scheme, group: int | None, size: float) -> None:
    assert bytes_per_weight(TABLE[scheme], group) == pytest.approx(size, abs=0.001)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_group_sizes_of_the_table_are_allowed_by_the_spec(scheme: Scheme) -> None:
    assert set(TABLE[scheme].group_sizes) <= set(GROUP_SIZES.get(scheme, ()))
    assert bool(TABLE[scheme].group_sizes) == (scheme in GROUP_SIZES)

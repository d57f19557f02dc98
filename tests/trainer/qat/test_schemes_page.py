"""docs/schemes.md is what the table and the measurements say."""

import re

import pytest
from finetune_api.rules import GROUP_SIZES
from finetune_api.spec import Scheme
from finetune_trainer.qat.schemes import SCHEMES as TABLE
from finetune_trainer.qat.schemes_page import DOCS_FILE, bytes_per_weight, known_results, schemes_markdown
from support.exact_models import SCHEMES


def test_the_page_is_the_generated_one() -> None:
    assert DOCS_FILE.read_text(encoding="utf-8") == schemes_markdown(known_results()), "run `make crd`"


def test_every_scheme_has_a_row_in_each_table() -> None:
    assert set(TABLE) == set(SCHEMES)
    results = known_results()
    rows = [match[1] for match in re.finditer(r"^\| `([^`]+)` \|", schemes_markdown(results), re.MULTILINE)]
    measured = results["schemes"] if results else {}
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


def test_a_measured_row_names_what_was_not_chosen_and_a_refused_one_says_why() -> None:
    losses = {"base": 3.0, "tuned": 2.0, "nearest": None, "ptq": 2.5, "quantized": 2.25}
    rows = {
        "int8": {"losses": losses, "bytes": {"bytes_before": 4e6, "bytes_after": 1e6}, "verifiedBy": "weights", "steps": 21},
        "fp8-int4": {"refused": "InvalidSpec: spec.quantization: does not fit"},
    }
    spec = {"model": {"source": "m"}, "dataset": {"source": "d"}, "lora": {"rank": 2}, "quantization": {"qatPercent": 20}}
    page = schemes_markdown({"spec": spec | {"training": {"batchSize": 4, "maxLength": 8}}, "schemes": rows})
    assert "21 steps of 4 rows" in page
    assert "| `int8` | 1 | 3.000 | 2.000 | as PTQ | 2.500 | 2.250 | weights |" in page
    assert "| `fp8-int4` | refused: does not fit | | | | | | |" in page


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_group_sizes_of_the_table_are_allowed_by_the_spec(scheme: Scheme) -> None:
    assert set(TABLE[scheme].group_sizes) <= set(GROUP_SIZES.get(scheme, ()))
    assert bool(TABLE[scheme].group_sizes) == (scheme in GROUP_SIZES)

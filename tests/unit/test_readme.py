"""What a new user types: README.md and CONTRIBUTING.md name only what is there, and the cluster section fits the example that it applies."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api.validation import verdicts

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHART = ROOT / "charts" / "finetune-operator"
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
EXAMPLE = (ROOT / "examples" / "production.yaml").read_text(encoding="utf-8")


def value_in(values: Any, path: str) -> Any:
    for key in path.split("."):
        values = values[key]
    return values


@pytest.mark.parametrize("target", sorted(set(re.findall(r"(?:^|`)make ([a-z-]+)", PAGES, re.MULTILINE))))
def test_a_make_target_that_is_named_exists(target: str) -> None:
    assert target in TARGETS


def test_the_first_example_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert [str(problem) for problem in verdicts(text, local=False)] == []


def test_every_secret_of_the_applied_example_is_created() -> None:
    assert set(re.findall(r"create secret generic (\S+)", README)) == set(re.findall(r"secretName: ([\w-]+)", EXAMPLE))


def test_the_job_that_is_watched_is_the_one_that_is_applied() -> None:
    assert set(re.findall(r"(?:describe ftj |ftj/)([a-z-]+)", README)) == {yaml.safe_load(EXAMPLE)["metadata"]["name"]}


@pytest.mark.parametrize("option", re.findall(r"--set ([\w.]+)=", README))
def test_a_value_that_is_set_is_one_of_the_charts(option: str) -> None:
    assert value_in(yaml.safe_load((CHART / "values.yaml").read_text()), option)


def unknown_values(given: Any, known: Any, path: str = "") -> list[str]:
    """Paths of values that the chart does not have; what is a free map or a list in it has none to compare."""
    if not isinstance(given, dict) or known == {}:
        return []
    missing = [f"{path}{key}" for key in given if key not in known]
    return missing + [item for key in given.keys() & known.keys() for item in unknown_values(given[key], known[key], f"{path}{key}.")]


def test_the_values_in_the_page_about_installing_are_the_charts() -> None:
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    values = [block for block in blocks if "kind" not in block]
    assert len(values) >= 3
    known = yaml.safe_load((CHART / "values.yaml").read_text())
    assert [item for block in values for item in unknown_values(block, known)] == []


def test_the_images_are_tagged_as_the_chart_asks_for_them() -> None:
    tags = re.findall(r"REGISTRY/finetune-\S+?:([0-9.]+)", README)
    assert len(tags) >= 2
    assert set(tags) == {yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]}

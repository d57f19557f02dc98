"""The CRD: generated from the models, structural, and with a bound on everything that can grow."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from finetune_api.crd import CRD_FILE, build_crd, crd_yaml
from finetune_api.rules import ALWAYS, SERVER_ONLY
from support.mutations import all_leaf_paths

CRD = build_crd()
(VERSION,) = CRD["spec"]["versions"]
ROOT = VERSION["schema"]["openAPIV3Schema"]
STRUCTURAL_KEYS = {
    *("type", "description", "properties", "required", "items", "additionalProperties", "enum", "pattern", "minimum", "maximum"),
    *("maxLength", "maxItems", "minItems", "maxProperties"),
    *("x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
}


def nodes(schema: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, item in schema.get("properties", {}).items():
        yield from nodes(item, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


NODES = [node for part in ("spec", "status") for node in nodes(ROOT["properties"][part], part)]
each_node = pytest.mark.parametrize("schema", [schema for _, schema in NODES], ids=[path for path, _ in NODES])


def test_the_committed_file_is_what_the_models_say() -> None:
    assert CRD_FILE.read_text(encoding="utf-8") == crd_yaml(), "run `make crd`"


def test_the_file_is_the_crd() -> None:
    assert yaml.safe_load(crd_yaml()) == CRD


def test_the_schema_has_every_field_of_the_spec() -> None:
    described = {path.replace("[]", "").removeprefix("spec.") for path, _ in NODES}
    assert len(NODES) >= 100
    assert all_leaf_paths() <= described


@each_node
def test_a_schema_is_structural(schema: dict[str, Any]) -> None:
    assert schema.keys() <= STRUCTURAL_KEYS
    assert schema["type"] in ("object", "array", "string", "integer", "boolean")


@each_node
def test_what_can_grow_has_a_bound(schema: dict[str, Any]) -> None:
    bounded = {
        "string": "maxLength" in schema or "enum" in schema,
        "array": "maxItems" in schema,
        "object": "maxProperties" in schema if "additionalProperties" in schema else "properties" in schema,
    }
    assert bounded.get(schema["type"], True)


@pytest.mark.parametrize(("path", "schema"), [(path, schema) for path, schema in NODES if path.startswith("spec.")])
def test_every_number_of_the_spec_has_bounds(path: str, schema: dict[str, Any]) -> None:
    if schema["type"] == "integer" and "enum" not in schema:
        assert {"minimum", "maximum"} <= schema.keys(), path


@pytest.mark.parametrize(("path", "schema"), [node for node in NODES if not node[0].endswith("[]")])
def test_everything_with_a_name_has_a_description(path: str, schema: dict[str, Any]) -> None:
    assert schema["description"].endswith("." if path != "spec" else "`spec`."), path


@pytest.mark.parametrize("path", ["model.source", "dataset.source", "outputs.destinations"])
def test_a_field_without_a_default_is_required(path: str) -> None:
    section, name = path.split(".")
    spec = ROOT["properties"]["spec"]
    assert section in spec["required"]
    assert name in spec["properties"][section]["required"]


def test_every_rule_of_the_server_is_in_the_schema_and_points_at_its_field() -> None:
    written = [(path, rule) for path, schema in NODES for rule in schema.get("x-kubernetes-validations", ())]
    assert len(written) == len(ALWAYS) + len(SERVER_ONLY) >= 30
    paths = {path for path, _ in NODES}
    for path, rule in written:
        field = f"{path.replace('[]', '')}{rule.get('fieldPath', '')}"
        assert field in paths
        assert rule["message"].startswith(f"{field}: ")


def test_a_rule_stands_no_higher_than_it_must() -> None:
    """At `spec` it is worked out at every write of every object."""
    sections = set(ROOT["properties"]["spec"]["properties"])
    for rule in ROOT["properties"]["spec"]["x-kubernetes-validations"]:
        assert len({section for section in sections if f"self.{section}" in rule["rule"]}) >= 2, rule


def test_the_status_is_a_subresource() -> None:
    assert VERSION["subresources"] == {"status": {}}


def test_conditions_are_merged_by_their_type() -> None:
    conditions = ROOT["properties"]["status"]["properties"]["conditions"]
    assert conditions["x-kubernetes-list-type"] == "map"
    assert conditions["x-kubernetes-list-map-keys"] == ["type"]


def test_kubectl_get_prints_phase_stage_progress_loss_and_age() -> None:
    columns = [(column["name"], column["jsonPath"]) for column in VERSION["additionalPrinterColumns"]]
    assert columns == [
        ("Phase", ".status.phase"),
        ("Stage", ".status.stage"),
        ("Progress", ".status.progress.summary"),
        ("Loss", ".status.progress.loss"),
        ("Age", ".metadata.creationTimestamp"),
    ]


@pytest.mark.parametrize(
    "path", [column["jsonPath"] for column in VERSION["additionalPrinterColumns"] if "metadata" not in column["jsonPath"]]
)
def test_a_printed_column_exists(path: str) -> None:
    assert path.removeprefix(".") in [name for name, _ in NODES]


def test_the_names_are_what_a_user_types() -> None:
    assert CRD["metadata"]["name"] == "finetunejobs.finetune.dev"
    assert CRD["spec"]["names"] == {
        "kind": "FineTuneJob",
        "listKind": "FineTuneJobList",
        "plural": "finetunejobs",
        "singular": "finetunejob",
        "shortNames": ["ftj"],
        "categories": ["all", "finetune"],
    }

"""The CustomResourceDefinition, generated from the models: `python -m finetune_api.crd` writes the YAML (a test holds it to the models).

pydantic's JSON schema is not a structural one: references are inlined, `X | None` becomes X, and what the API server does not know is left
out. There are no defaults in it: a stored default would change a digest when the default changes.
"""

from pathlib import Path
from typing import Any

import yaml

from finetune_api.fields import ApiModel
from finetune_api.rules import ALWAYS, SERVER_ONLY, Rule
from finetune_api.spec import GROUP, KIND, PLURAL, VERSION, FineTuneJobSpec
from finetune_api.status import FineTuneJobStatus

Schema = dict[str, Any]

_DROPPED = ("title", "additionalProperties", "default", "x-finetune", "propertyNames")
_COLUMNS = (
    ("Phase", "string", ".status.phase"),
    ("Stage", "string", ".status.stage"),
    ("Progress", "string", ".status.progress.summary"),
    ("Loss", "string", ".status.progress.loss"),
    ("Age", "date", ".metadata.creationTimestamp"),
)


def build_crd() -> dict[str, Any]:
    """The CRD as JSON values."""
    columns = [{"name": name, "type": kind, "jsonPath": path} for name, kind, path in _COLUMNS]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": columns,
        "schema": {"openAPIV3Schema": _root_schema()},
    }
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["ftj"],
        "categories": ["all", "finetune"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def structural_schema(model: type[ApiModel]) -> Schema:
    """The structural schema of a model, references inlined."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs", {})
    return _structural(schema, definitions)


def _root_schema() -> Schema:
    spec = structural_schema(FineTuneJobSpec)
    for rule in (*ALWAYS, *SERVER_ONLY):
        _place(rule, spec)
    status = structural_schema(FineTuneJobStatus)
    status["properties"]["conditions"] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    return {
        "type": "object",
        "description": "One fine-tuned, quantized, verified and published model.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }


def _place(rule: Rule, spec: Schema) -> None:
    """Writes a rule where it is checked; `fieldPath` leads from there to the field that it is about."""
    node = spec
    for key in rule.at.split(".") if rule.at else ():
        node = node["properties"][key.removesuffix("[]")]
        node = node["items"] if key.endswith("[]") else node
    below = rule.field.removeprefix(rule.at.removesuffix("[]")).removeprefix(".")
    written = {"rule": rule.cel, "message": f"spec.{rule.field}: {rule.message}"}
    node.setdefault("x-kubernetes-validations", []).append(written | ({"fieldPath": f".{below}"} if below else {}))


def _structural(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    schema = _resolved(schema, definitions)
    result: Schema = {key: value for key, value in schema.items() if key not in _DROPPED}
    if "const" in result:
        result["enum"] = [result.pop("const")]
    if "properties" in result:
        result["properties"] = {name: _structural(item, definitions) for name, item in result["properties"].items()}
    if "items" in result:
        result["items"] = _structural(result["items"], definitions)
    if isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = _structural(schema["additionalProperties"], definitions)
    return result


def _resolved(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    """A schema without $ref and without the null branch of `X | None`; what stands beside a reference wins over what it names."""
    if "anyOf" in schema:
        (kept,) = [branch for branch in schema["anyOf"] if branch.get("type") != "null"]
        schema = {**kept, **{key: value for key, value in schema.items() if key != "anyOf"}}
    if "$ref" in schema:
        named = definitions[schema["$ref"].rpartition("/")[2]]
        schema = {**_resolved(named, definitions), **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def crd_yaml() -> str:
    """The committed file's content."""
    return "# Generated from crds/finetune_api by `make crd`; do not edit.\n" + yaml.safe_dump(build_crd(), sort_keys=False, width=140)


CRD_FILE = Path(__file__).parents[1] / f"{PLURAL}.{GROUP}.yaml"

if __name__ == "__main__":
    CRD_FILE.write_text(crd_yaml(), encoding="utf-8")

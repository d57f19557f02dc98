"""docs/api.md and docs/status.md, generated from the models, the rules and the states: `python -m finetune_api.docs` writes them.

A test holds the pages to what they are generated from.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_api.crd import structural_schema
from finetune_api.fields import leaves
from finetune_api.rules import ALWAYS, LOCAL_ONLY, SERVER_ONLY, Rule
from finetune_api.spec import API_VERSION, KIND, FineTuneJobSpec
from finetune_api.states import STATES
from finetune_api.status import FineTuneJobStatus

Schema = dict[str, Any]

DOCS_FILE = Path(__file__).parents[2] / "docs" / "api.md"
STATUS_FILE = DOCS_FILE.with_name("status.md")

_HEAD = f"""<!-- Generated from crds/finetune_api by `make crd`; do not edit. -->
# {KIND} (`{API_VERSION}`)

What `kubectl explain ftj.spec` says, on one page. An edit of a field does one of three things:

| class | an edit |
|---|---|
| train | changes the weights: the old Job stops, a new run trains |
| run | makes a new Job, which starts from what the same training already has |
| live | is patched onto the Job, without a new run (`suspend` stops the pod, and later lets another one go on from its checkpoint) |
"""


def api_markdown() -> str:
    """The page."""
    sections = [
        _HEAD,
        "## spec\n",
        "| field | type | class | meaning |\n|---|---|---|---|",
        *_spec_rows(),
        "\n## What is refused beyond that\n",
        "By `kubectl apply` and `finetune validate` alike, with the sentence:\n",
        *_rule_rows(ALWAYS),
        "\nBy `kubectl apply` only:\n",
        *_rule_rows(SERVER_ONLY),
        "\nBy `finetune run` and `finetune validate --local` only:\n",
        *_rule_rows(LOCAL_ONLY),
        "\n## status\n",
        "| field | type | meaning |\n|---|---|---|",
        *_status_rows(),
    ]
    return "\n".join(sections) + "\n"


_STATUS_HEAD = """<!-- Generated from crds/finetune_api/states.py by `make crd`; do not edit. -->
# What the status says

`kubectl describe ftj` has a `message` of one sentence, and a reason in the conditions. Conditions follow kstatus: `Ready` is always there; `Reconciling` while
something is under way; `Stalled` when a person must act; a suspended job has `Ready=False` alone. So `kubectl wait --for=condition=Ready` ends when the
model is published, and Flux sees a failed job as failed; Argo CD does with [its health script](installing.md#gitops). `Trained`, `Verified`, `QualityPassed` and
`Published` are milestones: once reached in a run they stay. A condition's transition time changes only with its status. Events tell the same story: Created, Started,
Succeeded or Failed, Published, each once a run.

| reason | seen in | what it means | what to do |
|---|---|---|---|
"""


_STATUS_TAIL = """
## Where preflight runs

A job that wants a GPU is first checked by a Job without one. Its pod tolerates what the training's pod tolerates, and has the same volumes.

- **Without a claim** it runs on any node of the architecture, operating system, region, zone and host that `scheduling.nodeSelector` names; other labels, such as a
  GPU's, are not asked for.
- **With a claim** (`persistentVolumeClaim` of `storage.workspace` or `storage.cache`, a `pvc://` source, or a `storage.workspace.storageClassName`) the whole
  `nodeSelector` holds: a StorageClass with `volumeBindingMode: WaitForFirstConsumer` makes the volume where the first pod runs, and that pod is preflight's. Where an
  autoscaler makes the GPU nodes, this may start one.

A `scheduling.runtimeClassName` such as a sandbox's holds for preflight too; only those of GPU nodes (the chart's `trainer.gpuRuntimeClasses`) are left out.

**Claim and GPU nodes in different zones.** A new claim's disk is made in the zone of the first pod that uses it, and that is preflight's. If the GPU nodes are in another
zone, the training waits as `Unschedulable` with `volume node affinity conflict`. Avoid it: put the zone, or the GPU nodes' label, into `scheduling.nodeSelector`, or set
`runPolicy.preflight: Skip`. If it has happened: delete the claim and make it anew.
"""


def status_markdown() -> str:
    """The page of all states."""
    rows = (f"| {reason} | {state.seen} | {state.means} | {state.action} |\n" for reason, state in STATES.items())
    return _STATUS_HEAD + "".join(rows) + _STATUS_TAIL


def _spec_rows() -> Iterator[str]:
    classes = {".".join(path): field_class for path, _, field_class in leaves(FineTuneJobSpec)}
    for path, schema in _walk(structural_schema(FineTuneJobSpec), ""):
        plain = path.replace("[]", "")
        if plain in classes:
            yield f"| `{path}` | {_type(schema)} | {classes[plain]} | {_cell(schema)} |"


def _status_rows() -> Iterator[str]:
    return (f"| `{path}` | {_type(schema)} | {_cell(schema)} |" for path, schema in _walk(structural_schema(FineTuneJobStatus), ""))


def _rule_rows(rules: tuple[Rule, ...]) -> list[str]:
    return list(dict.fromkeys(f"- `spec.{rule.field}`: {rule.message}" for rule in rules))


def _walk(schema: Schema, path: str) -> Iterator[tuple[str, Schema]]:
    """(path, schema) of every field; items of a list are written `list[].field`."""
    for name, field in schema.get("properties", {}).items():
        here = f"{path}.{name}" if path else name
        yield here, field
        yield from _walk(field, here)
        if "properties" in field.get("items", {}):
            yield from _walk(field["items"], f"{here}[]")


def _type(schema: Schema) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value}`" if value != "" else "empty" for value in schema["enum"])
    if schema["type"] == "array":
        inner = schema["items"]
        return "list" if inner["type"] == "object" else f"list of {_type(inner)}"
    kind = "map" if "additionalProperties" in schema else str(schema["type"])
    return kind + _bounds(schema)


def _bounds(schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and high is not None and high < 2**53:
        return f", {low} to {high}"
    return f", {low} or more" if low is not None else ""


def _cell(schema: Schema) -> str:
    return str(schema.get("description", "")).replace("|", "\\|")


if __name__ == "__main__":
    DOCS_FILE.write_text(api_markdown(), encoding="utf-8")
    STATUS_FILE.write_text(status_markdown(), encoding="utf-8")

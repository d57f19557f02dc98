"""The spec: every field has a class and says what it does; the smallest spec and the examples are valid."""

from pathlib import Path
from typing import Any

import pytest
from finetune_api.fields import ApiModel, FieldClass, leaves
from finetune_api.spec import Artifact, FineTuneJobSpec
from finetune_api.validation import parse_spec, spec_problems, verdicts
from pydantic.fields import FieldInfo
from support.specs import GOOD_SPECS, REMOVED, Spec, changed, full_spec, minimal_spec

EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))
ON_A_LAPTOP = "laptop.yaml"
LEAVES = {".".join(path): (info, field_class) for path, info, field_class in leaves(FineTuneJobSpec)}

CLASSES = {
    "model.source": "train",
    "model.credentials.secretName": "run",
    "model.endpoint": "run",
    "model.dtype": "train",
    "model.trustRemoteCode": "train",
    "dataset.source": "train",
    "dataset.credentials.secretName": "run",
    "dataset.endpoint": "run",
    "dataset.format": "train",
    "dataset.evaluation.percent": "train",
    "dataset.evaluation.source": "train",
    "lora.rank": "train",
    "lora.alpha": "train",
    "lora.targetModules": "train",
    "quantization.scheme": "train",
    "quantization.groupSize": "train",
    "quantization.qatPercent": "train",
    "quantization.distill": "train",
    "quantization.acceptInexact": "train",
    "training.backend": "train",
    "training.epochs": "train",
    "training.batchSize": "train",
    "training.learningRate": "train",
    "training.maxLength": "train",
    "training.seed": "train",
    "training.checkpointEvery": "train",
    "quality.maxLossIncreasePercent": "run",
    "quality.onFailure": "run",
    "outputs.artifacts": "run",
    "outputs.destinations.uri": "run",
    "outputs.destinations.credentials.secretName": "run",
    "outputs.destinations.endpoint": "run",
    "outputs.destinations.private": "run",
    "resources.gpus": "run",
    "resources.gpuType": "run",
    "resources.nodes": "run",
    "resources.memory": "run",
    "resources.cpu": "run",
    "scheduling.nodeSelector": "run",
    "scheduling.tolerations.key": "run",
    "scheduling.tolerations.operator": "run",
    "scheduling.tolerations.value": "run",
    "scheduling.tolerations.effect": "run",
    "scheduling.priorityClassName": "run",
    "scheduling.runtimeClassName": "run",
    "scheduling.queueName": "run",
    "pod.image": "run",
    "pod.imagePullSecrets": "run",
    "pod.serviceAccountName": "run",
    "storage.cache.persistentVolumeClaim": "run",
    "storage.workspace.persistentVolumeClaim": "run",
    "storage.workspace.size": "run",
    "storage.workspace.storageClassName": "run",
    "storage.checkpoints.uri": "run",
    "storage.checkpoints.credentials.secretName": "run",
    "storage.checkpoints.endpoint": "run",
    "runPolicy.suspend": "live",
    "runPolicy.preflight": "run",
    "runPolicy.rerun": "run",
    "runPolicy.backoffLimit": "live",
    "runPolicy.activeDeadlineSeconds": "live",
    "runPolicy.ttlSecondsAfterFinished": "live",
}


def sections(model: type[ApiModel]) -> dict[str, FieldInfo]:
    return {info.alias or name: info for name, info in model.model_fields.items()}


def test_every_field_has_the_class_that_is_written_here() -> None:
    assert {path: field_class for path, (_, field_class) in LEAVES.items()} == {path: FieldClass(name) for path, name in CLASSES.items()}


@pytest.mark.parametrize("path", LEAVES)
def test_a_fields_description_is_sentences(path: str) -> None:
    description = LEAVES[path][0].description or ""
    assert description.endswith(".")
    assert description == description.strip()


@pytest.mark.parametrize("path", LEAVES)
def test_a_fields_description_says_its_default(path: str) -> None:
    info, _ = LEAVES[path]
    assert ("No default." if info.is_required() else "Default") in (info.description or "")


@pytest.mark.parametrize("section", sections(FineTuneJobSpec))
def test_a_sections_description_is_a_sentence(section: str) -> None:
    assert (sections(FineTuneJobSpec)[section].description or "").endswith(".")


def test_the_smallest_spec_is_a_model_a_dataset_and_a_destination() -> None:
    assert spec_problems(minimal_spec(), local=False) == []


@pytest.mark.parametrize("path", ["model", "model.source", "dataset", "dataset.source", "outputs", "outputs.destinations"])
def test_the_smallest_spec_has_nothing_to_spare(path: str) -> None:
    (problem,) = spec_problems(changed(minimal_spec(), path, REMOVED), local=False)
    assert problem.path == f"spec.{path}"


def test_the_full_spec_is_valid() -> None:
    assert spec_problems(full_spec(), local=False) == []


@pytest.mark.parametrize("spec", GOOD_SPECS.values(), ids=GOOD_SPECS.keys())
def test_a_spec_at_the_edge_of_a_rule_is_valid(spec: Spec) -> None:
    assert [str(problem) for problem in spec_problems(spec, local=False)] == []


def test_what_is_parsed_is_written_as_it_was() -> None:
    assert parse_spec(full_spec()).wire() == full_spec()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
    assert ON_A_LAPTOP in [path.name for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_valid_where_it_runs(path: Path) -> None:
    assert [str(problem) for problem in verdicts(path.read_text(), local=path.name == ON_A_LAPTOP)] == []


@pytest.mark.parametrize(
    ("quantization", "artifacts", "wanted"),
    [
        ({}, [], (Artifact.ADAPTER, Artifact.QUANTIZED)),
        ({"scheme": "none"}, [], (Artifact.ADAPTER,)),
        ({}, ["quantized"], (Artifact.QUANTIZED,)),
    ],
)
def test_the_artifacts_follow_the_scheme_unless_they_are_named(
    quantization: dict[str, Any], artifacts: list[str], wanted: tuple[Artifact, ...]
) -> None:
    spec = changed(changed(minimal_spec(), "quantization", quantization), "outputs.artifacts", artifacts)
    assert parse_spec(spec).wanted_artifacts == wanted

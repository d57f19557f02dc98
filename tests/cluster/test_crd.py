"""The CRD on a real API server: it takes the examples, refuses what the offline verdicts refuse, and names the field."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finetune_api.crd import CRD_FILE
from finetune_api.validation import spec_problems
from kubernetes import client, config
from support.bad_specs import BAD_SPECS, LAPTOP_ONLY, STRICTER_OFFLINE, BadSpec
from support.kubernetes import Cluster
from support.mutations import mutated
from support.specs import GOOD_SPECS, full_spec, job, minimal_spec

pytestmark = pytest.mark.cluster

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
ON_A_LAPTOP = "laptop.yaml"
SEEDS = range(400)

DryRun = Callable[[Any], str]


@pytest.fixture(scope="module", autouse=True)
def crd(kube: Cluster) -> None:
    kube.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(CRD_FILE))
    kube.kubectl("wait", "--for=condition=Established", "crd/finetunejobs.finetune.dev", "--timeout=30s")
    kube.wait("the API of the CRD", lambda: not kube.kubectl("get", "ftj", check=False).returncode)


@pytest.fixture(scope="module")
def dry_run(kube: Cluster) -> Iterator[DryRun]:
    """Asks the API server about a spec: what it says against it, or "" when it takes it."""
    with config.new_client_from_config(str(kube.kubeconfig)) as api:
        objects = client.CustomObjectsApi(api)

        def ask(spec: Any) -> str:
            try:
                objects.create_namespaced_custom_object(
                    "finetune.dev", "v1alpha1", "default", "finetunejobs", job(spec), dry_run="All", field_validation="Strict"
                )
            except client.ApiException as error:
                if error.status not in (400, 422):
                    raise
                return str(json.loads(error.body)["message"])
            return ""

        yield ask


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name != ON_A_LAPTOP], ids=lambda path: path.name)
def test_an_example_is_taken(kube: Cluster, path: Path) -> None:
    kube.kubectl("create", "-n", "default", "--dry-run=server", "-f", str(path))


def test_the_laptops_example_is_refused_with_a_sentence(kube: Cluster) -> None:
    (path,) = [path for path in EXAMPLES if path.name == ON_A_LAPTOP]
    refused = kube.kubectl("create", "-n", "default", "--dry-run=server", "-f", str(path), check=False)
    assert refused.returncode != 0
    assert "spec.outputs.destinations: file:// works only on a laptop; use s3:// or hf://" in refused.stderr


@pytest.mark.parametrize("spec", [minimal_spec(), full_spec(), *GOOD_SPECS.values()], ids=["minimal", "full", *GOOD_SPECS])
def test_a_good_spec_is_taken(dry_run: DryRun, spec: Any) -> None:
    assert dry_run(spec) == ""


@pytest.mark.parametrize("bad", BAD_SPECS.values(), ids=BAD_SPECS.keys())
def test_a_bad_spec_is_refused_by_the_fields_name(dry_run: DryRun, bad: BadSpec) -> None:
    message = dry_run(bad.spec)
    assert bad.path in message
    assert not bad.said_by_server or bad.sentence in message


@pytest.mark.parametrize("bad", STRICTER_OFFLINE.values(), ids=STRICTER_OFFLINE.keys())
def test_what_only_the_offline_verdict_refuses_is_taken(dry_run: DryRun, bad: BadSpec) -> None:
    assert dry_run(bad.spec) == ""


@pytest.mark.parametrize("bad", LAPTOP_ONLY.values(), ids=LAPTOP_ONLY.keys())
def test_a_file_is_refused(dry_run: DryRun, bad: BadSpec) -> None:
    message = dry_run(bad.spec)
    assert bad.path in message
    assert bad.sentence in message


def test_the_offline_verdict_is_the_servers(dry_run: DryRun) -> None:
    specs = [mutated(seed) for seed in SEEDS]
    judged = [([str(problem) for problem in spec_problems(spec, local=False)], dry_run(spec), spec) for spec in specs]
    assert len(SEEDS) / 4 < sum(not offline for offline, _, _ in judged) < len(SEEDS) * 3 / 4  # or they would agree about little
    assert [verdict for verdict in judged if bool(verdict[0]) != bool(verdict[1])] == []


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("ftj.spec", "What a user writes under"),
        ("ftj.spec.quantization", "Percent of the optimizer steps, the last ones, that train with rounded weights"),
        ("ftj.spec.training.learningRate", "Peak learning rate, as a string."),
        ("ftj.status.conditions", "A sentence a person can act on."),
    ],
)
def test_kubectl_explain_says_what_a_field_does(kube: Cluster, path: str, sentence: str) -> None:
    explained = kube.wait(path, lambda: kube.kubectl("explain", path, check=False).stdout)
    assert sentence in " ".join(explained.split())


def test_a_job_is_listed_by_its_short_name_and_its_category(kube: Cluster, namespace: str) -> None:
    kube.kubectl("create", "-n", namespace, "-f", "-", input=json.dumps(job(minimal_spec(), name="listed")))
    for word in ("ftj", "finetune", "all"):
        listed = kube.kubectl("get", word, "-n", namespace).stdout
        assert listed.split()[:5] == ["NAME", "PHASE", "STAGE", "PROGRESS", "LOSS"]
        assert "listed" in listed

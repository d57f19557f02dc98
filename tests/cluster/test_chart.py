"""The Helm chart: what it renders, what it refuses, and that the API server lets the operator do no more than it must."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_operator.settings import Settings
from support.kubernetes import Cluster

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "finetune-operator"
CRD = ROOT / "crds" / "finetunejobs.finetune.dev.yaml"

Manifest = dict[str, Any]


def render(kube: Cluster, *options: str) -> list[Manifest]:
    text = kube.helm("template", "ft", str(CHART), "--namespace", "finetune-system", *options).stdout
    manifests = [item for item in yaml.safe_load_all(text) if item]
    assert len(manifests) >= 4
    return manifests


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [item for item in manifests if item["kind"] == kind]


def test_the_chart_passes_helms_lint(kube: Cluster) -> None:
    kube.helm("lint", "--strict", str(CHART))


def test_the_charts_crd_is_the_generated_one_and_survives_an_uninstall(kube: Cluster) -> None:
    (rendered,) = of_kind(render(kube), "CustomResourceDefinition")
    assert rendered["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert rendered == yaml.safe_load(CRD.read_text())


def test_the_crd_can_be_left_to_someone_else(kube: Cluster) -> None:
    assert not of_kind(render(kube, "--set", "crds.install=false"), "CustomResourceDefinition")


def test_the_lease_is_all_that_the_operator_may_write_in_its_own_namespace(kube: Cluster) -> None:
    (role,) = of_kind(render(kube), "Role")
    assert [(rule["resources"], rule["verbs"]) for rule in role["rules"]] == [(["leases"], ["get", "create", "update"])]


@pytest.mark.parametrize("options", [(), ("--set", "namespaces={ml,research}")])
def test_no_rule_names_secrets_or_a_wildcard(kube: Cluster, options: tuple[str, ...]) -> None:
    manifests = render(kube, *options)
    rules = [rule for kind in ("ClusterRole", "Role") for role in of_kind(manifests, kind) for rule in role["rules"]]
    assert rules
    for rule in rules:
        assert "secrets" not in rule["resources"]
        assert "*" not in rule["resources"] + rule["verbs"] + rule["apiGroups"]


def test_a_list_of_namespaces_needs_no_cluster_role(kube: Cluster) -> None:
    manifests = render(kube, "--set", "namespaces={ml,research}")
    assert not of_kind(manifests, "ClusterRole") + of_kind(manifests, "ClusterRoleBinding")
    for kind in ("Role", "RoleBinding"):
        assert [item["metadata"]["namespace"] for item in of_kind(manifests, kind)] == ["finetune-system", "ml", "research"]


def test_the_operators_pod_is_admitted_under_the_restricted_standard(kube: Cluster, namespace: str) -> None:
    (deployment,) = of_kind(render(kube), "Deployment")
    template = deployment["spec"]["template"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "operator"},
        "spec": template["spec"] | {"serviceAccountName": "default"},
    }
    kube.kubectl("create", "-n", namespace, "--dry-run=server", "-f", "-", input=yaml.safe_dump(pod))
    assert template["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_each_probe_asks_a_port_that_the_container_has(kube: Cluster) -> None:
    (deployment,) = of_kind(render(kube), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    asked = {probe: container[probe]["httpGet"] for probe in ("livenessProbe", "readinessProbe")}
    assert asked == {"livenessProbe": {"path": "/healthz", "port": "health"}, "readinessProbe": {"path": "/readyz", "port": "health"}}
    assert container["ports"] == [{"name": "health", "containerPort": Settings().health_port}]


def test_nothing_of_the_prometheus_operators_is_made_unless_it_is_asked_for(kube: Cluster) -> None:
    assert not of_kind(render(kube), "PodMonitor")


def test_a_pod_monitor_finds_the_operators_pods_and_is_found_by_its_labels(kube: Cluster) -> None:
    manifests = render(kube, "--set", "podMonitor.enabled=true", "--set", "podMonitor.labels.release=prometheus")
    (monitor,), (deployment,) = of_kind(manifests, "PodMonitor"), of_kind(manifests, "Deployment")
    template = deployment["spec"]["template"]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["metadata"]["namespace"] == deployment["metadata"]["namespace"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    ports = {port["name"] for port in template["spec"]["containers"][0]["ports"]}
    assert [(item["path"], item["port"] in ports) for item in monitor["spec"]["podMetricsEndpoints"]] == [("/metrics", True)]


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("resyncSeconds=0", "resyncSeconds"),
        ("namespaces=ml", "namespaces"),
        ("trainer.imge=x", "imge"),
        ("logLevel=LOUD", "logLevel"),
        ("podMonitor.enabled=1", "podMonitor"),
    ],
)
def test_a_wrong_value_is_refused_by_name(kube: Cluster, option: str, named: str) -> None:
    refused = kube.helm("template", "ft", str(CHART), "--set", option, check=False)
    assert refused.returncode != 0
    assert named in refused.stderr

"""The Helm chart: what it renders, what it refuses, and that the API server lets the operator do no more than it must."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from finetune_api import names
from finetune_operator.permissions import JOBS, LEASE, LEASE_NAME, build_rules
from finetune_operator.settings import Settings
from support.chart import CHART, set_json, settings_in
from support.kubernetes import Cluster
from support.network_policy import Peer, lets_in, lets_out, selects
from support.operator_process import install_crd

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
CRD = ROOT / "crds" / "finetunejobs.finetune.dev.yaml"

Manifest = dict[str, Any]


def render(kube: Cluster, *options: str) -> list[Manifest]:
    text = kube.helm("template", "ft", str(CHART), "--namespace", "finetune-system", *options).stdout
    manifests = [item for item in yaml.safe_load_all(text) if item]
    assert len(manifests) >= 4
    return manifests


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [item for item in manifests if item["kind"] == kind]


def operators_container(kube: Cluster, *options: str) -> Manifest:
    (deployment,) = of_kind(render(kube, *options), "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(container)


def settings_of(kube: Cluster, *options: str) -> Settings:
    """What the operator reads of the chart's values."""
    given = {name.lower(): value for name, value in settings_in(operators_container(kube, *options)).items()}
    plain = {"trainer_image", "trainer_image_pull_policy", "trainer_ca_config_map", "trainer_ca_key", "lease_name", "log_level"}
    return Settings(**{name: value if name in plain else json.loads(value) for name, value in given.items()})


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
    allowed = {(verb, *rule.get("resourceNames", ())) for rule in role["rules"] for verb in rule["verbs"]}
    assert allowed == {("get", "ft"), ("update", "ft"), ("create",)}
    assert role["rules"] == json.loads(json.dumps(build_rules(LEASE)).replace(LEASE_NAME, "ft"))


@pytest.mark.parametrize(("kind", "options"), [("ClusterRole", ()), ("Role", ("--set", "namespaces={ml}"))])
def test_what_jobs_need_is_what_the_table_says(kube: Cluster, kind: str, options: tuple[str, ...]) -> None:
    (role,) = [item for item in of_kind(render(kube, *options), kind) if item["metadata"]["name"] == "ft"]
    assert role["rules"] == build_rules(JOBS)


def test_a_list_of_namespaces_needs_no_cluster_role(kube: Cluster) -> None:
    manifests = render(kube, "--set", "namespaces={ml,research}")
    assert not of_kind(manifests, "ClusterRole") + of_kind(manifests, "ClusterRoleBinding")
    for kind in ("Role", "RoleBinding"):
        assert [item["metadata"]["namespace"] for item in of_kind(manifests, kind)] == ["finetune-system", "ml", "research"]


def test_users_get_no_rights_unless_the_administrator_wants_it(kube: Cluster) -> None:
    assert [item["metadata"]["name"] for item in of_kind(render(kube), "ClusterRole")] == ["ft"]


@pytest.fixture
def user_roles(kube: Cluster) -> Iterator[None]:
    """The chart's roles for users, on the cluster."""
    install_crd(kube)
    options = ("--set", "rbac.userRoles=true", "--set", "namespaces={ml}")
    roles = yaml.safe_dump_all(of_kind(render(kube, *options), "ClusterRole"))
    kube.kubectl("apply", "-f", "-", input=roles)
    yield
    kube.kubectl("delete", "-f", "-", input=roles)


@pytest.mark.parametrize(("role", "verbs"), [("view", "get list watch"), ("edit", "get list watch create update patch delete")])
@pytest.mark.usefixtures("user_roles")
def test_kubernetes_own_roles_reach_finetunejobs_where_the_administrator_wants_it(
    kube: Cluster, namespace: str, role: str, verbs: str
) -> None:
    kube.kubectl("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}", "-n", namespace)

    def allowed(*options: str) -> str:
        can_i = ("auth", "can-i", "-n", namespace, f"--as={role}", *options)
        tried = ("get", "list", "watch", "create", "update", "patch", "delete")
        return " ".join(verb for verb in tried if kube.kubectl(*can_i, verb, "finetunejobs", check=False).stdout.strip() == "yes")

    kube.wait(f"{role} reaches FineTuneJobs", lambda: allowed() == verbs, 30)
    assert allowed("--subresource=status") == ""


@pytest.fixture
def releases(kube: Cluster, make_namespace: Callable[[str], str]) -> Iterator[Callable[..., str]]:
    """Installs a release of this name in a namespace of its own and returns what helm said against it; nothing waits for its pod."""
    installed: list[tuple[str, str]] = []

    def install_one(name: str, *options: str) -> str:
        installed.append((name, make_namespace(name)))
        done = kube.helm("install", name, str(CHART), "-n", installed[-1][1], *options, check=False)
        return "" if done.returncode == 0 else done.stderr

    yield install_one
    for name, system in installed:
        kube.helm("uninstall", name, "-n", system, check=False)


def test_another_release_leaves_the_crd_alone_or_takes_it_over(kube: Cluster, releases: Callable[..., str]) -> None:
    install_crd(kube)
    assert releases("first", "--take-ownership") == ""
    assert "invalid ownership metadata" in releases("second")
    assert releases("third", "--set", "crds.install=false") == ""
    assert releases("fourth", "--take-ownership") == ""
    owner = kube.get("crd", "finetunejobs.finetune.dev")["metadata"]["annotations"]["meta.helm.sh/release-name"]
    assert owner == "fourth"


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


def policy_of(kube: Cluster, *options: str) -> Manifest:
    (policy,) = of_kind(render(kube, *options), "NetworkPolicy")
    return policy


ML = {"kubernetes.io/metadata.name": "ml"}
OTHER = {"kubernetes.io/metadata.name": "other"}
API_SERVER = Peer("10.89.0.2")


def trainer(namespace: dict[str, str]) -> Peer:
    return Peer("10.88.0.9", {names.LABEL_JOB: "any", "app.kubernetes.io/name": "finetune-trainer"}, namespace)


@pytest.mark.parametrize(
    "options", [(), ("--set", "namespaces={ml,research}"), ("--set", "networkPolicy.apiServer.cidrs={10.89.0.2/32,fd00::1/128}")]
)
def test_the_api_server_takes_the_network_policy(kube: Cluster, namespace: str, options: tuple[str, ...]) -> None:
    policy = policy_of(kube, *options)
    policy["metadata"]["namespace"] = namespace
    kube.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", input=yaml.safe_dump(policy))


# The test cluster's network plugin enforces no policy, so that its rules are evaluated here.
def test_the_network_policy_is_about_the_operators_pod_and_lets_in_the_health_port_alone(kube: Cluster) -> None:
    manifests = render(kube)
    (policy,), (deployment,) = of_kind(manifests, "NetworkPolicy"), of_kind(manifests, "Deployment")
    template = deployment["spec"]["template"]
    assert policy["metadata"]["namespace"] == deployment["metadata"]["namespace"]
    assert selects(policy["spec"]["podSelector"], template["metadata"]["labels"])
    assert not selects(policy["spec"]["podSelector"], trainer(ML).pod or {})
    (container,) = template["spec"]["containers"]
    assert lets_in(policy, API_SERVER, container, container["ports"][0]["containerPort"])
    assert not lets_in(policy, API_SERVER, container, 9000)


@pytest.mark.parametrize(
    ("peer", "port", "protocol"),
    [
        (Peer("10.96.0.10", {"k8s-app": "kube-dns"}, {}), 53, "UDP"),
        (Peer("10.96.0.10", {"k8s-app": "kube-dns"}, {}), 53, "TCP"),
        (API_SERVER, 6443, "TCP"),
        (Peer("10.96.0.1"), 443, "TCP"),
        (trainer(ML), names.PROGRESS_PORT, "TCP"),
    ],
)
def test_what_the_operator_needs_is_let_out(kube: Cluster, peer: Peer, port: int, protocol: str) -> None:
    for options in ((), ("--set", "namespaces={ml}")):
        assert lets_out(policy_of(kube, *options), peer, port, protocol)


@pytest.mark.parametrize(
    ("peer", "port"),
    [
        (trainer(ML), 22),
        (trainer(OTHER), names.PROGRESS_PORT),
        (Peer("10.88.0.8", {"app": "database"}, ML), names.PROGRESS_PORT),
        (Peer("169.254.169.254"), 80),
        (Peer("203.0.113.5"), names.PROGRESS_PORT),
        (Peer("203.0.113.5"), 443),
    ],
)
def test_nothing_else_is_let_out(kube: Cluster, peer: Peer, port: int) -> None:
    policy = policy_of(kube, "--set", "namespaces={ml}", "--set", "networkPolicy.apiServer.cidrs={10.89.0.2/32}")
    assert not lets_out(policy, peer, port)
    assert lets_out(policy, API_SERVER, 6443)


def trainers_policy() -> Manifest:
    """The one that docs/security.md recommends."""
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "security.md").read_text(encoding="utf-8"), re.DOTALL)
    return dict(yaml.safe_load(text))


def test_the_policy_for_trainers_in_the_docs_is_taken_and_selects_them(kube: Cluster, namespace: str) -> None:
    policy = trainers_policy()
    policy["metadata"]["namespace"] = namespace
    kube.kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", input=yaml.safe_dump(policy))
    (deployment,) = of_kind(render(kube), "Deployment")
    pod = Peer("10.88.0.7", deployment["spec"]["template"]["metadata"]["labels"], {"kubernetes.io/metadata.name": "finetune-system"})
    container = {"ports": [{"name": "progress", "containerPort": names.PROGRESS_PORT}]}
    assert selects(policy["spec"]["podSelector"], trainer(ML).pod or {})
    assert lets_in(policy, pod, container, names.PROGRESS_PORT)
    assert not lets_in(policy, trainer(ML), container, names.PROGRESS_PORT)


@pytest.mark.parametrize(
    ("address", "is_reached"),
    [
        ("203.0.113.5", True),
        ("2001:db8::5", True),
        ("10.96.0.1", False),
        ("172.20.0.1", False),
        ("192.168.3.4", False),
        ("100.64.0.9", False),
        ("169.254.169.254", False),
        ("fd00:ec2::254", False),
        ("fe80::1", False),
    ],
)
def test_the_policy_for_trainers_in_the_docs_lets_them_out_of_the_cluster_and_to_no_private_network(address: str, is_reached: bool) -> None:
    assert lets_out(trainers_policy(), Peer(address), 443) is is_reached


def test_the_network_policy_can_be_left_out(kube: Cluster) -> None:
    assert not of_kind(render(kube, "--set", "networkPolicy.enabled=false"), "NetworkPolicy")


DIGEST = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ((), f":{yaml.safe_load((CHART / 'Chart.yaml').read_text())['appVersion']}"),
        (("tag=2.0.0",), ":2.0.0"),
        (("tag=2.0.0", f"digest={DIGEST}"), f"@{DIGEST}"),
    ],
)
def test_both_images_follow_the_charts_version_unless_a_tag_or_a_digest_is_given(
    kube: Cluster, options: tuple[str, ...], ending: str
) -> None:
    words = [word for image in ("image", "trainer.image") for option in options for word in ("--set", f"{image}.{option}")]
    assert operators_container(kube, *words)["image"] == f"finetune-operator{ending}"
    assert settings_of(kube, *words).trainer_image == f"finetune-trainer{ending}"


def test_what_is_set_for_the_trainers_reaches_the_operator(kube: Cluster) -> None:
    values = {
        "image": {"repository": "registry.example.com/trainer", "tag": "1", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry-key"}],
        "env": {"HF_ENDPOINT": "https://hub.example.com"},
        "podLabels": {"sidecar.istio.io/inject": "false"},
        "podAnnotations": {"karpenter.sh/do-not-disrupt": "true"},
        "gpuRuntimeClasses": ["gpu"],
        "caBundle": {"configMap": "company-ca", "key": "bundle.pem"},
    }
    settings = settings_of(kube, *set_json({"trainer": values}))
    assert (settings.trainer_image, settings.trainer_image_pull_policy) == ("registry.example.com/trainer:1", "Always")
    assert settings.trainer_image_pull_secrets == ("registry-key",)
    assert settings.trainer_env == values["env"]
    assert (settings.trainer_pod_labels, settings.trainer_pod_annotations) == (values["podLabels"], values["podAnnotations"])
    assert settings.gpu_runtime_classes == ("gpu",)
    assert (settings.trainer_ca_config_map, settings.trainer_ca_key) == ("company-ca", "bundle.pem")


def test_a_dollar_sign_reaches_the_operator_as_it_was_set(kube: Cluster) -> None:
    text = "a$$b $c $(FINETUNE_OPERATOR_LEASE_NAME)"
    values = {"trainer": {"env": {"A": text}, "podAnnotations": {"a": text}, "gpuRuntimeClasses": [text]}}
    settings = settings_of(kube, *set_json(values | {"allowedImages": [text], "allowedServiceAccounts": [text]}))
    assert (settings.trainer_env, settings.trainer_pod_annotations) == ({"A": text}, {"a": text})
    assert settings.gpu_runtime_classes == settings.allowed_images == settings.allowed_service_accounts == (text,)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("resyncSeconds=0", "resyncSeconds"),
        ("namespaces=ml", "namespaces"),
        ("namespaces={ml,ml}", "namespaces"),
        ("trainer.imge=x", "imge"),
        ("trainer.image=x", "image"),
        ("image.digest=latest", "digest"),
        ("trainer.image.digest=0000", "digest"),
        ("trainer.imagePullSecrets={registry-key}", "imagePullSecrets"),
        ("trainer.podLabels.a=b c", "podLabels"),
        ("logLevel=LOUD", "logLevel"),
        ("podMonitor.enabled=1", "podMonitor"),
        ("networkPolicy.apiServer.cidrs={api.example.com}", "cidrs"),
    ],
)
def test_a_wrong_value_is_refused_by_name(kube: Cluster, option: str, named: str) -> None:
    refused = kube.helm("template", "ft", str(CHART), "--set", option, check=False)
    assert refused.returncode != 0
    assert named in refused.stderr

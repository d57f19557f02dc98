"""The chart's access with the operator of this checkout: its service account, its roles, its settings; the process runs outside of the cluster.

What tests/e2e installs is the same with the image; this needs no image, and starts in two seconds.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.audit import Request, requests_of
from support.kubernetes import Cluster
from support.operator_process import ACTOR, OperatorProcess

CHART = Path(__file__).parents[2] / "charts" / "finetune-operator"
RELEASE = "ft"
PREFIX = "FINETUNE_OPERATOR_"

Values = dict[str, Any]


@dataclass(frozen=True)
class InstalledChart:
    """A release without its Deployment, and the operator in the Deployment's place.

    Attributes:
        system: the release's namespace.
    """

    kube: Cluster
    system: str
    operator: OperatorProcess

    @property
    def user(self) -> str:
        """Who the operator is to the API server."""
        return f"system:serviceaccount:{self.system}:{RELEASE}"

    def requests(self) -> list[Request]:
        """Everything that the operator asked for."""
        return requests_of(self.kube, self.system, RELEASE)


def set_json(values: Values) -> list[str]:
    """Chart values as helm's options."""
    return [word for key, value in values.items() for word in ("--set-json", f"{key}={json.dumps(value)}")]


def install(kube: Cluster, system: str, folder: Path, values: Values) -> InstalledChart:
    """Applies everything of the chart but CRD and Deployment, and prepares the operator to run as its service account."""
    repository, _, tag = ACTOR.partition(":")
    values = {"trainer": {"image": {"repository": repository, "tag": tag}}, "resyncSeconds": 5, "crds": {"install": False}, **values}
    text = kube.helm("template", RELEASE, str(CHART), "-n", system, *set_json(values)).stdout
    manifests = [item for item in yaml.safe_load_all(text) if item]
    (deployment,) = [item for item in manifests if item["kind"] == "Deployment"]
    manifests.remove(deployment)
    kube.kubectl("apply", "-f", "-", input=yaml.safe_dump_all(manifests))
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    # The one variable that is a reference is the pod's namespace.
    settings = {item["name"].removeprefix(PREFIX): system for item in container["env"]} | settings_in(container)
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    operator = OperatorProcess(kube, folder / "log", kubeconfig=kubeconfig_of(kube, system, account, folder), **settings)
    return InstalledChart(kube, system, operator)


def settings_in(container: Values) -> dict[str, str]:
    """The operator's settings in its container's environment, as the kubelet passes the plain values on: $$ is a $, $(NAME) another variable."""
    plain = {item["name"]: item["value"] for item in container["env"] if "value" in item}

    def put_in(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else plain.get(found[1], found[0])

    return {name.removeprefix(PREFIX): re.sub(r"\$(?:\$|\(([^)]*)\))", put_in, value) for name, value in plain.items()}


def kubeconfig_of(kube: Cluster, namespace: str, account: str, folder: Path) -> Path:
    """A kubeconfig of a service account, with a token of an hour."""
    token = kube.kubectl("create", "token", account, "-n", namespace, "--duration=1h").stdout.strip()
    config = yaml.safe_load(kube.kubeconfig.read_text())
    config["users"][0]["user"] = {"token": token}
    path = folder / "kubeconfig"
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(config))
    return path


def uninstall(kube: Cluster) -> None:
    """Takes the cluster-wide part away; the rest goes with its namespaces."""
    kube.kubectl("delete", "clusterrole,clusterrolebinding", RELEASE, "--ignore-not-found")

"""The test cluster itself: that its node really runs containers, under the rules that the other tests rely on."""

import json
from pathlib import Path

import pytest
from support.kubernetes import BIN, Cluster

pytestmark = pytest.mark.cluster


def pause_pod(**security: object) -> str:
    container = {"name": "pause", "image": "localhost/pause:1", "imagePullPolicy": "Never", "securityContext": security}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pause"}, "spec": {"containers": [container]}})


RESTRICTED = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def test_a_restricted_pod_really_runs(kube: Cluster, namespace: str) -> None:
    kube.kubectl("apply", "-n", namespace, "-f", "-", input=pause_pod(**RESTRICTED))
    kube.kubectl("wait", "-n", namespace, "pod/pause", "--for=condition=Ready", "--timeout=30s")


def test_a_pod_that_may_be_root_is_refused(kube: Cluster, namespace: str) -> None:
    refused = kube.kubectl("apply", "-n", namespace, "-f", "-", input=pause_pod(), check=False)
    assert refused.returncode != 0
    assert 'violates PodSecurity "restricted' in refused.stderr


def test_the_node_offers_gpus_to_the_scheduler(kube: Cluster) -> None:
    assert kube.get("node", "node1")["status"]["allocatable"]["nvidia.com/gpu"] == "4"


def test_the_programs_are_where_the_tests_look(kube: Cluster) -> None:
    assert Path(BIN / "helm").exists()
    assert kube.helm("version", "--short").stdout.startswith("v4.")

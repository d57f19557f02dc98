"""Fixtures that several test folders share: the real Kubernetes, namespaces in it, and the rule for machines that can't run it.

Property tests have no deadline: the machine may be busy with a cluster.
"""

import os
import secrets
from collections.abc import Callable, Iterator

import pytest
from support.kubernetes import Cluster, running_cluster, what_is_missing
from support.kwok import running_kwok
from support.s3_server import S3Server, running_s3


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("hypothesispytest"):  # the unsloth environment has none, and runs no property tests
        from hypothesis import settings

        settings.register_profile("patient", settings.get_profile(settings.get_current_profile_name()), deadline=None)
        settings.load_profile("patient")


def require_cluster(missing: str | None) -> None:
    """Leaves a test out on a machine that can't run the cluster; under CI=true that is a failure."""
    if missing and os.environ.get("CI") == "true":
        pytest.fail(missing, pytrace=False)
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="session")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A whole one-node Kubernetes."""
    require_cluster(what_is_missing())
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def fake_kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Kubernetes whose node is fake: kwok plays the pods. It runs beside the one with a real node."""
    require_cluster(what_is_missing(node=False))
    folder = tmp_path_factory.mktemp("fake-cluster")
    with running_cluster(folder, 1, node=False) as cluster, running_kwok(cluster, folder):
        yield cluster


@pytest.fixture(scope="session")
def make_namespace(kube: Cluster) -> Iterator[Callable[[str], str]]:
    """Makes a fresh namespace under the restricted Pod Security Standard, ready for pods, and returns its name."""
    made: list[str] = []

    def make(stem: str = "test") -> str:
        name = f"{stem}-{secrets.token_hex(4)}"
        made.append(name)
        kube.kubectl("create", "namespace", name)
        kube.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
        kube.wait(f"the default service account of {name}", lambda: kube.get("serviceaccount", "default", "-n", name))
        return name

    yield make
    for name in made:
        remove_namespace(kube, name)


@pytest.fixture
def namespace(kube: Cluster, make_namespace: Callable[[str], str]) -> Iterator[str]:
    """A fresh namespace of this test alone; what runs in it ends with the test, since the node has two cores for all of them."""
    name = make_namespace("test")
    yield name
    remove_namespace(kube, name)


def remove_namespace(kube: Cluster, name: str) -> None:
    """Begins to delete a namespace and everything in it."""
    kube.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@pytest.fixture(scope="session")
def s3(kube: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server that pods of the cluster reach."""
    with running_s3(tmp_path_factory.mktemp("s3"), address=kube.host) as server:
        yield server

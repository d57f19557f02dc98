"""Whatever a good spec says, its Job stays in its namespace and within its pod: checked on hundreds of specs, not on examples."""

from collections.abc import Iterator
from typing import Any

import pytest
from finetune_api.validation import spec_problems
from finetune_operator.desired import build_job
from finetune_operator.settings import Settings
from finetune_operator.subject import Json, read_subject
from support.mutations import mutated
from support.simulated_cluster import SETTINGS, build_finetunejob

SPECS = [spec for seed in range(1000) if not spec_problems(spec := mutated(seed), local=False)]
VOLUMES = {"emptyDir", "persistentVolumeClaim", "ephemeral", "configMap", "secret"}
# Every field of a pod that the operator ever writes; hostPID, hostNetwork, hostIPC, initContainers and others are not among them.
POD = {
    *("restartPolicy", "automountServiceAccountToken", "enableServiceLinks", "terminationGracePeriodSeconds", "securityContext"),
    *("containers", "volumes", "nodeSelector", "tolerations", "priorityClassName", "runtimeClassName"),
    *("imagePullSecrets", "serviceAccountName"),
}
CONTAINER = {
    *("name", "image", "imagePullPolicy", "args", "env", "ports", "resources", "securityContext"),
    *("terminationMessagePath", "terminationMessagePolicy", "volumeMounts"),
}


@pytest.fixture(scope="module")
def jobs() -> list[Json]:
    """The Jobs of all good specs."""
    built = [build_job(read_subject(build_finetunejob({}) | {"spec": spec}), SETTINGS) for spec in SPECS]
    assert len(built) >= 200
    return built


def pods(jobs: list[Json]) -> Iterator[Json]:
    return (job["spec"]["template"]["spec"] for job in jobs)


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from keys_of(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from keys_of(inner)


def test_a_job_lies_in_the_namespace_of_its_finetunejob_and_its_pod_names_no_namespace(jobs: list[Json]) -> None:
    wanted = build_finetunejob({})["metadata"]["namespace"]
    for job in jobs:
        assert job["metadata"]["namespace"] == wanted
        assert "namespace" not in set(keys_of(job["spec"]))


def test_a_pod_mounts_nothing_of_the_host(jobs: list[Json]) -> None:
    for pod in pods(jobs):
        kinds = {kind for volume in pod["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= VOLUMES
        assert "hostPath" not in set(keys_of(pod))


def test_a_pod_has_no_field_beyond_the_known_ones(jobs: list[Json]) -> None:
    for pod in pods(jobs):
        (container,) = pod["containers"]
        assert pod.keys() <= POD
        assert container.keys() <= CONTAINER


def test_a_pod_has_no_credentials_of_the_cluster_and_no_rights_on_the_node(jobs: list[Json]) -> None:
    for pod in pods(jobs):
        (container,) = pod["containers"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_no_value_of_a_secret_is_in_a_job_only_names_of_keys(jobs: list[Json]) -> None:
    for pod in pods(jobs):
        (container,) = pod["containers"]
        assert "envFrom" not in container
        assert all(item.keys() == {"name", "value"} for item in container["env"])
        for volume in pod["volumes"]:
            assert "secret" not in volume or volume["secret"].keys() == {"secretName", "optional", "defaultMode", "items"}


@pytest.mark.parametrize(
    ("pattern", "image", "allowed"),
    [
        ("registry.example.com/acme/*", "registry.example.com/acme/trainer:2", True),
        ("registry.example.com/acme/*", "registry.example.com/acme/team/trainer@sha256:0", True),
        ("registry.example.com/acme/*", "registry.example.com.evil.example/acme/trainer", False),
        ("registry.example.com/acme/*", "evil.example/registry.example.com/acme/trainer", False),
        ("registry.example.com/acme/*", "Registry.example.com/acme/trainer", False),
        ("", "evil.example/x", False),
    ],
)
def test_a_pattern_allows_whole_names_only(pattern: str, image: str, allowed: bool) -> None:
    assert Settings(allowed_images=(pattern,)).allows_image(image) is allowed


def test_an_empty_list_allows_the_default_image_and_no_service_account() -> None:
    settings = Settings()
    assert settings.allows_image("")
    assert settings.allows_image(settings.trainer_image)
    assert not settings.allows_image("x")
    assert settings.allows_service_account("")
    assert not settings.allows_service_account("default")

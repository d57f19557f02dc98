"""The training pod's volumes and mounts: writable places under the read-only root, credentials, claims and ConfigMaps. Pure; used by desired.py."""

from collections.abc import Iterator
from typing import Any

from finetune_api import credentials, names
from finetune_api.spec import FineTuneJobSpec, WorkspaceSpec

Json = dict[str, Any]

_CA_DIR, _CA_NAME = "/var/run/finetune/ca", "ca.crt"
CA_FILE = f"{_CA_DIR}/{_CA_NAME}"


def build_volumes(spec: FineTuneJobSpec, job_name: str, train_digest: str) -> tuple[list[Json], list[Json]]:
    """(volumes, mounts) of the trainer's pod.

    Args:
        job_name: name of the FineTuneJob; with the digest it makes a folder of its own in a shared workspace claim.
    """
    claims = _Claims()
    volumes, mounts = _scratch()
    for volume, mount in (
        _workspace(spec.storage.workspace, f"{job_name}/{train_digest[:16]}", claims),
        _cache(spec.storage.cache.persistent_volume_claim, claims),
        *_sources(spec, claims),
        *_credentials(spec),
    ):
        volumes += [volume] if volume else []
        mounts.append(mount)
    return volumes + claims.volumes, mounts


def build_ca_bundle(config_map: str, key: str) -> tuple[Json, Json]:
    """(volume, mount) of the CAs that the trainer trusts, as CA_FILE.

    Not optional: clients that are told of a file that is not there say that a server can't be reached, while the kubelet waits for the ConfigMap and names it.
    """
    source = {"name": config_map, "defaultMode": 0o444, "items": [{"key": key, "path": _CA_NAME}]}
    return {"name": "ca-bundle", "configMap": source}, {"name": "ca-bundle", "mountPath": _CA_DIR, "readOnly": True}


def mounts_a_claim(spec: FineTuneJobSpec) -> bool:
    """Whether the trainer's pod mounts a claim, be it one of its own: only some nodes can mount its volume."""
    volumes, _ = build_volumes(spec, "", "")
    return any(volume.keys() & {"persistentVolumeClaim", "ephemeral"} for volume in volumes)


class _Claims:
    """Gives each claim one volume, however many mounts it has: a kubelet mounts a claim once in a pod."""

    def __init__(self) -> None:
        self._volumes: dict[str, Json] = {}

    def volume_name(self, claim: str) -> str:
        volume = {"name": f"claim-{len(self._volumes)}", "persistentVolumeClaim": {"claimName": claim}}
        return str(self._volumes.setdefault(claim, volume)["name"])

    @property
    def volumes(self) -> list[Json]:
        return list(self._volumes.values())


_Pair = tuple[Json | None, Json]


def _scratch() -> tuple[list[Json], list[Json]]:
    # /dev/shm lies in memory and counts as the pod's: its memory limit bounds it.
    places: dict[str, tuple[str, Json]] = {
        "home": (names.HOME_DIR, {}),
        "tmp": ("/tmp", {}),  # noqa: S108 a volume of the pod's own
        "shm": ("/dev/shm", {"medium": "Memory"}),  # noqa: S108
    }
    volumes: list[Json] = [{"name": name, "emptyDir": source} for name, (_, source) in places.items()]
    return volumes, [{"name": name, "mountPath": path} for name, (path, _) in places.items()]


def _workspace(workspace: WorkspaceSpec, folder: str, claims: _Claims) -> _Pair:
    if workspace.persistent_volume_claim:
        # Two jobs in one claim never meet; a new run of the same training finds what the last one left.
        return None, {"name": claims.volume_name(workspace.persistent_volume_claim), "mountPath": names.WORKDIR, "subPath": folder}
    mount = {"name": "workspace", "mountPath": names.WORKDIR}
    if workspace.storage_class_name:
        request = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": workspace.storage_class_name,
            "resources": {"requests": {"storage": workspace.size}},
        }
        return {"name": "workspace", "ephemeral": {"volumeClaimTemplate": {"spec": request}}}, mount
    return {"name": "workspace", "emptyDir": {"sizeLimit": workspace.size}}, mount


def _cache(claim: str, claims: _Claims) -> _Pair:
    if claim:
        return None, {"name": claims.volume_name(claim), "mountPath": names.CACHE_DIR}
    return {"name": "cache", "emptyDir": {}}, {"name": "cache", "mountPath": names.CACHE_DIR}


def _sources(spec: FineTuneJobSpec, claims: _Claims) -> Iterator[_Pair]:
    sources = {"model": spec.model.source, "dataset": spec.dataset.source, "evaluation": spec.dataset.evaluation.source}
    for role, uri in sources.items():
        scheme, _, rest = uri.partition("://")
        mount = {"mountPath": f"{names.VOLUMES_ROOT}/{role}", "readOnly": True}
        if scheme == "pvc":
            yield None, {"name": claims.volume_name(rest.partition("/")[0]), **mount}
        elif scheme == "configmap":
            # Optional, so that the trainer can name a missing one itself instead of a pod that never starts.
            source = {"name": rest.partition("/")[0], "optional": True, "defaultMode": 0o440}
            yield {"name": f"source-{role}", "configMap": source}, {"name": f"source-{role}", **mount}


def _credentials(spec: FineTuneJobSpec) -> Iterator[_Pair]:
    # With `optional`, the kubelet skips a missing Secret and missing keys alike; keys that are not listed never reach the pod.
    items = [{"key": key, "path": key} for key in credentials.ACCEPTED_KEYS]
    for role, secret in credentials.secrets_by_role(spec):
        name = f"credentials-{role}"
        source = {"secretName": secret, "optional": True, "defaultMode": 0o440, "items": items}
        yield {"name": name, "secret": source}, {"name": name, "mountPath": f"{credentials.MOUNT_ROOT}/{role}", "readOnly": True}

"""Desired state: the one training Job of a FineTuneJob's run, as a manifest. Pure: spec and settings in, dict out.

The pod fulfils the `restricted` Pod Security Standard, has no Kubernetes credentials and a read-only root. Must not read the cluster.
"""

from typing import Any

from finetune_api import credentials, names
from finetune_api.exits import OOM_KILLED, PERMANENT, ExitCode
from finetune_api.fields import ApiModel
from finetune_api.job import JobDescription
from finetune_api.spec import API_VERSION, KIND, FineTuneJobSpec

from finetune_operator.settings import Settings

Manifest = dict[str, Any]

UID = 65532
GRACE_SECONDS = 120  # to save the last step and its mirror
_SCRATCH_SIZE = "2Gi"
_HOME_ENV = {
    "HOME": names.HOME_DIR,
    "TMPDIR": "/tmp",  # noqa: S108 an emptyDir of the pod's own
    "HF_HOME": f"{names.CACHE_DIR}/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": f"{names.HOME_DIR}/inductor",
    "TRITON_CACHE_DIR": f"{names.HOME_DIR}/triton",
}


def build_job(metadata: Manifest, spec: FineTuneJobSpec, settings: Settings) -> Manifest:
    """The training Job of an object's current run.

    Args:
        metadata: the FineTuneJob's: name, namespace, uid.
        spec: its spec.
        settings: the administrator's.
    """
    description = JobDescription.of(metadata, spec, in_cluster=True)
    labels = _labels(metadata["name"], description.run_digest)
    policy = spec.run_policy
    job_spec: Manifest = {
        "completions": 1,
        "parallelism": 1,
        "backoffLimit": policy.backoff_limit,
        "suspend": policy.suspend,
        "podReplacementPolicy": "Failed",  # a pod that is still terminating may still hold its GPU and write
        "podFailurePolicy": {"rules": _failure_rules()},
        "template": {"metadata": {"labels": labels}, "spec": _pod(description, settings)},
    }
    if policy.active_deadline_seconds is not None:
        job_spec["activeDeadlineSeconds"] = policy.active_deadline_seconds
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": names.training_job_name(metadata["name"], metadata["uid"], description.run_digest),
            "namespace": metadata["namespace"],
            "labels": labels,
            "ownerReferences": [_owner(metadata)],
        },
        "spec": job_spec,
    }


def live_patch(job: Manifest, spec: FineTuneJobSpec) -> Manifest:
    """The merge patch that brings a Job's live fields to the spec's; empty when they are. TTL is not one of them: see decide.py."""
    policy, now = spec.run_policy, job["spec"]
    wanted = {"suspend": policy.suspend, "backoffLimit": policy.backoff_limit, "activeDeadlineSeconds": policy.active_deadline_seconds}
    found = {
        "suspend": now.get("suspend", False),
        "backoffLimit": now.get("backoffLimit"),
        "activeDeadlineSeconds": now.get("activeDeadlineSeconds"),
    }
    changed = {name: value for name, value in wanted.items() if value != found[name]}
    return {"spec": changed} if changed else {}


def _labels(name: str, run_digest: str) -> dict[str, str]:
    return {
        names.LABEL_JOB: names.job_label(name),
        names.LABEL_RUN: names.run_label(run_digest),
        "app.kubernetes.io/name": "finetune-trainer",
        "app.kubernetes.io/instance": names.job_label(name),
        "app.kubernetes.io/managed-by": names.MANAGED_BY,
    }


def _owner(metadata: Manifest) -> Manifest:
    # No blockOwnerDeletion: nothing may keep a FineTuneJob from going away.
    return {"apiVersion": API_VERSION, "kind": KIND, "name": metadata["name"], "uid": metadata["uid"], "controller": True}


def _failure_rules() -> list[Manifest]:
    def on_exit(action: str, *codes: int) -> Manifest:
        return {"action": action, "onExitCodes": {"containerName": names.CONTAINER, "operator": "In", "values": sorted(codes)}}

    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        on_exit("Ignore", ExitCode.CHECKPOINTED),
        on_exit("FailJob", *PERMANENT),
        on_exit("FailJob", OOM_KILLED),
    ]


def _pod(description: JobDescription, settings: Settings) -> Manifest:
    spec = description.spec
    volumes, mounts = _volumes(spec, description.train_digest)
    pod: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": UID,
            "runAsGroup": UID,
            "fsGroup": UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(description, settings, mounts)],
        "volumes": volumes,
    }
    return pod | _placement(spec)


def _placement(spec: FineTuneJobSpec) -> Manifest:
    scheduling = spec.scheduling
    given: Manifest = {
        "nodeSelector": dict(scheduling.node_selector),
        "tolerations": [_without_empty(item) for item in scheduling.tolerations],
        "priorityClassName": scheduling.priority_class_name,
        "runtimeClassName": scheduling.runtime_class_name,
        "serviceAccountName": spec.pod.service_account_name,
        "imagePullSecrets": [{"name": name} for name in spec.pod.image_pull_secrets],
    }
    return {name: value for name, value in given.items() if value}


def _without_empty(item: ApiModel) -> Manifest:
    return {name: value for name, value in item.wire(defaults=True).items() if value != ""}


def _container(description: JobDescription, settings: Settings, mounts: list[Manifest]) -> Manifest:
    spec = description.spec
    env = {**_HOME_ENV, **settings.trainer_env, names.ENV_JOB: description.to_json()}
    return {
        "name": names.CONTAINER,
        "image": spec.pod.image or settings.trainer_image,
        "args": ["run"],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "ports": [{"name": "progress", "containerPort": names.PROGRESS_PORT}],
        "resources": _resources(spec),
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }


def _resources(spec: FineTuneJobSpec) -> Manifest:
    gpus = {"nvidia.com/gpu": str(spec.resources.gpus)} if spec.resources.gpus else {}
    memory = spec.resources.memory
    return {"requests": {"cpu": spec.resources.cpu, "memory": memory, **gpus}, "limits": {"memory": memory, **gpus}}


def _volumes(spec: FineTuneJobSpec, train_digest: str) -> tuple[list[Manifest], list[Manifest]]:
    """Volumes and mounts: the writable places, the credentials, and what pvc:// and configmap:// name."""
    pairs = [
        _workspace(spec, train_digest),
        _cache(spec),
        ({"name": "home", "emptyDir": {"sizeLimit": _SCRATCH_SIZE}}, {"mountPath": names.HOME_DIR}),
        ({"name": "tmp", "emptyDir": {"sizeLimit": _SCRATCH_SIZE}}, {"mountPath": "/tmp"}),  # noqa: S108
        ({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}, {"mountPath": "/dev/shm"}),  # noqa: S108
        *(_secret(role, secret) for role, secret in credentials.secrets_by_role(spec)),
        *_sources(spec),
    ]
    return [volume for volume, _ in pairs], [{"name": volume["name"], **mount} for volume, mount in pairs]


def _workspace(spec: FineTuneJobSpec, train_digest: str) -> tuple[Manifest, Manifest]:
    workspace = spec.storage.workspace
    mount: Manifest = {"mountPath": names.WORKDIR}
    if workspace.persistent_volume_claim:
        # A folder for each training: jobs may share a claim, and another run of the same training finds its checkpoints.
        volume: Manifest = {"persistentVolumeClaim": {"claimName": workspace.persistent_volume_claim}}
        mount["subPath"] = train_digest[:16]
    elif workspace.storage_class_name:
        claim = {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": workspace.storage_class_name,
            "resources": {"requests": {"storage": workspace.size}},
        }
        volume = {"ephemeral": {"volumeClaimTemplate": {"spec": claim}}}
    else:
        volume = {"emptyDir": {"sizeLimit": workspace.size}}
    return {"name": "workspace", **volume}, mount


def _cache(spec: FineTuneJobSpec) -> tuple[Manifest, Manifest]:
    claim = spec.storage.cache.persistent_volume_claim
    volume: Manifest = (
        {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {"sizeLimit": spec.storage.workspace.size}}
    )
    return {"name": "cache", **volume}, {"mountPath": names.CACHE_DIR}


def _secret(role: str, secret: str) -> tuple[Manifest, Manifest]:
    # Optional, so that the trainer itself can say which one is missing instead of a pod that never starts.
    volume = {"name": f"credentials-{role}", "secret": {"secretName": secret, "optional": True, "defaultMode": 0o440}}
    return volume, {"mountPath": f"{credentials.MOUNT_ROOT}/{role}", "readOnly": True}


def _sources(spec: FineTuneJobSpec) -> list[tuple[Manifest, Manifest]]:
    """A read-only mount for each source that lies in a claim or a ConfigMap."""
    sources = {"model": spec.model.source, "dataset": spec.dataset.source, "evaluation": spec.dataset.evaluation.source}
    return [_source(role, uri) for role, uri in sources.items() if uri.startswith(("pvc://", "configmap://"))]


def _source(role: str, uri: str) -> tuple[Manifest, Manifest]:
    kind, _, rest = uri.partition("://")
    owner = rest.partition("/")[0]
    volume: Manifest = (
        {"persistentVolumeClaim": {"claimName": owner, "readOnly": True}}
        if kind == "pvc"
        else {"configMap": {"name": owner, "optional": True}}
    )
    return {"name": f"source-{role}", **volume}, {"mountPath": f"{names.VOLUMES_ROOT}/{role}", "readOnly": True}

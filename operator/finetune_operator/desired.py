"""Spec in, Job manifest out: what the cluster should hold. Pure, and deterministic to the byte; decide.py compares and executes nothing here."""

from finetune_api import names
from finetune_api.exits import OOM_KILLED, PERMANENT, ExitCode
from finetune_api.job import JobDescription
from finetune_api.spec import API_VERSION, KIND, FineTuneJobSpec, SchedulingSpec
from pydantic import ByteSize, TypeAdapter

from finetune_operator.settings import Settings
from finetune_operator.subject import Json, Subject
from finetune_operator.volumes import CA_FILE, build_ca_bundle, build_volumes, mounts_a_claim

GRACE_SECONDS = 120
PREFLIGHT_TTL_SECONDS = 3600
_PREFLIGHT_CPU, _PREFLIGHT_MEMORY = "250m", "1Gi"
_WHERE = ("kubernetes.io/arch", "kubernetes.io/os", "kubernetes.io/hostname")
_ZONES = "topology.kubernetes.io/"  # and regions
_BYTES = TypeAdapter(ByteSize)
_UID = 65532
_HOME_CACHE = f"{names.HOME_DIR}/.cache"
_PLACES = {
    "HOME": names.HOME_DIR,
    "USER": "finetune",  # getpass.getuser needs it where an image has no passwd entry for the UID
    "TMPDIR": "/tmp",  # noqa: S108 an emptyDir of the pod
    "HF_HOME": f"{names.CACHE_DIR}/huggingface",
    "TORCHINDUCTOR_CACHE_DIR": f"{_HOME_CACHE}/torchinductor",
    "TRITON_CACHE_DIR": f"{_HOME_CACHE}/triton",
}

_CA_VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")  # boto3; the Hub's client and Python itself; requests


def build_job(subject: Subject, settings: Settings) -> Json:
    """The training Job of the run that the spec asks for. It has no TTL: that comes after the terminal status is stored."""
    labels = build_labels(subject)
    return _job(subject, subject.run.job_name, labels, _pod_template(labels, _pod_spec(subject, subject.spec, settings), settings))


def build_preflight_job(subject: Subject, settings: Settings) -> Json:
    """The preflight Job, which goes before the training Job: the same pod without GPUs. It is small, so that its TTL may stand from the start."""
    spec = subject.spec
    labels = build_labels(subject) | {"app.kubernetes.io/component": "preflight"}
    small = spec.model_copy(
        update={
            "resources": spec.resources.model_copy(update={"gpus": 0}),
            "scheduling": spec.scheduling.model_copy(update=_preflight_scheduling(spec, settings)),
        }
    )
    pod = _pod_spec(subject, small, settings)
    container = pod["containers"][0]
    container["args"] = ["preflight"]
    container["resources"]["requests"] = {"cpu": _PREFLIGHT_CPU, "memory": _smaller(_PREFLIGHT_MEMORY, spec.resources.memory)}
    job = _job(subject, names.preflight_job_name(subject.run.job_name), labels, _pod_template(labels, pod, settings))
    job["spec"]["ttlSecondsAfterFinished"] = PREFLIGHT_TTL_SECONDS
    return job


def _preflight_scheduling(spec: FineTuneJobSpec, settings: Settings) -> Json:
    # A model's own code may run in preflight too, so that a sandbox is kept; a GPU's runtime would fail on a node without one.
    runtime = spec.scheduling.runtime_class_name
    return {"node_selector": _preflight_nodes(spec), "runtime_class_name": "" if runtime in settings.gpu_runtime_classes else runtime}


def _preflight_nodes(spec: FineTuneJobSpec) -> dict[str, str]:
    """Labels of the nodes that preflight may run on: it needs no GPU node, but a claim has to stay within reach of the training."""
    selector = spec.scheduling.node_selector
    if mounts_a_claim(spec):
        # A claim of a StorageClass with WaitForFirstConsumer gets its volume where its first pod runs, and no pod elsewhere can mount it then.
        return selector
    return {name: value for name, value in selector.items() if name in _WHERE or name.startswith(_ZONES)}


def _job(subject: Subject, name: str, labels: dict[str, str], template: Json) -> Json:
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": subject.key.namespace,
            "labels": labels,
            "ownerReferences": [_owner_reference(subject)],
        },
        "spec": {
            **build_live_fields(subject.spec),
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",  # a new pod only when the old one is wholly gone: never two trainers
            "podFailurePolicy": {"rules": build_failure_rules()},
            "template": template,
        },
    }


def _smaller(one: str, other: str) -> str:
    """The smaller of two quantities of bytes."""
    return min(one, other, key=lambda quantity: _BYTES.validate_python(f"{quantity}B"))


def build_live_fields(spec: FineTuneJobSpec) -> Json:
    """The Job's fields that an edit patches without a restart."""
    policy = spec.run_policy
    live: Json = {"suspend": policy.suspend, "backoffLimit": policy.backoff_limit}
    if policy.active_deadline_seconds is not None:
        live["activeDeadlineSeconds"] = policy.active_deadline_seconds
    return live


def build_labels(subject: Subject) -> dict[str, str]:
    """Labels of the Job and its pods; events.py selects by the first."""
    return {
        names.LABEL_JOB: names.job_label(subject.key.name),
        names.LABEL_RUN: names.run_label(subject.run.run_digest),
        "app.kubernetes.io/name": "finetune-trainer",
        "app.kubernetes.io/instance": names.job_label(subject.key.name),
        "app.kubernetes.io/component": "training",
        "app.kubernetes.io/part-of": "finetune-operator",
        "app.kubernetes.io/managed-by": names.MANAGED_BY,
    }


def build_failure_rules() -> list[Json]:
    """The rules of podFailurePolicy, in their order. What none of them matches is counted against backoffLimit."""

    def on_exit(action: str, *codes: int) -> Json:
        return {
            "action": action,
            "onExitCodes": {"containerName": names.CONTAINER, "operator": "In", "values": [int(code) for code in sorted(codes)]},
        }

    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        on_exit("Ignore", ExitCode.CHECKPOINTED),
        on_exit("FailJob", *PERMANENT),
        on_exit("FailJob", OOM_KILLED),
    ]


def _owner_reference(subject: Subject) -> Json:
    # blockOwnerDeletion would let a Job hold up the deletion of its FineTuneJob.
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": subject.key.name,
        "uid": subject.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def _pod_template(labels: dict[str, str], pod: Json, settings: Settings) -> Json:
    # The operator finds its pods by its own labels: the administrator's can't replace them.
    metadata: Json = {"labels": {**settings.trainer_pod_labels, **labels}}
    if settings.trainer_pod_annotations:
        metadata["annotations"] = dict(settings.trainer_pod_annotations)
    return {"metadata": metadata, "spec": pod}


def _pod_spec(subject: Subject, spec: FineTuneJobSpec, settings: Settings) -> Json:
    volumes, mounts = build_volumes(spec, subject.key.name, subject.run.train_digest)
    if settings.trainer_ca_config_map:
        volume, mount = build_ca_bundle(settings.trainer_ca_config_map, settings.trainer_ca_key)
        volumes, mounts = [*volumes, volume], [*mounts, mount]
    pod: Json = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _UID,
            "runAsGroup": _UID,
            "fsGroup": _UID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(subject, spec, settings, mounts)],
        "volumes": volumes,
        **_scheduling(spec.scheduling),
    }
    pull_secrets = dict.fromkeys((*spec.pod.image_pull_secrets, *settings.trainer_image_pull_secrets))
    if pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in pull_secrets]
    if spec.pod.service_account_name:
        pod["serviceAccountName"] = spec.pod.service_account_name
    return pod


def _container(subject: Subject, spec: FineTuneJobSpec, settings: Settings, mounts: list[Json]) -> Json:
    return {
        "name": names.CONTAINER,
        **_image(spec, settings),
        "args": ["run"],
        "env": _environment(subject, settings),
        "ports": [{"name": "progress", "containerPort": names.PROGRESS_PORT}],
        "resources": _resources(spec),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePath": names.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }


def _image(spec: FineTuneJobSpec, settings: Settings) -> Json:
    if spec.pod.image:
        return {"image": spec.pod.image}
    policy = {"imagePullPolicy": settings.trainer_image_pull_policy} if settings.trainer_image_pull_policy else {}
    return {"image": settings.trainer_image, **policy}


def _environment(subject: Subject, settings: Settings) -> list[Json]:
    description = JobDescription.of(subject.metadata, subject.spec, in_cluster=True).to_json()
    trusted = dict.fromkeys(_CA_VARIABLES, CA_FILE) if settings.trainer_ca_config_map else {}
    values = {**_PLACES, **trusted, **settings.trainer_env, names.ENV_JOB: description}
    # The kubelet expands $(NAME) in values; $$ is how a plain dollar sign is written.
    return [{"name": name, "value": value.replace("$", "$$")} for name, value in values.items()]


def _resources(spec: FineTuneJobSpec) -> Json:
    wanted = spec.resources
    gpus = {"nvidia.com/gpu": str(wanted.gpus)} if wanted.gpus else {}
    return {"requests": {"cpu": wanted.cpu, "memory": wanted.memory, **gpus}, "limits": {"memory": wanted.memory, **gpus}}


def _scheduling(scheduling: SchedulingSpec) -> Json:
    fields: Json = {
        "nodeSelector": dict(scheduling.node_selector),
        "tolerations": [toleration.wire() for toleration in scheduling.tolerations],
        "priorityClassName": scheduling.priority_class_name,
        "runtimeClassName": scheduling.runtime_class_name,
    }
    return {name: value for name, value in fields.items() if value}

"""What the administrator decides, read once from the environment (FINETUNE_OPERATOR_*) by main.py. No I/O beyond that."""

from datetime import timedelta
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """The operator's settings; lists and maps are written as JSON."""

    model_config = SettingsConfigDict(env_prefix="FINETUNE_OPERATOR_", frozen=True)

    trainer_image: str = "finetune-trainer:0.1.0"
    """Image of training pods whose spec names none."""
    trainer_image_pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = ""
    """When a node pulls that image. Empty: Kubernetes' default. An image that a spec names has the default always."""
    trainer_image_pull_secrets: tuple[str, ...] = ()
    """Secrets of the job's namespace that pull a training pod's image, behind those that the spec names."""
    trainer_env: dict[str, str] = {}
    """Environment of every training pod, such as HF_ENDPOINT. Never credentials."""
    trainer_ca_config_map: str = ""
    """ConfigMap of the job's namespace with the CAs that the trainer trusts, instead of those of its image. Empty: those of its image."""
    trainer_ca_key: str = "ca.crt"
    """Key of that ConfigMap."""
    trainer_pod_labels: dict[str, str] = {}
    """Labels of every training and preflight pod beside the operator's own, which win."""
    trainer_pod_annotations: dict[str, str] = {}
    """Annotations of every training and preflight pod."""
    gpu_runtime_classes: tuple[str, ...] = ("nvidia", "nvidia-cdi", "nvidia-legacy")
    """RuntimeClasses that only GPU nodes have, and that are no sandbox: preflight, which may run elsewhere, leaves them out. Those of NVIDIA's GPU operator."""
    namespaces: tuple[str, ...] = ()
    """Namespaces that are watched. Empty: all."""
    allowed_images: tuple[str, ...] = ()
    """Shell-style patterns of images that spec.pod.image may name."""
    allowed_service_accounts: tuple[str, ...] = ()
    """Shell-style patterns of what spec.pod.serviceAccountName may name."""
    resync_seconds: Annotated[float, Field(gt=0)] = 45
    """Seconds after which each unfinished job is looked at again, whether or not an event came; longer where listing all takes more than a twentieth of it."""
    concurrency: Annotated[int, Field(ge=1, le=256)] = 64
    """Jobs that are worked on at the same time."""
    no_progress_minutes: Annotated[float, Field(gt=0)] = 30
    """A training that makes no optimizer step for so long gets the reason NoProgress. Nothing is stopped."""
    lease_namespace: str = ""
    """Namespace of the Lease that says which of several operators acts. Empty: this is the only one."""
    lease_name: str = "finetune-operator"
    """Name of that Lease."""
    lease_identity: str = ""
    """Name under which the Lease is held: the pod's, so that a container that is restarted need not wait for its own Lease to end. Empty: a new one for each process."""
    health_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of /healthz, /readyz and /metrics."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Level of the least important lines that are logged."""

    @property
    def stuck_after(self) -> timedelta:
        """How long a training may go without a step."""
        return timedelta(minutes=self.no_progress_minutes)

    def allows_image(self, image: str) -> bool:
        """Whether a job may name this image; none, or the operator's own, is always allowed."""
        return image in ("", self.trainer_image) or any(fnmatchcase(image, pattern) for pattern in self.allowed_images)

    def allows_service_account(self, name: str) -> bool:
        """Whether a job may name this service account; none is always allowed."""
        return not name or any(fnmatchcase(name, pattern) for pattern in self.allowed_service_accounts)

"""The administrator's settings, from environment variables FINETUNE_OPERATOR_*; the Helm chart sets them from its values."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Everything that the operator can be told."""

    model_config = SettingsConfigDict(env_prefix="FINETUNE_OPERATOR_", frozen=True)

    trainer_image: str = "finetune-trainer:0.1.0"
    """Image of training pods, unless a job names another that is allowed."""

    trainer_env: dict[str, str] = Field(default_factory=dict)
    """Environment of every training pod, such as HF_ENDPOINT for a mirror of the Hub. Never credentials."""

    namespaces: tuple[str, ...] = ()
    """Namespaces that are watched; empty means all."""

    allowed_images: tuple[str, ...] = ()
    """Shell-style patterns of what spec.pod.image may be; empty allows none but the default."""

    allowed_service_accounts: tuple[str, ...] = ()
    """Shell-style patterns of what spec.pod.serviceAccountName may be; empty allows none but the namespace's default."""

    resync_seconds: float = 60
    """How often every unfinished job is looked at again, whether anything was heard of it or not."""

    progress_seconds: float = 3
    """How often a running trainer is asked for its progress."""

    progress_write_seconds: float = 10
    """The least time between two status writes of one job that only move its progress."""

    workers: int = 8
    """Jobs that are reconciled at the same time."""

    health_port: int = 8080
    """Port of /healthz on every interface; 0 serves none."""

    log_level: str = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""

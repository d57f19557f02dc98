"""The payload of the trainer's `GET :8080/progress`: the operator reads it, cosmetics only."""

from typing import Literal

from pydantic import Field

from finetune_api.fields import ApiModel
from finetune_api.status import Progress, Stage

MAX_BYTES = 64 * 1024
TIMEOUT_SECONDS = 2.0


class ProgressReport(ApiModel):
    """What a trainer is doing right now."""

    version: Literal[1] = Field(1, description="Version of this format.")
    train_digest: str = Field(description="Digest of the run it works on.", max_length=64)
    stage: Stage = Field(description="What it is doing.")
    progress: Progress | None = Field(None, description="How far the training is.")

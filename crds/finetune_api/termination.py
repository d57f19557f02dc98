"""The termination message: how a pod's end reaches the operator without credentials, network or a live process.

Versioned JSON of at most 4,096 bytes as encoded, since the kubelet keeps only the end of a longer one. Rewritten at each stage change,
so that an OOM kill still says where it was. To the operator it is untrusted text: `parse` is strict and never raises.
"""

from typing import Literal

from pydantic import Field, ValidationError

from finetune_api.fields import ApiModel
from finetune_api.status import Count, PublishedArtifact, Qat, Quality, Short, Stage, Text

MAX_BYTES = 4096
_SHORTEST_MESSAGE = 200


class TerminationMessage(ApiModel):
    """What the trainer last said."""

    version: Literal[1] = Field(1, description="Version of this format.")
    stage: Stage = Field(description="The stage it was in.")
    reason: Short = Field("", description="CamelCase reason of exits.REASONS; empty while it runs.")
    message: Text = Field("", description="One sentence: what is wrong, and the mend.")
    exit_code: int | None = Field(None, ge=0, le=255, description="Exit code, once it is known.")
    step: Count = Field(0, description="Optimizer steps done.")
    total_steps: Count = Field(0, description="Optimizer steps in all.")
    model: Text = Field("", description="The model's source with its resolved revision.")
    dataset: Text = Field("", description="The dataset's source with its resolved revision or ETag.")
    quality: Quality | None = Field(None, description="Held-out losses and the proof's verdict.")
    qat: Qat | None = Field(None, description="What was quantized.")
    artifacts: tuple[PublishedArtifact, ...] = Field((), max_length=32, description="What was published.")

    def encode(self) -> str:
        """JSON of at most 4,096 bytes: artifacts go first, then the end of the sentence."""
        shorter = self
        while len(text := shorter.model_dump_json(by_alias=True, exclude_defaults=True).encode()) > MAX_BYTES:
            if shorter.artifacts:
                shorter = shorter.model_copy(update={"artifacts": shorter.artifacts[:-1]})
            elif len(shorter.message) > _SHORTEST_MESSAGE:
                shorter = shorter.model_copy(update={"message": shorter.message[: len(shorter.message) * 3 // 4] + "…"})
            else:
                shorter = shorter.model_copy(update={"model": "", "dataset": "", "quality": None, "qat": None})
        return text.decode()


def parse(text: str) -> TerminationMessage | None:
    """The message, or None for anything that is not exactly one (log lines, another version, a cut-off one)."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        return None
    try:
        return TerminationMessage.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError:
        return None

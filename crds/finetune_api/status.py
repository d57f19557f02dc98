"""The status of a FineTuneJob: what the operator reports, and only the operator writes.

Losses are strings with 4 significant digits (the API conventions forbid floats). docs/api.md lists the fields.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.fields import ApiModel

Text = Annotated[str, StringConstraints(max_length=1024)]
Short = Annotated[str, StringConstraints(max_length=256)]
Timestamp = Annotated[str, StringConstraints(max_length=32, pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
Count = Annotated[
    int, Field(ge=0, le=2**53)
]  # a trainer's word goes into the status: what the API server can't hold would block every write
Loss = Annotated[str, StringConstraints(max_length=16)]


class Phase(StrEnum):
    """Where a job stands; Succeeded and Failed are final for their runDigest."""

    PENDING = "Pending"
    QUEUED = "Queued"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


class Stage(StrEnum):
    """What the trainer is doing."""

    PREFLIGHT = "Preflight"
    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    CONVERTING = "Converting"
    VERIFYING = "Verifying"
    PUBLISHING = "Publishing"


class ConditionType(StrEnum):
    """Condition types; the first three follow kstatus."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    TRAINED = "Trained"
    VERIFIED = "Verified"
    QUALITY_PASSED = "QualityPassed"
    PUBLISHED = "Published"


class Condition(ApiModel):
    """One condition by the Kubernetes convention."""

    type: ConditionType = Field(description="Which condition.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: Annotated[str, StringConstraints(max_length=128, pattern=r"^[A-Z][A-Za-z0-9]*$")] = Field(description="CamelCase reason.")
    message: Text = Field("", description="A sentence a person can act on.")
    observed_generation: Count = Field(0, description="Generation of the spec it speaks of.")
    last_transition_time: Timestamp = Field(description="When the status of the condition last changed.")


class Progress(ApiModel):
    """How far the training is; cosmetic, losing it loses nothing."""

    summary: Short = Field("", description="Steps done and in all, such as 120/400.")
    step: Count = Field(0, description="Optimizer steps done.")
    total_steps: Count = Field(0, description="Optimizer steps in all.")
    epoch: Short = Field("", description="Passes over the data so far, such as 0.30.")
    loss: Loss = Field("", description="Training loss of the last step, 4 significant digits.")
    tokens_per_second: Count = Field(0, description="Tokens per second since the start of this attempt.")
    eta_seconds: Count = Field(0, description="Estimated seconds to the last step.")
    updated_at: Timestamp | None = Field(None, description="When the operator read it.")


class Attempt(ApiModel):
    """One pod of the run."""

    pod_uid: Short = Field(alias="podUID", description="UID of the pod.")
    start: Timestamp | None = Field(None, description="When its container started.")
    end: Timestamp | None = Field(None, description="When its container ended.")
    exit_code: int | None = Field(None, description="Exit code of its container.")
    reason: Short = Field("", description="CamelCase reason of its end.")


class VerifiedBy(StrEnum):
    """How far the proof goes that what is shipped is what was trained; what computes the scheme decides, and the machine."""

    WEIGHTS_AND_LOGITS = "weights and logits"
    WEIGHTS = "weights; kernel not run"


class Quality(ApiModel):
    """Held-out losses, all on the same tokens, and the proof's verdict."""

    base_loss: Loss | None = Field(None, description="Base model without an adapter.")
    tuned_loss: Loss | None = Field(None, description="The adapter at the switch, not quantized.")
    nearest_loss: Loss | None = Field(
        None,
        description="The adapter at the switch, each weight quantized to the nearest value, as torchao does; only where ptqLoss differs.",
    )
    ptq_loss: Loss | None = Field(None, description="The adapter at the switch, quantized after training with scales and rounding chosen.")
    quantized_loss: Loss | None = Field(None, description="The shipped quantized model.")
    nearest_recovered: Short | None = Field(None, description="(nearest - quantized) / (nearest - tuned), as `recovered`.")
    recovered: Short | None = Field(None, description="(PTQ - quantized) / (PTQ - tuned), in percent; only where the gap is significant.")
    agreement: Short | None = Field(
        None, description="Share of held-out tokens where the quantized model's first choice is the tuned one's, in percent."
    )
    shortfall: Text | None = Field(None, description="What the quality gate found fault with; empty when nothing.")
    shipped_matches_trained: bool | None = Field(None, description="Whether the proof held.")
    verified_by: Short | None = Field(
        None, description="What the proof compared: weights and logits, or, where no kernel of the scheme runs, weights; kernel not run."
    )


class Qat(ApiModel):
    """What was quantized."""

    scheme: Short = Field("", description="Quantization scheme.")
    layers: Count = Field(0, description="Linear layers that are quantized.")
    coverage: Short = Field("", description="Share of the linear weights that are quantized, such as 100%.")


class PublishedArtifact(ApiModel):
    """One artifact at one destination."""

    kind: Short = Field(description="adapter, quantized or merged.")
    uri: Text = Field(description="Where it is.")
    digest: Short = Field("", description="sha256 of its manifest.")
    bytes: Count = Field(0, description="Size of its files in bytes.")


class Run(ApiModel):
    """Which inputs this status speaks of."""

    train_digest: Short = Field("", description="Digest of the fields that change the weights.")
    run_digest: Short = Field("", description="Digest of the fields that change the run.")
    job_name: Short = Field("", description="Name of the run's Job.")
    model: Text = Field("", description="The model's source with its resolved revision.")
    dataset: Text = Field("", description="The dataset's source with its resolved revision or ETag.")


class Preflight(ApiModel):
    """What was found before a GPU was asked for. Kept as long as the run, so that it is found once."""

    passed_at: Timestamp = Field(description="When it had passed.")
    message: Text = Field("", description="What could not be checked, or is worth knowing.")


class FineTuneJobStatus(ApiModel):
    """What the operator reports."""

    observed_generation: Count = Field(0, description="Generation of the spec this status speaks of.")
    phase: Phase | None = Field(None, description="Pending, Running, Succeeded, Failed or Suspended (Queued: not yet).")
    stage: Stage | None = Field(None, description="What the trainer is doing.")
    message: Text = Field("", description="One sentence a person can act on.")
    conditions: tuple[Condition, ...] = Field(
        (), max_length=16, description="Ready, Reconciling, Stalled, Trained, Verified, QualityPassed, Published."
    )
    preflight: Preflight | None = Field(None, description="That the preflight Job has passed; only where the job wants a GPU.")
    progress: Progress | None = Field(None, description="How far the training is.")
    attempts: tuple[Attempt, ...] = Field((), max_length=10, description="The last 10 pods of the run.")
    gpu_seconds: Count = Field(0, description="GPU seconds of all pods of the run: a lower bound.")
    quality: Quality | None = Field(None, description="Held-out losses and the proof's verdict.")
    qat: Qat | None = Field(None, description="What was quantized.")
    artifacts: tuple[PublishedArtifact, ...] = Field((), max_length=32, description="What was published, and where.")
    run: Run | None = Field(None, description="Which inputs this status speaks of.")
    start_time: Timestamp | None = Field(None, description="When the first pod's container started.")
    completion_time: Timestamp | None = Field(None, description="When the run ended.")

"""The spec of a FineTuneJob: what a user writes, with bounds, defaults and the effect of each field.

This is the single source: the CRD (crd.py), the offline verdicts (validation.py) and the digests (digests.py) are derived from it.
What one field alone can't express stands in rules.py.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import StringConstraints

from finetune_api.fields import ApiModel, FieldClass, spec_field

GROUP = "finetune.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"

_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
ObjectName = Annotated[str, StringConstraints(max_length=253, pattern=rf"^{_DNS_LABEL}(\.{_DNS_LABEL})*$")]
OptionalName = Annotated[str, StringConstraints(max_length=253, pattern=rf"^({_DNS_LABEL}(\.{_DNS_LABEL})*)?$")]
Quantity = Annotated[str, StringConstraints(max_length=32, pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
PositiveNumber = Annotated[
    str, StringConstraints(max_length=24, pattern=r"^(0\.[0-9]*[1-9][0-9]*|[1-9][0-9]*(\.[0-9]+)?)([eE][-+]?[0-9]{1,2})?$")
]
# \x00-\x20 rather than \s, which means more to pydantic's regular expressions than to the API server's.
ModelSource = Annotated[str, StringConstraints(max_length=1024, pattern=r"^(hf|s3|pvc|file|builtin)://[^\x00-\x20]+$")]
DataSource = Annotated[str, StringConstraints(max_length=1024, pattern=r"^(hf|s3|pvc|file|builtin|configmap)://[^\x00-\x20]+$")]
DestinationUri = Annotated[str, StringConstraints(max_length=1024, pattern=r"^(s3|hf|file)://[^\x00-\x20]+$")]
Endpoint = Annotated[str, StringConstraints(max_length=512, pattern=r"^(https?://[^\x00-\x20/@]+(/[^\x00-\x20@]*)?)?$")]
CheckpointUri = Annotated[str, StringConstraints(max_length=1024, pattern=r"^(s3://[^\x00-\x20/]+(/[^\x00-\x20]*)?)?$")]
_MODULE = r"[A-Za-z_][A-Za-z0-9_.]*"
TargetModules = Annotated[str, StringConstraints(max_length=1024, pattern=rf"^(all-linear|{_MODULE}(,{_MODULE})*)$")]
OptionalDataSource = Annotated[str, StringConstraints(max_length=1024, pattern=r"^((hf|s3|pvc|file|builtin|configmap)://[^\x00-\x20]+)?$")]
LabelKey = Annotated[str, StringConstraints(max_length=317)]
LabelValue = Annotated[str, StringConstraints(max_length=63)]


class Scheme(StrEnum):
    """Quantization schemes; weight grid first where there is no activation grid, else activation-weight."""

    NONE = "none"
    INT8 = "int8"
    INT8_INT4 = "int8-int4"
    INT4 = "int4"
    FP8_INT4 = "fp8-int4"
    FP8_FP8 = "fp8-fp8"


class Artifact(StrEnum):
    """What a job can ship."""

    ADAPTER = "adapter"
    QUANTIZED = "quantized"
    MERGED = "merged"


class SecretReference(ApiModel):
    """A Secret in the job's own namespace, mounted into the trainer's pod; a laptop ignores it and uses the ambient credentials."""

    secret_name: OptionalName = spec_field(
        "Name of the Secret. Accepted keys: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, HF_TOKEN. Default: none; for storage.checkpoints the first S3 destination's.",
        default="",
    )


class ModelSpec(ApiModel):
    """The base model."""

    source: ModelSource = spec_field(
        "Where the base model is: hf://owner/name[@revision], s3://bucket/prefix, pvc://claim/path, file:///path (laptop only) or builtin://smollm2-135m. "
        "No default. A branch is resolved to a commit once and reported in status.",
    )
    credentials: SecretReference = spec_field(
        "Secret that opens the source. Default: none.", default=SecretReference, field_class=FieldClass.RUN
    )
    endpoint: Endpoint = spec_field("S3 endpoint of the source. Default: AWS.", default="", field_class=FieldClass.RUN)
    dtype: Literal["auto", "float32", "bfloat16"] = spec_field(
        "Precision of the base weights and the arithmetic. Default auto: bfloat16 on a GPU, float32 on a CPU.", default="auto"
    )
    trust_remote_code: bool = spec_field(
        "Run Python code that the model's repository contains. Default false: such a model is refused.", default=False
    )


class EvaluationSpec(ApiModel):
    """The held-out data on which every loss in the report is measured."""

    percent: int = spec_field(
        "Share of the dataset that is held out, in percent, drawn with the seed; at most 2000 rows, and equal rows stay on one side. Default 5; 0 measures nothing. "
        "Ignored when a source is given.",
        default=5, ge=0, le=50,
    )  # fmt: skip
    source: OptionalDataSource = spec_field("Held-out data of its own, in the dataset's format, taken whole. Default: none.", default="")


class DatasetSpec(ApiModel):
    """The training data: JSON Lines."""

    source: DataSource = spec_field(
        "Where the JSON Lines file is: hf://owner/name[@revision]/file, s3://bucket/key, pvc://claim/path, configmap://name/key, file:///path (laptop only) or "
        "builtin://python-docs. No default.",
    )
    credentials: SecretReference = spec_field(
        "Secret that opens source and evaluation.source. Default: none.", default=SecretReference, field_class=FieldClass.RUN
    )
    endpoint: Endpoint = spec_field("S3 endpoint of source and evaluation.source. Default: AWS.", default="", field_class=FieldClass.RUN)
    format: Literal["auto", "chat", "prompt-completion", "instruction", "text"] = spec_field(
        "Columns of a row: messages (chat), prompt and completion (texts or messages), instruction [, input] and output, or text. Default auto: detected from "
        "the first row. A message has role and content, and may have tool_calls, weight (0 keeps an answer from being trained) and what else the model's chat "
        "template reads; beside messages a row may have tools (a list of functions, or its JSON text) and chat_template_kwargs (an object: variables of the "
        "template). Other columns are not read.",
        default="auto",
    )  # fmt: skip
    evaluation: EvaluationSpec = spec_field("Held-out data. Default: 5 percent of the dataset.", default=EvaluationSpec)


class LoraSpec(ApiModel):
    """The low-rank adapter."""

    rank: int = spec_field("Rank of the adapter's two factors. Default 32. Larger learns more and costs memory.", default=32, ge=1, le=512)
    alpha: int | None = spec_field("Scale of the update: alpha / rank. Default: twice the rank.", default=None, ge=1, le=2048)
    target_modules: TargetModules = spec_field(
        "Linear layers that get an adapter: all-linear, or module name endings joined by commas, such as q_proj,v_proj. "
        "Default all-linear (without the output head, and layers that no adapter fits).",
        default="all-linear",
    )


class QuantizationSpec(ApiModel):
    """Low-bit weights, and how much of the training learns to live with them."""

    scheme: Scheme = spec_field(
        "none (plain LoRA), int8, int8-int4 (8-bit activations, 4-bit weights), int4, fp8-int4 or fp8-fp8; docs/schemes.md says what each is for. All convert on any machine. "
        "Default int8-int4, which also runs on any.",
        default=Scheme.INT8_INT4,
    )
    group_size: Literal[32, 64, 128] | None = spec_field(
        "Weights that share one scale. Default: 32 for int8-int4, 128 for fp8-int4, for int4 the one of 128, 64 and 32 that covers most of the model's weights; "
        "the others have one scale per output channel.",
        default=None,
    )
    qat_percent: int = spec_field(
        "Percent of the optimizer steps, the last ones, that train with rounded weights (exact quantization-aware training, QAT); the steps before are plain LoRA, below "
        "100 at least one where there are two or more. Default 20. 100: QAT from the first step. 0: quantization after training only.",
        default=20, ge=0, le=100,
    )  # fmt: skip
    distill: bool = spec_field(
        "During the QAT steps, half of the loss is how far the rounded model strays from the adapter as it was before them, which costs one more adapter in memory and one "
        "more forward pass. Without effect at qatPercent 0 and 100. Default true.",
        default=True,
    )  # fmt: skip
    accept_inexact: bool = spec_field(
        "Ship the model although the proof finds that it is not the trained one; status says shippedMatchesTrained: false. Default false.",
        default=False,
    )


class TrainingSpec(ApiModel):
    """The optimizer's work."""

    backend: Literal["auto", "native", "unsloth"] = spec_field(
        "What loads the model and puts the adapter on: native (transformers and peft) or unsloth (FastLanguageModel, in an image that has it). Default auto: "
        "unsloth where it is installed and nothing is quantized, else native.",
        default="auto",
    )
    epochs: int = spec_field("Passes over the training data. Default 1.", default=1, ge=1, le=1000)
    batch_size: int = spec_field(
        "Rows per optimizer step (the effective batch). Default 16. The micro-batch is chosen.", default=16, ge=1, le=65536
    )
    learning_rate: PositiveNumber = spec_field('Peak learning rate, as a string. Default "2e-4".', default="2e-4")
    max_length: int = spec_field(
        "Tokens of a row; longer rows are cut at the end, and rows of text into several. Default 2048.", default=2048, ge=8, le=1048576
    )
    seed: int = spec_field("Seed of data order, initialization and evaluation split. Default 42.", default=42, ge=0, le=2147483647)
    checkpoint_every: int = spec_field("Optimizer steps between checkpoints. Default 100.", default=100, ge=1, le=1000000)


class QualitySpec(ApiModel):
    """The gate between a trained model and its destinations."""

    max_loss_increase_percent: PositiveNumber | None = spec_field(
        "Largest allowed held-out loss of the quantized model over the tuned one, in percent, as a string. Default: no limit.", default=None
    )
    on_failure: Literal["Fail", "Warn"] = spec_field(
        "What happens above the limit, or when the shipped model is significantly worse on held-out rows than quantization after training or than the base "
        "model: Fail publishes nothing; Warn publishes and says so. Default Fail.",
        default="Fail",
    )


class DestinationSpec(ApiModel):
    """One place the artifacts go to."""

    uri: DestinationUri = spec_field("s3://bucket/prefix, hf://owner/name or file:///path (laptop only). No default.")
    credentials: SecretReference = spec_field("Secret with write access. Default: none.", default=SecretReference)
    endpoint: Endpoint = spec_field("S3 endpoint. Default: AWS.", default="")
    private: bool = spec_field(
        "Whether a Hub repository must be private: it is made so when it is created, and one that is not private is refused. Default false: an existing repository stays as it is.",
        default=False,
    )


class OutputsSpec(ApiModel):
    """What is shipped, and where to."""

    artifacts: tuple[Artifact, ...] = spec_field(
        "adapter and quantized (merged is not served yet). Default: adapter, and quantized unless the scheme is none.",
        default=(),
        max_length=3,
        not_yet="merged 16-bit models are not served yet; use adapter, quantized or both",
        served=("adapter", "quantized"),
    )
    destinations: tuple[DestinationSpec, ...] = spec_field("Where every artifact goes. At least one.", min_length=1, max_length=8)


class ResourcesSpec(ApiModel):
    """What the training pod asks for."""

    gpus: int = spec_field(
        "GPUs (nvidia.com/gpu) of the pod: 1, or 0 to train on the CPU; more are not served yet. Default 1.",
        default=1,
        ge=0,
        le=16,
        not_yet="more than one GPU is not served yet; use 1, or 0 for the CPU",
        served=(0, 1),
    )
    gpu_type: Annotated[str, StringConstraints(max_length=63)] = spec_field(
        "GPU that preflight holds the memory estimate against, such as nvidia-l4 (`finetune estimate` lists them). It chooses no node: "
        "scheduling.nodeSelector does. Default: none, so the GPU's memory is not checked.",
        default="",
    )
    nodes: int = spec_field(
        "Nodes of the job: 1; more are not served yet. Default 1.",
        default=1,
        ge=1,
        le=64,
        not_yet="more than one node is not served yet; use 1",
        served=(1,),
    )
    memory: Quantity = spec_field("Memory request and limit of the pod. Default 16Gi.", default="16Gi")
    cpu: Quantity = spec_field("CPU request of the pod; there is no CPU limit. Default 2.", default="2")


class Toleration(ApiModel):
    """A Kubernetes toleration."""

    key: LabelKey = spec_field("Taint key. Default: all keys, which needs operator Exists.", default="")
    operator: Literal["Exists", "Equal"] = spec_field("Exists (whatever the value) or Equal. Default Equal.", default="Equal")
    value: LabelValue = spec_field("Taint value for Equal; Exists takes none. Default: empty.", default="")
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = spec_field("Taint effect. Default: all effects.", default="")


class SchedulingSpec(ApiModel):
    """Where the pod may run."""

    node_selector: dict[str, LabelValue] = spec_field("Labels of the node. Default: none.", default=dict, max_length=16)
    tolerations: tuple[Toleration, ...] = spec_field("Taints the pod tolerates. Default: none.", default=(), max_length=16)
    priority_class_name: OptionalName = spec_field("PriorityClass of the pod. Default: the cluster's.", default="")
    runtime_class_name: OptionalName = spec_field("RuntimeClass of the pod. Default: the cluster's.", default="")
    queue_name: OptionalName = spec_field(
        "Kueue LocalQueue, not served yet. Default: none.", default="", not_yet="Kueue is not served yet; remove scheduling.queueName"
    )


class PodSpec(ApiModel):
    """The trainer's pod, within the administrator's allow lists."""

    image: Annotated[str, StringConstraints(max_length=512)] = spec_field(
        "Trainer image, if the administrator allows it. Default: the operator's.", default=""
    )
    image_pull_secrets: tuple[ObjectName, ...] = spec_field("Secrets for pulling the image. Default: none.", default=(), max_length=8)
    service_account_name: OptionalName = spec_field(
        "Service account, if the administrator allows it; its token is never mounted. Default: the namespace's default.", default=""
    )


class CacheSpec(ApiModel):
    """Where downloaded models are kept."""

    persistent_volume_claim: OptionalName = spec_field(
        "Claim that keeps downloaded models. Default: none, they go with the pod.", default=""
    )


class WorkspaceSpec(ApiModel):
    """Where outputs/, lora_model/ and model-torchao/ are written."""

    persistent_volume_claim: OptionalName = spec_field(
        "Claim for the working directory, which then outlasts the pod; each training has a folder of its own in it, and checkpoints are not mirrored. Default: none.",
        default="",
    )
    size: Quantity = spec_field("Space for checkpoints and artifacts, where there is no claim. Default 50Gi.", default="50Gi")
    storage_class_name: OptionalName = spec_field(
        "StorageClass of a volume that lives as long as the pod. Default: an emptyDir of that size.", default=""
    )


class CheckpointsSpec(ApiModel):
    """Where checkpoints are mirrored when the workspace does not last."""

    uri: CheckpointUri = spec_field(
        "s3://bucket/prefix; checkpoints lie in <trainDigest>/ under it, so two jobs of the same training need a prefix each: they would remove each other's. Default: .checkpoints under the first s3 "
        "destination. Ignored with a workspace claim.",
        default="",
    )
    credentials: SecretReference = spec_field("Secret with write access. Default: the destination's.", default=SecretReference)
    endpoint: Endpoint = spec_field("S3 endpoint. Default: the destination's.", default="")


class StorageSpec(ApiModel):
    """Volumes and the checkpoint mirror."""

    cache: CacheSpec = spec_field("Keeps downloaded models between jobs. Default: gone with the pod.", default=CacheSpec)
    workspace: WorkspaceSpec = spec_field("Working directory. Default: an emptyDir of 50Gi.", default=WorkspaceSpec)
    checkpoints: CheckpointsSpec = spec_field("Checkpoint mirror. Default: under the first s3 destination.", default=CheckpointsSpec)


class RunPolicySpec(ApiModel):
    """How the run is started, retried and cleaned up."""

    suspend: bool = spec_field(
        "Stop the pod (checkpointed) until set to false again. Default false.", default=False, field_class=FieldClass.LIVE
    )
    preflight: Literal["Auto", "Skip"] = spec_field(
        "Auto: a job that wants a GPU first gets a small Job without one, which checks spec, data, credentials and write access, and fills a cache "
        "claim with the model. Skip: the training pod does it, as without a GPU. Default Auto.",
        default="Auto",
    )
    rerun: Annotated[str, StringConstraints(max_length=64)] = spec_field(
        "Any new string asks for another run of a finished job. Default: empty.", default=""
    )
    backoff_limit: int = spec_field(
        "Retries after failures that may pass (disruptions are not counted). Default 3.",
        default=3,
        ge=0,
        le=20,
        field_class=FieldClass.LIVE,
    )
    active_deadline_seconds: int | None = spec_field(
        "Seconds after which a Job is stopped as failed, preflight's and the training's each; waiting for a node counts. Default: no limit. Resuming a suspended job restarts it.",
        default=None, ge=1, le=31536000, field_class=FieldClass.LIVE,
    )  # fmt: skip
    ttl_seconds_after_finished: int | None = spec_field(
        "Seconds after which the finished Job and its pods are removed; the FineTuneJob stays. Default: kept.",
        default=None, ge=0, le=31536000, field_class=FieldClass.LIVE,
    )  # fmt: skip


class FineTuneJobSpec(ApiModel):
    """What a user writes under `spec`."""

    model: ModelSpec = spec_field("The base model.", field_class=FieldClass.TRAIN)
    dataset: DatasetSpec = spec_field("The training data.", field_class=FieldClass.TRAIN)
    lora: LoraSpec = spec_field("The low-rank adapter.", default=LoraSpec, field_class=FieldClass.TRAIN)
    quantization: QuantizationSpec = spec_field("The low-bit format.", default=QuantizationSpec, field_class=FieldClass.TRAIN)
    training: TrainingSpec = spec_field("The optimizer's work.", default=TrainingSpec, field_class=FieldClass.TRAIN)
    quality: QualitySpec = spec_field("The gate before publishing.", default=QualitySpec, field_class=FieldClass.RUN)
    outputs: OutputsSpec = spec_field("What is shipped, and where to.", field_class=FieldClass.RUN)
    resources: ResourcesSpec = spec_field("What the pod asks for.", default=ResourcesSpec, field_class=FieldClass.RUN)
    scheduling: SchedulingSpec = spec_field("Where the pod may run.", default=SchedulingSpec, field_class=FieldClass.RUN)
    pod: PodSpec = spec_field("The trainer's pod.", default=PodSpec, field_class=FieldClass.RUN)
    storage: StorageSpec = spec_field("Volumes and the checkpoint mirror.", default=StorageSpec, field_class=FieldClass.RUN)
    run_policy: RunPolicySpec = spec_field("Starting, retrying, cleaning up.", default=RunPolicySpec, field_class=FieldClass.RUN)

    @property
    def wanted_artifacts(self) -> tuple[Artifact, ...]:
        """The artifacts that this job ships, with the default worked out."""
        if self.outputs.artifacts:
            return self.outputs.artifacts
        plain = self.quantization.scheme is Scheme.NONE
        return (Artifact.ADAPTER,) if plain else (Artifact.ADAPTER, Artifact.QUANTIZED)

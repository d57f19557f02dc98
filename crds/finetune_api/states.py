"""Every reason that a condition of a FineTuneJob may carry: what it means, and what to do. docs/status.md is generated from this table.

The operator takes its words from here, so that no state is shown that the page does not explain. Failures that a trainer reports by its exit
code have their words in exits.py.
"""

from dataclasses import dataclass
from enum import StrEnum

from finetune_api.exits import REASONS, ExitCode


class Reason(StrEnum):
    """Reasons that the operator gives by itself."""

    # Ready is False, Reconciling is True: it goes on without anybody.
    JOB_CREATED = "JobCreated"
    JOB_REFUSED = "JobRefused"
    CHANGE_REFUSED = "ChangeRefused"
    REPLACING = "Replacing"
    POD_NOT_CREATED = "PodNotCreated"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_CREATING = "ContainerCreating"
    POD_WAITING = "PodWaiting"
    RUNNING = "Running"
    NO_PROGRESS = "NoProgress"
    RETRYING = "Retrying"
    STOPPING = "Stopping"
    NODE_LOST = "NodeLost"
    SUSPENDING = "Suspending"
    # Ready is False and nothing is under way.
    SUSPENDED = "Suspended"
    # Ready is False, Stalled is True: a person must act.
    INVALID_SPEC = "InvalidSpec"
    NOT_ALLOWED = "NotAllowed"
    NAME_TAKEN = "NameTaken"
    OOM_KILLED = "OOMKilled"
    POD_DELETED = "PodDeleted"
    EVICTED = "Evicted"
    DISRUPTED = "Disrupted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    CHECKPOINTED_TOO_OFTEN = "CheckpointedTooOften"
    ERROR = "Error"
    JOB_FAILED = "JobFailed"
    # The milestones.
    TRAINED = "Trained"
    SHIPPED_MATCHES_TRAINED = "ShippedMatchesTrained"
    WITHIN_LIMIT = "WithinLimit"
    ABOVE_LIMIT = "AboveLimit"
    PUBLISHED = "Published"


@dataclass(frozen=True)
class State:
    """One row of the page.

    Attributes:
        seen: the phases, or the condition, in which the reason is seen.
        means: what is the case.
        action: what to do about it.
    """

    seen: str
    means: str
    action: str


_PENDING, _FAILED = "Pending", "Failed"

STATES: dict[str, State] = {
    REASONS[ExitCode.SUCCEEDED]: State("Succeeded", "everything that the job ships is published", "nothing"),
    Reason.JOB_CREATED: State(_PENDING, "the Job is made, and has no pod yet", "nothing"),
    Reason.JOB_REFUSED: State(
        _PENDING,
        "the API server takes no such Job: a quota is used up, an admission policy says no or its webhook does not answer, or (with Stalled) the pod is not valid",
        "free or raise the quota, mend the policy or the field that the message names; it is tried again by itself",
    ),
    Reason.CHANGE_REFUSED: State(
        "Pending, Running, Suspended",
        "the API server does not let the run's Job be changed as runPolicy asks (suspend, backoffLimit, activeDeadlineSeconds): an admission policy says no, or its webhook does not answer; the run goes on as it was",
        "take the edit back, or mend the policy that the message names; it is tried again by itself",
    ),
    Reason.REPLACING: State(_PENDING, "the Job or pod of an earlier spec is still ending; two trainers never run for one object", "nothing"),
    Reason.POD_NOT_CREATED: State(_PENDING, "the Job can't make its pod, such as for a quota on pods", "mend what the message names"),
    Reason.UNSCHEDULABLE: State(
        _PENDING, "no node can take the pod; the message has the scheduler's own reason", "lower resources, correct scheduling, or wait for a node"
    ),
    Reason.IMAGE_PULL_FAILED: State(_PENDING, "the trainer's image can't be pulled", "correct pod.image or pod.imagePullSecrets"),
    Reason.CONTAINER_CREATING: State(
        _PENDING, "the pod is starting; after 5 s the message has what keeps it, such as a volume that can't be mounted", "mend what the message names"
    ),
    Reason.POD_WAITING: State(_PENDING, "the kubelet can't start the container; the message has its word for why", "mend what the message names"),
    Reason.RUNNING: State("Running", "the trainer is at work; stage and progress say where", "nothing"),
    Reason.NO_PROGRESS: State(
        "Running",
        "no optimizer step was done for a long time (the operator's noProgressMinutes); nothing is stopped",
        "look at the pod's log and node; deleting the pod makes another one that resumes",
    ),
    Reason.RETRYING: State(_PENDING, "a pod ended in a failure that may pass; the Job waits before it makes the next one", "nothing, or mend what the message names"),
    Reason.STOPPING: State("Pending, Running", "the pod is being stopped, by a person, an eviction or a drain, and another one goes on from its checkpoint; or for good, as the message says; or the trainer has ended, and a sidecar keeps its pod from ending", "nothing, or [keep the sidecar out](installing.md#labels-and-annotations-of-the-pods-sidecars-autoscalers)"),
    Reason.NODE_LOST: State(
        "Running",
        "the pod's node does not answer; Kubernetes starts no other pod before it knows that this one has ended",
        "bring the node back, or delete its Node object: another pod resumes from the last checkpoint",
    ),
    Reason.SUSPENDING: State("Running", "runPolicy.suspend is true; the trainer saves its step and stops", "nothing"),
    Reason.SUSPENDED: State("Suspended", "runPolicy.suspend is true", "set it to false to go on"),
    Reason.INVALID_SPEC: State("Pending, Failed", "the spec is wrong, in a way that only the operator or the trainer sees", "mend the field that the message names"),
    Reason.NOT_ALLOWED: State(_PENDING, "the image or service account is not on the administrator's list", "remove it, or ask for it to be allowed"),
    Reason.NAME_TAKEN: State(_PENDING, "a Job of this run's name belongs to somebody else, and is never touched", "delete it, or set runPolicy.rerun"),
    REASONS[ExitCode.DATA]: State(_FAILED, "the dataset or the model's files are wrong", "mend the file and line that the message names, then set runPolicy.rerun"),
    REASONS[ExitCode.ACCESS]: State(_FAILED, "credentials are missing, wrong or not allowed", "do what the sentence says, then set runPolicy.rerun"),
    REASONS[ExitCode.CAPACITY]: State(_FAILED, "the node can't do it: memory, disk, no GPU, no kernel for the scheme", "ask for more, or for less"),
    REASONS[ExitCode.PROOF]: State(_FAILED, "the exported model is not the trained one; nothing was published", "report it"),
    REASONS[ExitCode.QUALITY]: State(_FAILED, "the shipped model lost more than quality.maxLossIncreasePercent, or is significantly worse than PTQ or the base model", "do what the sentence says, or set quality.onFailure to Warn"),
    REASONS[ExitCode.INFRASTRUCTURE]: State(_FAILED, "network, storage or a service failed, also after the retries", "mend the service, then set runPolicy.rerun"),
    REASONS[ExitCode.NOT_PUBLISHED]: State(_FAILED, "trained and verified, but an upload failed, also after the retries", "mend the destination, then set runPolicy.rerun"),
    REASONS[ExitCode.CHECKPOINTED]: State("Pending, Running", "the trainer was told to stop and saved its step; another pod goes on", "nothing"),
    Reason.OOM_KILLED: State(_FAILED, "the pod needed more memory than its limit, which a retry would need as well", "raise resources.memory, or lower training.maxLength"),
    Reason.POD_DELETED: State(_FAILED, "the pod was deleted, and its trainer was killed because it did not end in time", "set runPolicy.rerun: another pod resumes from the last checkpoint"),
    Reason.EVICTED: State("Pending, Failed", "the kubelet evicted the pod, mostly for disk space", "raise storage.workspace.size"),
    Reason.DISRUPTED: State("Pending, Failed", "a preemption, a drain or a lost node ended the pod; not counted as a failure", "nothing"),
    Reason.DEADLINE_EXCEEDED: State(_FAILED, "runPolicy.activeDeadlineSeconds is over", "raise it and set runPolicy.rerun"),
    Reason.CHECKPOINTED_TOO_OFTEN: State(_FAILED, "the trainer stopped by itself again and again, with nothing that disrupts it", "look at the pods' logs, then set runPolicy.rerun"),
    Reason.ERROR: State(_FAILED, "the trainer ended in a way that it did not foresee; the message has its last words", "report it"),
    Reason.JOB_FAILED: State(_FAILED, "the Job failed, and none of its pods is left to say why", "set runPolicy.rerun"),
    Reason.TRAINED: State("condition Trained", "the adapter is trained", "nothing"),
    Reason.SHIPPED_MATCHES_TRAINED: State("condition Verified", "the exported model computes what the trained one does", "nothing"),
    Reason.WITHIN_LIMIT: State("condition QualityPassed", "the held-out loss is within quality.maxLossIncreasePercent, and not significantly above PTQ's or the base model's", "nothing"),
    Reason.ABOVE_LIMIT: State("condition QualityPassed", "it is above one of them, and quality.onFailure is Warn", "look at the losses in status.quality"),
    Reason.PUBLISHED: State("condition Published", "every artifact is at every destination", "nothing"),
}  # fmt: skip

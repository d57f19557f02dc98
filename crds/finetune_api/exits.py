"""The trainer's exit codes and what each means to Kubernetes and to a user.

The trainer exits with them, the operator builds the Job's podFailurePolicy from them. Never 1 and 2 (Python, shells), 120 (Python's
failed flush), or 126 and above (shells and signals).
"""

from enum import IntEnum


class ExitCode(IntEnum):
    """How a training run ended."""

    SUCCEEDED = 0
    SPEC = 10  # the job description is wrong
    DATA = 11  # the dataset or the model's files are wrong
    ACCESS = 12  # credentials are missing, wrong or not allowed (401, 403, no such Secret)
    CAPACITY = 13  # this machine can't do it: memory, disk, no kernel for the scheme
    PROOF = 14  # the exported model is not the trained one
    QUALITY = 15  # the quality gate refused the model
    INFRASTRUCTURE = 16  # network, storage or a service failed: a retry may pass
    NOT_PUBLISHED = 17  # trained, but an upload failed: a retry resumes at publishing
    CHECKPOINTED = 18  # stopped by SIGTERM after saving the last completed step


# CamelCase, as conditions and status messages name them.
REASONS: dict[ExitCode, str] = {
    ExitCode.SUCCEEDED: "Succeeded",
    ExitCode.SPEC: "InvalidSpec",
    ExitCode.DATA: "InvalidData",
    ExitCode.ACCESS: "AccessDenied",
    ExitCode.CAPACITY: "InsufficientCapacity",
    ExitCode.PROOF: "ProofFailed",
    ExitCode.QUALITY: "QualityGateFailed",
    ExitCode.INFRASTRUCTURE: "InfrastructureError",
    ExitCode.NOT_PUBLISHED: "NotPublished",
    ExitCode.CHECKPOINTED: "Checkpointed",
}

# A retry on the same inputs can't pass.
PERMANENT: tuple[ExitCode, ...] = (ExitCode.SPEC, ExitCode.DATA, ExitCode.ACCESS, ExitCode.PROOF, ExitCode.QUALITY)
OOM_KILLED = 137

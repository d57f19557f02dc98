"""Names that both halves agree on: the Job's name, labels, the pod's paths and port. Pure strings, nothing else."""

import hashlib

from finetune_api.spec import GROUP

LABEL_JOB = f"{GROUP}/job"  # the FineTuneJob's name, hashed when it is longer than a label value may be
LABEL_RUN = f"{GROUP}/run"  # the first 16 hex digits of the runDigest
MANAGED_BY = "finetune-operator"

ENV_JOB = "FINETUNE_JOB"  # the resolved job description (job.py), as JSON
CONTAINER = "trainer"
PROGRESS_PORT = 8080
TERMINATION_LOG = "/dev/termination-log"
WORKDIR = "/workspace"
CACHE_DIR = "/cache"
HOME_DIR = "/home/finetune"  # writable emptyDir: HOME, TMPDIR and compiler caches under the read-only root
VOLUMES_ROOT = "/var/run/finetune/volumes"  # pvc:// and configmap:// sources: <root>/<role>/<path>

OUTPUTS = "outputs"  # checkpoints
ADAPTER = "lora_model"
QUANTIZED = "model-torchao"
REPORT = "report.json"
PROOF = "proof"  # for anyone who wants to check the proof again
PROOF_REFERENCE = "reference.safetensors"  # token ids, mask and the trained model's logits
PROOF_EXPECTED = "expected.json"  # a digest of every weight that training used, and how the logits were computed
MANIFEST = "manifest.json"

_NAME_LIMIT = 63
_HASH_DIGITS = 10


def training_job_name(name: str, uid: str, run_digest: str) -> str:
    """At most 63 characters; the same inputs give the same name, so that creating it twice is harmless."""
    suffix = hashlib.sha256(f"{name}/{uid}/{run_digest}".encode()).hexdigest()[:_HASH_DIGITS]
    stem = name.replace(".", "-")[: _NAME_LIMIT - _HASH_DIGITS - 1 - len("-pre")].rstrip("-")
    return f"{stem}-{suffix}"


def preflight_job_name(training_job: str) -> str:
    """The Job that runs before a training Job; training_job_name leaves it room."""
    return f"{training_job}-pre"


def job_label(name: str) -> str:
    """A label value for the FineTuneJob's name (label values end at 63 characters)."""
    if len(name) <= _NAME_LIMIT:
        return name
    return f"{name[: _NAME_LIMIT - _HASH_DIGITS - 1]}-{hashlib.sha256(name.encode()).hexdigest()[:_HASH_DIGITS]}"


def run_label(run_digest: str) -> str:
    """A label value for a runDigest."""
    return run_digest[:16]

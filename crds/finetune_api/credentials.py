"""Which credentials a pod may carry: one Secret a role, mounted read-only, with a fixed list of keys.

Never environment variables from the Secret itself: two S3 Secrets would collide, and a key named LD_PRELOAD would be code.
"""

from collections.abc import Iterator

from finetune_api.spec import FineTuneJobSpec

MOUNT_ROOT = "/var/run/finetune/credentials"
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION")
HUB_KEYS = ("HF_TOKEN",)
ACCEPTED_KEYS = (*S3_KEYS, *HUB_KEYS)

MODEL = "model"
DATASET = "dataset"
CHECKPOINTS = "checkpoints"


def destination_role(index: int) -> str:
    """The role of the destination at `index` of spec.outputs.destinations."""
    return f"destination-{index}"


def secrets_by_role(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    """(role, Secret name) of every Secret that the spec refers to."""
    candidates = [
        (MODEL, spec.model.credentials),
        (DATASET, spec.dataset.credentials),
        (CHECKPOINTS, spec.storage.checkpoints.credentials),
        *((destination_role(index), item.credentials) for index, item in enumerate(spec.outputs.destinations)),
    ]
    return ((role, reference.secret_name) for role, reference in candidates if reference.secret_name)

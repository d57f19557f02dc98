"""Opens S3 and the Hub as the user of a role: key files of a mounted Secret in a cluster, the ambient chain on a laptop.

Used by sources/, destinations/ and mirror.py. Must not put a credential into the environment, a log or a message.
"""

from pathlib import Path
from typing import Any

from finetune_api.credentials import HUB_KEYS, MOUNT_ROOT, S3_KEYS, secrets_by_role

from finetune_trainer.context import RunContext
from finetune_trainer.errors import AccessError
from finetune_trainer.sources.s3_errors import mark_unsigned
from finetune_trainer.sources.tls_errors import unreadable_authorities

CONNECT_TIMEOUT_SECONDS = 3
READ_TIMEOUT_SECONDS = 60
HUB_TIMEOUT_SECONDS = 120
FAST_ATTEMPTS = 2
PATIENT_ATTEMPTS = 6


def note_ambient(ctx: RunContext) -> None:
    """Says once that Secrets are ignored outside a cluster, where the job names some."""
    named = sorted({secret for _, secret in secrets_by_role(ctx.spec)})
    if named and not ctx.job.in_cluster:
        listed = ", ".join(named)
        ctx.reporter.note(
            f"Not in a cluster: the Secrets that the job names ({listed}) are ignored; "
            "credentials come from the environment, ~/.aws or this machine's Hub token."
        )


def s3_client(ctx: RunContext, role: str, endpoint: str, *, patient: bool = True) -> Any:
    """A boto3 S3 client for a role.

    Args:
        ctx: the run.
        role: whose Secret (finetune_api.credentials).
        endpoint: S3 endpoint; empty means AWS, or AWS_ENDPOINT_URL on a laptop.
        patient: many attempts, for transfers; else two, for checks that must end within seconds.

    Raises:
        AccessError: the Secret is missing, or lacks AWS_ACCESS_KEY_ID or AWS_SECRET_ACCESS_KEY.
    """
    import boto3
    import botocore.session

    keys = _secret_keys(ctx, role, S3_KEYS, required=S3_KEYS[:2])
    core = botocore.session.get_session()
    if ctx.job.in_cluster:
        # Without a Secret, a pod may use an identity that was given to it, but never borrow its node's.
        core.get_component("credential_provider").remove("iam-role")
    session = boto3.session.Session(
        aws_access_key_id=keys.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=keys.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=keys.get("AWS_SESSION_TOKEN"),
        region_name=keys.get("AWS_REGION") or core.get_config_variable("region") or "us-east-1",
        botocore_session=core,
    )
    client = session.client("s3", endpoint_url=endpoint or None, config=_config(session, endpoint, patient))
    if session.get_credentials() is None:
        client.meta.events.register("after-call.s3", mark_unsigned)
    return client


def _config(session: Any, endpoint: str, patient: bool) -> Any:
    from botocore import UNSIGNED
    from botocore.config import Config

    options: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT_SECONDS,
        "read_timeout": READ_TIMEOUT_SECONDS,
        "retries": {"mode": "standard", "total_max_attempts": PATIENT_ATTEMPTS if patient else FAST_ATTEMPTS},
    }
    if endpoint:
        # Servers other than AWS rarely have a DNS name for each bucket.
        options["s3"] = {"addressing_style": "path"}
    if session.get_credentials() is None:
        options["signature_version"] = UNSIGNED  # public buckets need no key
    return Config(**options)


def hub_token(ctx: RunContext, role: str) -> str | bool:
    """The Hub token of a role; False means that requests carry none.

    Raises:
        AccessError: the Secret is missing, or lacks HF_TOKEN.
    """
    from huggingface_hub import get_token

    if not ctx.job.in_cluster:
        return get_token() or False
    return _secret_keys(ctx, role, HUB_KEYS, required=HUB_KEYS).get(HUB_KEYS[0], False)


def hub_api(ctx: RunContext, role: str) -> Any:
    """A huggingface_hub client for a role; HF_ENDPOINT chooses the server.

    Raises:
        AccessError: the Secret is missing, or lacks HF_TOKEN; or SSL_CERT_FILE names no file of certificates.
    """
    from huggingface_hub import HfApi, get_session

    try:
        session = get_session()
    except OSError as error:  # it reads the file of authorities
        raise unreadable_authorities("SSL_CERT_FILE") from error
    # The library sets no limit of its own: a server that stops answering would hang the run for ever.
    session.timeout = (CONNECT_TIMEOUT_SECONDS, *[HUB_TIMEOUT_SECONDS] * 3)
    return HfApi(token=hub_token(ctx, role), library_name="finetune-operator")


def _secret_keys(ctx: RunContext, role: str, accepted: tuple[str, ...], required: tuple[str, ...]) -> dict[str, str]:
    """The accepted keys of a role's mounted Secret; empty outside a cluster and where the job names no Secret."""
    secret = dict(secrets_by_role(ctx.spec)).get(role, "")
    if not secret or not ctx.job.in_cluster:
        return {}
    folder = Path(MOUNT_ROOT) / role
    present = {name: folder / name for name in accepted if (folder / name).is_file()}
    if not folder.is_dir() or not any(folder.iterdir()):
        raise AccessError(
            f"Secret {secret!r} does not exist in namespace {ctx.job.namespace!r} or is empty; create it with the keys {_listed(required)}."
        )
    values = {name: _read_key(path, secret) for name, path in present.items()}
    missing = [name for name in required if not values.get(name)]
    if missing:
        raise AccessError(f"Secret {secret!r} lacks {_listed(missing)}; the accepted keys are {_listed(accepted)}.")
    return values


def _read_key(path: Path, secret: str) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise AccessError(f"Key {path.name} of Secret {secret!r} is not readable text; store the plain value.") from error


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return " and ".join(names) if len(names) < 3 else ", ".join(names)

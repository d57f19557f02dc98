"""Turns what boto3 raises into one sentence of the typed hierarchy. Used by sources/, destinations/ and mirror.py.

A bucket that does not exist is an access error (a stranger is told no more), and so is a certificate that is not trusted; a missing object is
a data error, a server that is out of reach an infrastructure error. Messages quote error codes only, never the server's text: it may echo keys.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from finetune_trainer.errors import AccessError, CapacityError, DataError, FineTuneError, InfrastructureError, SpecError
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.tls_errors import tls_error

_KEY_ERRORS = {
    "InvalidAccessKeyId": "the server does not know this access key; correct AWS_ACCESS_KEY_ID",
    "XAdminUserNotFound": "the server does not know this access key; correct AWS_ACCESS_KEY_ID",  # versitygw's word for it
    "SignatureDoesNotMatch": "the secret key does not fit the access key; correct AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired; renew AWS_SESSION_TOKEN",
    "InvalidToken": "the session token is not valid; renew AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect": "the bucket is in another region; set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set AWS_REGION",
    "NoSuchBucket": "the bucket does not exist, or these credentials may not see it; create it or correct its name",
}
_REFUSED = "these credentials may not do this, or the access key or secret key is wrong; correct the credentials or the bucket's policy"
_UNSIGNED = "FinetuneUnsigned"
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "SSOTokenLoadError",
    "UnauthorizedSSOTokenError",
}


def mark_unsigned(parsed: dict[str, Any], **_: Any) -> None:
    """Notes in an answer that its request had no credentials; a client that has none calls it after each request."""
    parsed.setdefault("ResponseMetadata", {})[_UNSIGNED] = True


@contextmanager
def s3_errors(where: Location) -> Iterator[None]:
    """Raises the typed error for anything that boto3, or the disk under a download, raises inside.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except FineTuneError:
        raise
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise translate(error, where) from error
    except OSError as error:
        raise disk_error(error, where) from error
    except ValueError as error:  # botocore's word for an endpoint that is no URL
        raise SpecError(f"{where.field}: the endpoint {where.endpoint!r} is not a URL; write https://host.") from error


def translate(error: BaseException, where: Location) -> FineTuneError:
    """The typed error for one of boto3's, naming the field, the URI and the mend."""
    from botocore.exceptions import ClientError

    subject = f"{where.field}: {where.uri}"
    root = _root(error)
    if isinstance(root, ClientError):
        return _of_response(root, where)
    name = type(root).__name__
    if name in _NO_CREDENTIALS:
        return AccessError(f"{subject} needs credentials, and this machine has none that work ({name}); {_give_credentials(where)}.")
    if name == "ParamValidationError":
        return SpecError(f"{subject} has no valid bucket name or key; write s3://bucket/key.")
    server = where.endpoint or "the S3 endpoint"
    refused = tls_error(error, where, server, "AWS_CA_BUNDLE")
    if refused is not None:
        return refused
    return InfrastructureError(f"{subject} could not be reached at {server} ({name}); check the endpoint and the network.")


def disk_error(error: OSError, where: Location) -> FineTuneError:
    """The typed error for a download's or upload's own file."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CapacityError(
            f"{where.field}: the disk is full while {where.uri} is transferred; give the cache or the workspace more space."
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return CapacityError(
            f"{where.field}: {error.filename!r} is not writable, so {where.uri} has no place; choose another cache folder."
        )
    return InfrastructureError(f"{where.field}: {where.uri} could not be transferred ({type(error).__name__}); try again.")


def error_code(error: BaseException) -> str:
    """The S3 error code of boto3's exception, such as NoSuchKey; empty when there is none."""
    return str(getattr(_root(error), "response", {}).get("Error", {}).get("Code", ""))


def _give_credentials(where: Location) -> str:
    if where.laptop:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
    return f"name a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in {where.secret_field}"


def _root(error: BaseException) -> BaseException:
    """The exception inside the wrappers of boto3's transfers."""
    inner = getattr(error, "last_exception", None)
    if type(error).__name__ in ("S3UploadFailedError", "RetriesExceededError", "S3TransferFailedError"):
        inner = inner or error.__cause__ or error.__context__
    return _root(inner) if inner is not None else error


def _of_response(error: BaseException, where: Location) -> FineTuneError:
    subject, code = f"{where.field}: {where.uri}", error_code(error)
    answer = getattr(error, "response", {}).get("ResponseMetadata", {})
    status = int(answer.get("HTTPStatusCode", 0))
    if status in (401, 403) and _UNSIGNED in answer:
        return AccessError(f"{subject}: no credentials were given, and the server asks for some ({code}); {_give_credentials(where)}.")
    if code in _KEY_ERRORS:
        return AccessError(f"{subject}: {_KEY_ERRORS[code]} ({code}).")
    if status in (401, 403):
        return AccessError(f"{subject}: {_REFUSED} ({code}).")
    if code in ("NoSuchKey", "NoSuchVersion", "404"):
        return DataError(f"{subject} does not exist; correct the key.")
    if code == "InvalidBucketName":
        return SpecError(f"{subject} has no valid bucket name; write s3://bucket/key.")
    if code in ("BadDigest", "XAmzContentSHA256Mismatch", "InvalidDigest"):
        return InfrastructureError(f"{subject}: the server received other bytes than were sent ({code}); try again.")
    if code == "PreconditionFailed":
        return InfrastructureError(f"{subject} changed while it was transferred; try again.")
    return InfrastructureError(f"{subject}: the server answered {status} {code}; try again later.")

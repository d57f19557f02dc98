"""Turns what huggingface_hub raises into one sentence of the typed hierarchy. Used by sources/hub.py and destinations/hub.py.

A repository that does not exist is an access error (the Hub hides private ones from strangers), and so is a certificate that is not trusted;
a missing revision or file is a data error, a Hub that can't be reached an infrastructure error. Messages never quote the server's text.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from finetune_trainer.errors import AccessError, DataError, FineTuneError, InfrastructureError, SpecError
from finetune_trainer.sources.location import Location
from finetune_trainer.sources.s3_errors import disk_error
from finetune_trainer.sources.tls_errors import tls_error


@contextmanager
def hub_errors(where: Location, *, tokenless: bool = False) -> Iterator[None]:
    """Raises the typed error for anything that huggingface_hub, or the disk under a download, raises inside.

    Args:
        where: what is opened.
        tokenless: whether it is opened without a token.

    Raises:
        AccessError, CapacityError, DataError, InfrastructureError, SpecError
    """
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError  # HTTPError of the client that it uses

    try:
        yield
    except FineTuneError:
        raise
    except HFValidationError as error:
        raise SpecError(f"{where.field}: {where.uri} is not a Hub repository's name; write hf://owner/name.") from error
    except LocalEntryNotFoundError as error:  # what a download raises for a Hub that did not answer; the cause, if any, says more
        raise translate(error.__cause__ or error, where, tokenless=tokenless) from error
    except HTTPError as error:
        raise translate(error, where, tokenless=tokenless) from error
    except OSError as error:
        raise disk_error(error, where) from error
    except RuntimeError as error:  # the wrapper around what went wrong with one large file's upload
        if isinstance(error.__cause__, HTTPError):
            raise translate(error.__cause__, where, tokenless=tokenless) from error
        if isinstance(error.__cause__, OSError):
            raise disk_error(error.__cause__, where) from error
        raise


def give_token(where: Location) -> str:
    """How a token is given to what has none, as the end of a sentence."""
    return "set HF_TOKEN or run hf auth login" if where.laptop else f"name a Secret with HF_TOKEN in {where.secret_field}"


def translate(error: BaseException, where: Location, *, tokenless: bool = False) -> FineTuneError:
    """The typed error for one of huggingface_hub's, naming the field, the URI and the mend."""
    from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    subject = f"{where.field}: {where.uri}"
    status = getattr(getattr(error, "response", None), "status_code", 0)
    unknown = _without_token(error, status, where) if tokenless else None
    if unknown is not None:
        return unknown
    if isinstance(error, GatedRepoError):
        return AccessError(f"{subject} is gated; accept its terms on the Hub and use a token of that account (key HF_TOKEN).")
    if isinstance(error, RevisionNotFoundError):
        return DataError(f"{subject} has no such revision; correct the branch, tag or commit after '@'.")
    if isinstance(error, RemoteEntryNotFoundError):
        return DataError(f"{subject} has no such file; correct the path.")
    if isinstance(error, RepositoryNotFoundError):
        return AccessError(
            f"{subject} does not exist on the Hub, or this token may not see it; correct the name or give a token that may (key HF_TOKEN)."
        )
    if status in (401, 403):
        return AccessError(
            f"{subject}: the Hub refused the token ({status}); give one that is valid and allowed to do this (key HF_TOKEN)."
        )
    if status == 404:
        return DataError(f"{subject} has no such file or revision; correct it.")
    if status:
        return InfrastructureError(f"{subject}: the Hub answered {status}; try again later.")
    refused = tls_error(error, where, hub_host(), "SSL_CERT_FILE")
    if refused is not None:
        return refused
    return InfrastructureError(
        f"{subject}: the Hub at {hub_host()} could not be reached ({type(error).__name__}); check HF_ENDPOINT and the network."
    )


def _without_token(error: BaseException, status: int, where: Location) -> AccessError | None:
    """What a Hub that shows itself to known accounts alone has refused; None for anything else."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    subject, give = f"{where.field}: {where.uri}", give_token(where)
    if isinstance(error, GatedRepoError):
        return AccessError(f"{subject} is gated, and no token was given; accept its terms on the Hub and {give}.")
    if isinstance(error, RepositoryNotFoundError):
        return AccessError(f"{subject} does not exist on the Hub, or is private, and no token was given; correct the name, or {give}.")
    if status in (401, 403):
        return AccessError(f"{subject}: the Hub refused the request ({status}), and no token was given; {give}.")
    return None


def hub_host() -> str:
    """Name of the Hub's host, without a port or credentials that HF_ENDPOINT may carry."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "its address"

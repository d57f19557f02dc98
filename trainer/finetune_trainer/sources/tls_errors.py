"""Tells from network trouble what no retry mends: a server whose certificate this machine does not trust, or that has no TLS.

Used by s3_errors.py and hub_errors.py. Never quotes a certificate: its names are the server's text.
"""

import os
import ssl
from collections.abc import Iterator

from finetune_trainer.errors import AccessError, FineTuneError, SpecError
from finetune_trainer.sources.location import Location

_OUT_OF_DATE = (9, 10)  # OpenSSL's numbers: not yet valid, expired
_OTHER_NAME = (62, 64)  # the name, the IP address


def tls_error(error: BaseException, where: Location, server: str, variable: str) -> FineTuneError | None:
    """The typed error for a failure of TLS among this one's causes; None where there is none, or one that may pass.

    Args:
        error: what a client has raised.
        where: what was opened.
        server: its address, for the sentence.
        variable: environment variable that names a file of authorities to this client.
    """
    causes = tuple(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError) or type(cause).__name__ == "CertificateError":  # urllib3's own
            return AccessError(_untrusted(cause, where, server, variable))
    for cause in causes:
        if isinstance(cause, ssl.SSLError) and cause.reason == "WRONG_VERSION_NUMBER" and where.scheme == "s3" and where.endpoint:
            plain = where.endpoint.replace("https://", "http://", 1)
            return SpecError(f"{where.field}: {server} answers without TLS; write {plain}, or the port that has TLS.")
    if any(type(cause).__name__ == "SSLError" for cause in causes) and any(_is_unreadable(cause) for cause in causes):
        return unreadable_authorities(variable, "REQUESTS_CA_BUNDLE")  # only botocore gets this far without its file
    return None


def unreadable_authorities(*variables: str) -> AccessError:
    """A file of authorities that is missing or something else; the first variable that is set names it, or none where an AWS profile does."""
    found = [f"{name} is {os.environ[name]!r}" for name in variables if os.environ.get(name)]
    named = found[0] if found else "The AWS profile has a ca_bundle"
    return AccessError(f"{named}, which is no readable file of certificates in PEM form; correct it.")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_unreadable(cause: BaseException) -> bool:
    if isinstance(cause, ssl.SSLError):
        return cause.library in ("X509", "PEM")
    return isinstance(cause, FileNotFoundError | IsADirectoryError | NotADirectoryError | PermissionError)


def _untrusted(cause: BaseException, where: Location, server: str, variable: str) -> str:
    subject = f"{where.field}: {where.uri}: the certificate of {server}"
    code = getattr(cause, "verify_code", _OTHER_NAME[0])
    if code in _OUT_OF_DATE:
        return f"{subject} has expired or is not valid yet; renew it, or set this machine's clock."
    if code in _OTHER_NAME:
        return f"{subject} is for another name; write the name that it is for, or give the server a certificate for this one."
    why = getattr(cause, "verify_message", "")
    if where.laptop:
        return f"{subject} is not trusted ({why}); set {variable} to a file with its authority's certificate."
    return (
        f"{subject} is not trusted ({why}); put its authority's certificate into the ConfigMap of the chart's trainer.caBundle, "
        f"or into a file that {variable} names."
    )

"""Takes credentials and control characters out of text that ends in a status, since that text comes from a container. Pure."""

import re

_LIMIT = 1024
_NAMES = r"authorization|x-amz-(?:signature|credential|security-token)|token|password|secret(?:_?access_?key)?"
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s?#]+@"), "***@"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}"), r"\1***"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{16,}"), r"\1 ***"),
    # No word boundary before the name (AWS_SECRET_ACCESS_KEY=), and quotes around both (JSON). A scheme such as Bearer is not the secret yet.
    (re.compile(rf"(?i)({_NAMES})([\"']?\s*[=:]\s*[\"']?)(?:(?:bearer|basic)\s+)?[^\s&,;\"']+"), r"\1=***"),
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def clean(text: str, limit: int = _LIMIT) -> str:
    """One line of at most `limit` characters without credentials."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    text = _CONTROL.sub(" ", text).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"

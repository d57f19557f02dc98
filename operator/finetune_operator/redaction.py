"""Takes credentials and control characters out of text that ends in a status, since that text comes from a container. Pure."""

import re

_LIMIT = 1024
_SECRETS = (
    (re.compile(r"(?<=://)[^/\s@]+@"), "***@"),
    (re.compile(r"\bhf_[A-Za-z0-9]{8,}"), "hf_***"),
    (re.compile(r"\b(AKIA|ASIA)[A-Z0-9]{12,}"), r"\1***"),
    (re.compile(r"(?i)\b(authorization|bearer|x-amz-(?:signature|credential|security-token)|token|password|secret(?:_access_key)?)(\s*[=:]\s*|\s+(?=[A-Za-z0-9._-]{16,}))[^\s&,;\"']+"), r"\1=***"),
)  # fmt: skip
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def clean(text: str, limit: int = _LIMIT) -> str:
    """One line of at most `limit` characters without credentials."""
    for pattern, shown in _SECRETS:
        text = pattern.sub(shown, text)
    text = _CONTROL.sub(" ", text).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"

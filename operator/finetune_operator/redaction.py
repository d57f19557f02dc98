"""Takes credentials and control characters out of text that ends in a status, since that text comes from a container. Pure."""

import re

from finetune_api.redaction import without_secrets

_LIMIT = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def clean(text: str, limit: int = _LIMIT) -> str:
    """One line of at most `limit` characters without credentials."""
    text = _CONTROL.sub(" ", without_secrets(text)).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"

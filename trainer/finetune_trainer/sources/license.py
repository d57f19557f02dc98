"""What a base model's own card says of its licence: a model made from it is under the same one, and the Hub shows what the card states.

A prefix of S3 is not asked: its README.md is no part of what is downloaded.
"""

from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urljoin

import yaml

_KEYS = ("license", "license_name", "license_link")


class Card(Protocol):
    """A card's front matter: a dict, or the Hub's own class for it."""

    def get(self, key: str, /) -> Any:
        """The value, or None."""


def stated_license(card: Card, home: str = "") -> dict[str, Any]:
    """The front matter's `license`, and for one that has no identifier its name and link; empty where the card states none.

    Args:
        home: the address that a relative link of the card stands under; without one it stays as it is.
    """
    found = {key: value for key in _KEYS if (value := card.get(key))}
    if "license" not in found:
        return {}
    link = found.get("license_link")
    return found | {"license_link": urljoin(home, link)} if home and isinstance(link, str) else found


def license_of_folder(folder: Path) -> dict[str, Any]:
    """What the README.md of a model's folder states; empty where there is none, or its front matter is none."""
    from huggingface_hub.repocard import metadata_load

    try:
        return stated_license(metadata_load(folder / "README.md") or {})
    except (OSError, ValueError, yaml.YAMLError):
        return {}

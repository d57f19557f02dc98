"""Secrets that a test would know again anywhere, in the forms of real ones, and where they turned up: canaries in a coal mine."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass, field

from support.kubernetes import Cluster

# Nobody's: the shapes of AWS' and the Hub's keys.
ACCESS_KEY = "AKIACANARYCANARY2345"
SECRET_KEY = "CanarySecretKey0/abcdefghijkl+MNOPQRSTUV"
SESSION_TOKEN = "IQoJb3JpZ2luX2VjCanarySession/7890+abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789=="
HUB_TOKEN = "hf_CanaryHubTokenabcdefghijklmnopqrst"
ROW = "canary of a private row, https://me:canary-of-a-password@example.com"
S3_SECRET = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_SESSION_TOKEN": SESSION_TOKEN}
HUB_SECRET = {"HF_TOKEN": HUB_TOKEN}
ALL = (*S3_SECRET.values(), HUB_TOKEN, ROW)

_WINDOW = 10  # characters in a row that are nobody's coincidence
_SHAPES = ("hf_", "AKIA")


@dataclass
class Watch:
    """Looks for canaries in texts.

    Attributes:
        canaries: what must not be found, whole or a part of it.
        texts: how many were read, so that a test can say that it looked at all.
    """

    canaries: Iterable[str]
    texts: int = 0
    found: list[str] = field(default_factory=list)

    def read(self, place: str, text: str) -> None:
        """Notes every part of a canary, plain or in base64, that the text of this place holds."""
        self.texts += bool(text)
        for canary in self.canaries:
            for form in (canary, base64.b64encode(canary.encode()).decode()):
                self.found += [f"{place}: ...{part}..." for part in _parts(form) if part in text][:1]


def read_objects(watch: Watch, kube: Cluster, namespace: str, *, pods: bool) -> None:
    """Reads what people see of a namespace's jobs: FineTuneJobs with their status, Jobs, Events; and pods with what they logged.

    Args:
        pods: whether the pods' own words count too; not where a stand-in was asked to tell its Secrets.
    """
    for kind in ("finetunejobs", "jobs", "events", *(["pods"] if pods else [])):
        watch.read(f"{kind} of {namespace}", kube.kubectl("get", kind, "-n", namespace, "-o", "yaml").stdout)
    for pod in kube.get("pods", "-n", namespace)["items"] if pods else ():
        name = pod["metadata"]["name"]
        watch.read(f"log of {name}", kube.kubectl("logs", "-n", namespace, name, check=False).stdout)


def _parts(canary: str) -> list[str]:
    """Every run of characters that gives it away; the prefix that all keys of its kind have does not."""
    prefix = next((shape for shape in _SHAPES if canary.startswith(shape)), "")
    rest = canary.removeprefix(prefix)
    return [rest[start : start + _WINDOW] for start in range(max(1, len(rest) - _WINDOW + 1))]

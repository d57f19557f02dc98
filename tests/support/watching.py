"""What the API server says of some objects, each time with its moment: for tests of how soon the status tells, and of every transition it makes."""

import json
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.kubernetes import Cluster
from support.simulated_cluster import broken_status_rules

Json = dict[str, Any]

FINETUNEJOBS = "/apis/finetune.dev/v1alpha1/finetunejobs"
PODS = "/api/v1/pods"
EVENTS = "/api/v1/events"


@dataclass(frozen=True)
class Seen:
    """One word of a watch.

    Attributes:
        at: when it came, in seconds of the monotonic clock.
        kind: ADDED, MODIFIED or DELETED.
        object: as it was then.
    """

    at: float
    kind: str
    object: Json

    @property
    def name(self) -> str:
        """The object's name."""
        return str(self.object["metadata"]["name"])


class Watch:
    """A watch of all objects of one kind in the cluster, from now on; opened anew where it ends, as it does when a CRD changes."""

    def __init__(self, kube: Cluster, path: str) -> None:
        self._command = kube.kubectl_command("get", "--raw", f"{path}?watch=1")
        self._seen: list[Seen] = []
        self._is_stopped = False
        self._process = self._open()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def seen(self) -> list[Seen]:
        """Everything so far, in order."""
        return list(self._seen)

    def first(self, condition: Callable[[Json], Any]) -> Seen | None:
        """The first word of an object that the condition holds for."""
        return next((seen for seen in self.seen if condition(seen.object)), None)

    def stop(self) -> None:
        """Ends the watch."""
        self._is_stopped = True
        while self._reader.is_alive():
            self._process.terminate()
            self._reader.join(0.1)

    def _open(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def _read(self) -> None:
        while not self._is_stopped:
            assert self._process.stdout is not None
            with self._process.stdout as lines:
                for line in lines:
                    event = json.loads(line)
                    if event["type"] != "ERROR":
                        self._seen.append(Seen(time.monotonic(), event["type"], event["object"]))
            self._process.wait()
            if not self._is_stopped:
                self._process = self._open()
        self._process.wait()


@dataclass
class StatusRules:
    """Holds every status that a watch of FineTuneJobs shows against the rules of kstatus, and its transition times against the one before.

    Attributes:
        exempt: names of objects whose status a test itself has written.
    """

    exempt: set[str] = field(default_factory=set)

    def broken(self, seen: list[Seen]) -> list[str]:
        """What is broken, as sentences that begin with the object's name."""
        told: list[str] = []
        before: dict[str, Json] = {}
        for item in seen:
            status, uid = item.object.get("status") or {}, item.object["metadata"]["uid"]
            if item.kind == "DELETED" or not status or item.name in self.exempt:
                continue
            rules = broken_status_rules(status, item.object["metadata"]["generation"]) + broken_times(before.get(uid, {}), status)
            told += [f"{item.name}: {rule}: {json.dumps(status)}" for rule in rules]
            before[uid] = status
        return told


def broken_times(before: Json, after: Json) -> list[str]:
    """The conditions whose transition time moved although their status did not, or moved back."""
    old = {item["type"]: item for item in before.get("conditions", ())}
    pairs = [(old[item["type"]], item) for item in after.get("conditions", ()) if item["type"] in old]
    return [
        f"{new['type']}.lastTransitionTime changes only with the status"
        for was, new in pairs
        if (
            new["lastTransitionTime"] != was["lastTransitionTime"]
            if new["status"] == was["status"]
            else new["lastTransitionTime"] < was["lastTransitionTime"]
        )
    ]

"""Events on a FineTuneJob, at most four a run: Created, Started, Succeeded or Failed, Published. Pure; used by decide.py.

They are made from what a status write changes and sent after it is stored, so that nobody sees an event for a state that was never stored. The name
of an event is made of run and reason: when another pass, or another operator, makes the same event, the API server refuses it.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from finetune_api import names
from finetune_api.spec import API_VERSION, KIND
from finetune_api.states import Reason
from finetune_api.status import FineTuneJobStatus, Phase

from finetune_operator.observed import timestamp
from finetune_operator.redaction import clean
from finetune_operator.subject import FINAL, FineTuneJob, Json, Subject

CREATED, STARTED, PUBLISHED = "Created", "Started", "Published"
_NAME_LIMIT = 253


@dataclass(frozen=True)
class JobEvent:
    """One event on a FineTuneJob: its CamelCase reason and its sentence."""

    reason: str
    message: str

    @property
    def type_(self) -> str:
        """Normal or Warning."""
        return "Warning" if self.reason in (Phase.FAILED, Reason.INVALID_SPEC) else "Normal"


def new_events(before: FineTuneJobStatus, after: FineTuneJobStatus) -> Iterator[JobEvent]:
    """The events that a status write makes for one run.

    Args:
        before: what the stored status knows of the run; blank for a new one.
        after: what is about to be stored.
    """
    if after.start_time and not before.start_time:
        yield JobEvent(STARTED, f"The first pod of the run started at {after.start_time}.")
    if after.phase in FINAL and before.phase is not after.phase:
        yield JobEvent(after.phase.value, after.message)
        if after.artifacts and after.phase is Phase.SUCCEEDED:
            yield JobEvent(PUBLISHED, clean("; ".join(f"{item.kind} at {item.uri}" for item in after.artifacts)))


def build_event(subject: FineTuneJob, event: JobEvent, now: datetime) -> Json:
    """The manifest of an event."""
    run = subject.run.run_digest if isinstance(subject, Subject) else subject.generation
    digest = hashlib.sha256(f"{subject.uid}/{run}/{event.reason}".encode()).hexdigest()[:16]
    stem = subject.key.name[: _NAME_LIMIT - 1 - len(digest)].rstrip("-.")
    about = {"apiVersion": API_VERSION, "kind": KIND, "namespace": subject.key.namespace, "name": subject.key.name, "uid": subject.uid}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{stem}.{digest}", "namespace": subject.key.namespace},
        "involvedObject": about,
        "reason": event.reason,
        "message": event.message,
        "type": event.type_,
        "source": {"component": names.MANAGED_BY},
        "reportingComponent": names.MANAGED_BY,
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "count": 1,
    }

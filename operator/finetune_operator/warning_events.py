"""The warning events of a namespace, listed once for all jobs that wait in it: each listing costs the API server a look at every event there.

Called by observation.py. They only explain a wait, so nothing waits for them: while they are listed, and where that fails, what was known before stands.
In a flood of 10,000 jobs a listing takes seconds, and one every five of them would be the larger half of the API server's work: so they get rarer.
"""

import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from finetune_operator.cluster import FAILED, Cluster
from finetune_operator.pacing import pause_after
from finetune_operator.subject import Json

logger = logging.getLogger(__name__)
FRESH_SECONDS, STALE_SECONDS = 5.0, 60.0  # between two listings: at least, and at most


_NEVER = datetime.max.replace(tzinfo=UTC)  # no second listing begins while one is under way


class _Warning(NamedTuple):
    seen: datetime
    text: str


@dataclass
class WarningEvents:
    """What the warning events said when they were listed last.

    Attributes:
        is_ours: whether an object of this UID is a Job or pod of a FineTuneJob; what is said of others is not kept.
    """

    cluster: Cluster
    is_ours: Callable[[str], bool]
    now: Callable[[], datetime]
    _again: dict[str, datetime] = field(default_factory=dict)
    _known: dict[str, dict[str, list[_Warning]]] = field(default_factory=dict)

    async def about(self, namespace: str, uid: str, since: datetime) -> tuple[str, ...]:
        """Texts of the warnings about the object of this UID that were seen since then, newest first."""
        begun = self.now()
        if begun >= self._again.get(namespace, begun):
            self._again[namespace] = _NEVER
            try:
                self._known[namespace] = await self._list(namespace)
            except FAILED as error:
                logger.warning("The events of namespace %s can't be listed: %s: %s", namespace, type(error).__name__, error)
            finally:
                pause_seconds = pause_after((self.now() - begun).total_seconds(), FRESH_SECONDS)
                self._again[namespace] = self.now() + timedelta(seconds=min(pause_seconds, STALE_SECONDS))
        found = self._known.get(namespace, {}).get(uid, [])
        return tuple(warning.text for warning in sorted(found, reverse=True) if warning.seen >= since)

    async def _list(self, namespace: str) -> dict[str, list[_Warning]]:
        found = defaultdict(list)
        async for page in self.cluster.list_warnings(namespace):
            for event in page:
                uid = event["involvedObject"].get("uid", "")
                warning = _warning(event)
                if warning and self.is_ours(uid):
                    found[uid].append(warning)
        return dict(found)


def _warning(event: Json) -> _Warning | None:
    """The warning that an event gives. The scheduler's give None: they are old, and a pod without a node says so itself."""
    seen = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp")
    if not seen or event.get("reason") == "FailedScheduling":
        return None
    return _Warning(datetime.fromisoformat(str(seen)), str(event.get("message") or event.get("reason") or ""))

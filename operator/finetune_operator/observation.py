"""Looks at the world around one FineTuneJob: from the cache where that is enough, from the API server where being wrong would cost something."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from finetune_api import names

from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import Cluster
from finetune_operator.progress import ProgressPoller
from finetune_operator.reads import must_be_read, unexplained
from finetune_operator.subject import (
    FineTuneJob,
    Json,
    Key,
    Subject,
    Unreadable,
    World,
    is_being_deleted,
    is_controlled_by,
    is_ended,
    read_subject,
)
from finetune_operator.timing import changed_at
from finetune_operator.warning_events import WarningEvents


@dataclass(frozen=True)
class Observer:
    """Looks at the world around one FineTuneJob."""

    cluster: Cluster
    cache: Cache
    poller: ProgressPoller
    warning_events: WarningEvents
    now: Callable[[], datetime]

    async def look(self, key: Key, *, doubtful: bool) -> World | Unreadable | None:
        """The world around one job, or the job alone where its spec can't be read; None when there is no such job, or it is being deleted.

        Args:
            doubtful: the last pass failed, so that nobody knows what it has done: the API server is asked.

        Raises:
            ApiError: a request was refused.
        """
        seen = None if doubtful else self._remembered(key)
        if seen is None or (isinstance(seen, World) and must_be_read(seen)):
            seen = await self._read(key)
        if isinstance(seen, World):
            return None if is_being_deleted(seen.subject.raw) else await self._with_details(seen)
        return None if seen is None or is_being_deleted(seen.raw) else seen

    async def read_unedited(self, subject: FineTuneJob) -> Subject | None:
        """Reads the FineTuneJob again; None when it is gone, or its spec was edited. The cache does not take it in, so that its next event is still news."""
        raw = await self.cluster.read_finetunejob(subject.key)
        stored = read_subject(raw) if raw else None
        return stored if isinstance(stored, Subject) and stored.generation == subject.generation else None

    async def _with_details(self, world: World) -> World:
        """The world with what its trainer says, or with what the events say of a pod that is not there."""
        key, silent = world.subject.key, unexplained(world, self.now())
        if silent:
            return replace(world, warnings=await self.warning_events.about(key.namespace, silent, changed_at(world)))
        return replace(world, progress=self.poller.report(key))

    def _remembered(self, key: Key) -> World | Unreadable | None:
        raw = self.cache.finetunejob(key)
        if raw is None:
            return None
        subject = read_subject(raw)
        if isinstance(subject, Unreadable):
            return subject
        return _world(subject, self.cache.children(Kind.JOB, key), self.cache.children(Kind.POD, key))

    async def _read(self, key: Key) -> World | Unreadable | None:
        """Reads the world from the API server: Jobs before pods, so that the pods of a Job that has ended are seen as they ended."""
        raw = await self.cluster.read_finetunejob(key)
        if raw is None:
            self.cache.evict_finetunejob(key)
            return None
        self.cache.update(Kind.FINETUNEJOB, raw)
        subject = read_subject(raw)
        if isinstance(subject, Unreadable):
            return subject
        jobs, pods = await self._list(Kind.JOB, key), await self._list(Kind.POD, key)
        world = _world(subject, jobs, pods)
        if subject.is_latched or world.current is not None:
            return world
        hidden = [
            found
            for name in (subject.run.job_name, names.preflight_job_name(subject.run.job_name))
            if (found := await self.cluster.read_job(key.namespace, name)) and found["metadata"]["uid"] not in _uids(world.jobs)
        ]
        # A Job whose label someone took off is ours all the same.
        namesakes = [job for job in hidden if not is_controlled_by(job, subject.uid)]
        return replace(_world(subject, (*jobs, *hidden), pods), namesake=namesakes[0] if namesakes else None)

    async def _list(self, kind: Kind, key: Key) -> tuple[Json, ...]:
        found: list[Json] = []
        async for page in self.cluster.list_pages(kind, key.namespace, f"{names.LABEL_JOB}={names.job_label(key.name)}"):
            found += page.items
            version = page.version
        for item in found:
            self.cache.update(kind, item)
        self.cache.delete_unlisted(kind, _uids(found), version, key)
        return tuple(found)


def _world(subject: Subject, labelled: tuple[Json, ...], pods: tuple[Json, ...]) -> World:
    jobs = tuple(job for job in labelled if is_controlled_by(job, subject.uid))
    owned = {job["metadata"]["uid"] for job in jobs}
    own = tuple(pod for pod in pods if any(is_controlled_by(pod, uid) for uid in owned))
    return World(subject, jobs, pods=own, orphaned_pods=tuple(pod for pod in pods if not is_ended(pod) and pod not in own))


def _uids(items: Iterable[Json]) -> set[str]:
    return {str(item["metadata"]["uid"]) for item in items}

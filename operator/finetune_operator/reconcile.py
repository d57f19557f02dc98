"""observe -> decide -> execute for one key, and the workers that do it for every key on the queue.

Each step is crash-safe: what is lost between two of them is found again by the next observation. Makes no decision of its own.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime

import aiohttp
from finetune_api import names

from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.decide import (
    Action,
    Announce,
    CreateJob,
    DeleteJob,
    PatchJob,
    Plan,
    Situation,
    WriteStatus,
    decide,
    is_unfinished,
    podless_since,
    progress_address,
    report_a_refused_job,
    unexplained,
)
from finetune_operator.diagnosis import is_ended
from finetune_operator.metrics import Metrics
from finetune_operator.progress import read_progress
from finetune_operator.settings import Settings
from finetune_operator.subject import Json, Key, Subject, World, is_being_deleted, is_controlled_by, read_subject
from finetune_operator.work_queue import WorkQueue

logger = logging.getLogger(__name__)
RECONCILE_SECONDS = 120
_REFUSALS = (400, 403, 422)


@dataclass(frozen=True)
class Reconciler:
    """What a reconcile needs."""

    cluster: Cluster
    session: aiohttp.ClientSession
    settings: Settings
    now: Callable[[], datetime]

    async def reconcile(self, key: Key) -> float | None:
        """One pass over one FineTuneJob.

        Returns:
            Seconds until another look is wanted; None when the next event or resync will do.

        Raises:
            ApiError: a request was refused; the same pass may succeed later.
        """
        raw = await self.cluster.read_finetunejob(key)
        if raw is None or is_being_deleted(raw):
            return None
        subject = read_subject(raw)
        world = await self._observe(subject)
        plan = decide(world, self.now(), self.settings)
        await self._execute(subject, plan)
        return plan.again_seconds

    async def _observe(self, subject: Subject) -> World:
        """Jobs before pods: a Job that says it has ended was told so by pods that are at least as old."""
        if subject.spec is None:
            return World(subject)
        namespace, selector = subject.key.namespace, f"{names.LABEL_JOB}={names.job_label(subject.key.name)}"
        labelled = await self.cluster.list_jobs(namespace, selector)
        jobs = tuple(job for job in labelled if is_controlled_by(job, subject.uid))
        if subject.is_latched:
            return World(subject, jobs)
        world = World(subject, jobs)
        if world.current is None:
            found = await self.cluster.read_job(namespace, subject.run.job_name)
            ours = found is not None and is_controlled_by(found, subject.uid)
            # Ours without the label: someone took it off; it is our Job all the same.
            if found and ours:
                return replace(world, jobs=(*jobs, found))
            pods = await self.cluster.list_pods(namespace, selector)
            return replace(world, namesake=found, leftovers=tuple(pod for pod in pods if not is_ended(pod)))
        return await self._observe_pods(world, selector)

    async def _observe_pods(self, world: World, selector: str) -> World:
        namespace = world.subject.key.namespace
        owned = {job["metadata"]["uid"] for job in world.jobs}
        pods = await self.cluster.list_pods(namespace, selector)
        world = replace(world, pods=tuple(pod for pod in pods if any(is_controlled_by(pod, uid) for uid in owned)))
        silent = unexplained(world, self.now())
        if silent:
            return replace(world, warnings=_newest_first(await self.cluster.list_warnings(namespace, silent), podless_since(world)))
        address = progress_address(world)
        return replace(world, progress=await read_progress(self.session, address)) if address else world

    async def _execute(self, subject: Subject, plan: Plan) -> None:
        for action in plan.actions:
            logger.info("%s: %s", subject.key, _summary(action))
            await self._act(subject, action)

    async def _act(self, subject: Subject, action: Action) -> None:
        namespace = subject.key.namespace
        match action:
            case WriteStatus(patch):
                await self.cluster.patch_status(subject.key, subject.metadata["resourceVersion"], patch)
            case CreateJob(manifest):
                await self._create_or_report(subject, manifest)
            case PatchJob(name, patch):
                await _unless_gone(self.cluster.patch_job(namespace, name, patch))
            case DeleteJob(name, uid):
                await _unless_gone(self.cluster.delete_job(namespace, name, uid))
            case Announce(event):
                await self._announce(subject, event)

    async def _announce(self, subject: Subject, event: Json) -> None:
        """An event is for people who look on: that it can't be made delays nothing."""
        try:
            await self.cluster.create_event(event)
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            if not isinstance(error, ApiError) or error.reason != "AlreadyExists":
                logger.warning("%s: no event %s: %s", subject.key, event["reason"], error)

    async def _create_or_report(self, subject: Subject, manifest: Json) -> None:
        try:
            await self._create(subject, manifest)
        except ApiError as error:
            if error.status in _REFUSALS:
                raw = await self.cluster.read_finetunejob(subject.key)
                if raw is not None and raw["metadata"].get("generation") == subject.generation:
                    now = read_subject(raw)
                    situation = Situation(World(now), self.now(), self.settings)
                    await self._execute(now, report_a_refused_job(situation, error.message, for_good=error.status != 403))
            raise

    async def _create(self, subject: Subject, manifest: Json) -> None:
        try:
            await self.cluster.create_job(manifest)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            # Another operator was faster, or the last answer was lost: the name holds UID and digest, the owner says the rest.
            found = await self.cluster.read_job(manifest["metadata"]["namespace"], manifest["metadata"]["name"])
            if found is None or not is_controlled_by(found, subject.uid):
                raise


async def work(queue: WorkQueue, reconciler: Reconciler, metrics: Metrics) -> None:
    """One worker: takes keys for ever. A failed pass comes back after a backoff and delays no other key."""
    while True:
        key = await queue.take()
        try:
            with metrics.reconciling():
                async with asyncio.timeout(RECONCILE_SECONDS):
                    again_seconds = await reconciler.reconcile(key)
        except ApiError as error:
            _log_failure(key, error, queue.fail(key))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            _log_failure(key, error, queue.fail(key))
        except Exception:
            logger.exception("%s: a defect of the operator; trying again in %.1f s", key, queue.fail(key))
        else:
            queue.succeed(key, again_seconds)


async def resync(
    queue: WorkQueue, cluster: Cluster, settings: Settings, attempted: Callable[[], None], listed: Callable[[Counter[str]], None]
) -> None:
    """Puts every unfinished job back on the queue, again and again: what no event said is seen here.

    Args:
        attempted: is called when a round begins.
        listed: takes how many jobs there are of each phase when a round has seen them all.
    """
    while True:
        attempted()
        phases: Counter[str] = Counter()
        try:
            for namespace in settings.namespaces or ("",):
                async for raw in cluster.list_finetunejobs(namespace):
                    phases[str((raw.get("status") or {}).get("phase"))] += 1
                    if is_unfinished(raw):
                        queue.add(Key(raw["metadata"]["namespace"], raw["metadata"]["name"]))
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.warning("The FineTuneJobs can't be listed (%s); trying again in %.0f s", error, settings.resync_seconds)
        else:
            listed(phases)
        await asyncio.sleep(settings.resync_seconds)


def _newest_first(events: list[Json], since: datetime) -> tuple[str, ...]:
    """Texts of the events that were seen since then."""

    def seen(event: Json) -> str:
        return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or "")

    recent = [event for event in events if seen(event) and datetime.fromisoformat(seen(event)) >= since]
    return tuple(str(event.get("message") or event.get("reason") or "") for event in sorted(recent, key=seen, reverse=True))


async def _unless_gone(request: Awaitable[None]) -> None:
    try:
        await request
    except ApiError as error:
        if error.status != 404:
            raise


def _summary(action: Action) -> str:
    match action:
        case WriteStatus(patch):
            return f"status {patch.get('phase', 'updated')}"
        case CreateJob(manifest):
            return f"create Job {manifest['metadata']['name']}"
        case PatchJob(name, patch):
            return f"patch Job {name}: {patch}"
        case DeleteJob(name, _):
            return f"delete Job {name}"
        case Announce(event):
            return f"event {event['reason']}"


def _log_failure(key: Key, error: BaseException, backoff_seconds: float) -> None:
    level = logging.INFO if isinstance(error, ApiError) and error.status == 409 else logging.WARNING
    logger.log(level, "%s: %s: %s; trying again in %.1f s", key, type(error).__name__, error, backoff_seconds)

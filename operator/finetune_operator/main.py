"""The operator's process: settings, kopf's watches, the workers, and the periodic re-list. It may be killed at any moment."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import kopf

from finetune_operator import events
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.reconcile import Key, Reconciler
from finetune_operator.settings import Settings
from finetune_operator.work_queue import WorkQueue

log = logging.getLogger("finetune_operator")


def main() -> None:
    """The console script."""
    settings = Settings()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(logging.WARNING)
    asyncio.run(run(settings))


async def run(settings: Settings) -> None:
    """Runs until SIGTERM, or until a part of it ends: then the process ends, and Kubernetes starts it again."""
    queue: WorkQueue[Key] = WorkQueue()
    registry = kopf.OperatorRegistry()
    events.register(registry, queue.add)
    kopf_settings = kopf.OperatorSettings()
    events.kopf_settings(kopf_settings)
    async with _reconciler(settings) as reconciler:
        work = [asyncio.create_task(queue.work(_handler(reconciler, queue), _log_error)) for _ in range(settings.workers)]
        work.append(asyncio.create_task(_relist(reconciler, queue)))
        watching = asyncio.create_task(
            kopf.operator(
                registry=registry,
                settings=kopf_settings,
                standalone=True,
                clusterwide=not settings.namespaces,
                namespaces=settings.namespaces,
                liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz" if settings.health_port else None,
            )
        )
        done, _ = await asyncio.wait([watching, *work], return_when=asyncio.FIRST_COMPLETED)
        for task in work:
            task.cancel()
        for task in done:
            task.result()


def _handler(reconciler: Reconciler, queue: WorkQueue[Key]) -> Callable[[Key], Awaitable[None]]:
    async def handle(key: Key) -> None:
        again = await reconciler.reconcile(key)
        if again is not None:
            queue.add_later(key, again)

    return handle


async def _relist(reconciler: Reconciler, queue: WorkQueue[Key]) -> None:
    """Puts every job back now and then: kopf never re-lists on a healthy watch, and an event may be lost."""
    while True:
        for namespace in reconciler.settings.namespaces or (None,):
            try:
                for job in await reconciler.cluster.list_finetunejobs(namespace):
                    queue.add((job["metadata"]["namespace"], job["metadata"]["name"]))
            except (ApiError, aiohttp.ClientError, TimeoutError) as error:
                log.warning("listing FineTuneJobs failed, trying again: %s", error)
        await asyncio.sleep(reconciler.settings.resync_seconds)


@asynccontextmanager
async def _reconciler(settings: Settings) -> AsyncIterator[Reconciler]:
    cluster = await Cluster.connect()
    async with aiohttp.ClientSession() as session:
        try:
            yield Reconciler(cluster, settings, session)
        finally:
            await cluster.close()


def _log_error(key: Key, error: Exception) -> None:
    log.warning("%s/%s: %s: %s; trying again", *key, type(error).__name__, error)


if __name__ == "__main__":
    main()

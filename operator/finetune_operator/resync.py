"""Lists everything, again and again: what no event said is seen here, and every unfinished job comes back on the queue."""

import asyncio
import logging
from collections.abc import Callable

import aiohttp

from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.decide import is_unfinished
from finetune_operator.settings import Settings
from finetune_operator.subject import Key
from finetune_operator.work_queue import WorkQueue

logger = logging.getLogger(__name__)
FIRST_RETRY_SECONDS = 5.0


async def resync(
    queue: WorkQueue, cluster: Cluster, cache: Cache, settings: Settings, attempted: Callable[[], None], synced: asyncio.Event
) -> None:
    """For ever.

    Args:
        attempted: called at the beginning of each round.
        synced: set after the first round that was listed to its end.
    """
    while True:
        attempted()
        try:
            for kind in Kind:
                await list_kind(kind, queue, cluster, cache, settings.namespaces or ("",))
            cache.bury()
            synced.set()
        except (ApiError, aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.warning("Not everything can be listed: %s: %s", type(error).__name__, error)
        await asyncio.sleep(settings.resync_seconds if synced.is_set() else min(FIRST_RETRY_SECONDS, settings.resync_seconds))


async def list_kind(kind: Kind, queue: WorkQueue, cluster: Cluster, cache: Cache, namespaces: tuple[str, ...]) -> None:
    """Takes in all objects of a kind, and queues the jobs that they are news of, and the unfinished ones."""
    listed: list[str] = []
    versions: list[int] = []
    for namespace in namespaces:
        async for page in cluster.list_pages(kind, namespace):
            versions.append(page.version)
            for raw in page.items:
                listed.append(raw["metadata"]["uid"])
                key = cache.see(kind, raw)
                if kind is Kind.FINETUNEJOB and is_unfinished(raw):
                    key = Key(raw["metadata"]["namespace"], raw["metadata"]["name"])
                if key:
                    queue.add(key)
    for key in cache.only(kind, listed, min(versions)):
        queue.add(key)

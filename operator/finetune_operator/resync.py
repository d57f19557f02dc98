"""Lists everything again and again: what no event has shown is seen here, and every unfinished job comes back on the queue.

Where there is much to list, it is listed less often: of all that an operator of 10,000 jobs does, a round every 45 seconds would be the larger half.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable

from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import FAILED, ApiError, Cluster, Listing
from finetune_operator.metrics import NO_PHASE
from finetune_operator.pacing import pause_after
from finetune_operator.settings import Settings
from finetune_operator.subject import Json, Key, is_new, is_unfinished
from finetune_operator.work_queue import WorkQueue

logger = logging.getLogger(__name__)
FIRST_RETRY_SECONDS = 5.0


async def resync(
    queue: WorkQueue,
    cluster: Cluster,
    cache: Cache,
    settings: Settings,
    beat: Callable[[], None],
    listed: Callable[[Counter[str]], None],
) -> None:
    """Lists everything in rounds until it is cancelled.

    Args:
        beat: called at the beginning of each round, and while it pauses at least every resync_seconds.
        listed: called with the number of jobs of each phase when a round has seen everything that may be seen.
    """
    clock = asyncio.get_running_loop().time
    pause_seconds = min(FIRST_RETRY_SECONDS, settings.resync_seconds)
    while True:
        beat()
        started, phases = clock(), Counter[str]()
        try:
            for kind in Kind:
                await _list_kind(kind, queue, cluster, cache, settings.namespaces, phases)
            cache.prune_tombstones()
            listed(phases)
            pause_seconds = pause_after(clock() - started, settings.resync_seconds)
        except FAILED as error:
            logger.warning("Not everything can be listed: %s: %s; trying again in %.0f s", type(error).__name__, error, pause_seconds)
        await pause(pause_seconds, settings.resync_seconds, beat)


async def pause(seconds: float, beat_seconds: float, beat: Callable[[], None]) -> None:
    """Sleeps, and calls `beat` meanwhile, so that the process counts as alive."""
    while seconds > beat_seconds:
        await asyncio.sleep(beat_seconds)
        beat()
        seconds -= beat_seconds
    await asyncio.sleep(seconds)


async def _list_kind(
    kind: Kind, queue: WorkQueue, cluster: Cluster, cache: Cache, namespaces: tuple[str, ...], phases: Counter[str]
) -> None:
    """Lists all objects of a kind, and queues the jobs for which they are news, and the unfinished ones."""
    uids: list[str] = []
    versions: list[int] = []
    for namespace in namespaces or ("",):
        async for page in _pages(cluster, kind, namespace, is_one_of_many=len(namespaces) > 1):
            versions.append(page.version)
            for raw in page.items:
                uids.append(raw["metadata"]["uid"])
                key = cache.update(kind, raw)
                if kind is Kind.FINETUNEJOB:
                    phases[(raw.get("status") or {}).get("phase") or NO_PHASE] += 1
                    key = _key_of(raw) if is_unfinished(raw) else key
                if key:
                    queue.add(key, urgent=kind is Kind.FINETUNEJOB and is_new(raw))
    for key in cache.delete_unlisted(kind, uids, min(versions, default=0)):
        queue.add(key)


async def _pages(cluster: Cluster, kind: Kind, namespace: str, *, is_one_of_many: bool) -> AsyncIterator[Listing]:
    """Yields the pages of one namespace. One of many that may not be listed yields none, so that the others are served."""
    try:
        async for page in cluster.list_pages(kind, namespace):
            yield page
    except ApiError as error:
        if error.status != 403 or not is_one_of_many:
            raise
        logger.error("Namespace %s is not served: %s", namespace, error)


def _key_of(raw: Json) -> Key:
    return Key(raw["metadata"]["namespace"], raw["metadata"]["name"])

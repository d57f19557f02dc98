"""The `finetune-operator` command: settings, connections, and the tasks that run until SIGTERM. When one of them dies the process does too."""

import asyncio
import logging
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import NoReturn, cast

import aiohttp
from pydantic import ValidationError
from pydantic_settings import SettingsError

from finetune_operator import events
from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import FAILED, ApiError, Cluster
from finetune_operator.election import LeadershipLostError, lead
from finetune_operator.execution import Executor
from finetune_operator.health import Heartbeat, serving
from finetune_operator.metrics import Metrics
from finetune_operator.observation import Observer
from finetune_operator.progress import ProgressPoller
from finetune_operator.reconcile import Reconciler, work
from finetune_operator.resync import resync
from finetune_operator.settings import Settings
from finetune_operator.subject import Key
from finetune_operator.warning_events import WarningEvents
from finetune_operator.work_queue import WorkQueue

logger = logging.getLogger(__name__)
CRD_SECONDS = 2.0
_LOOKS = 5


async def run(settings: Settings) -> None:
    """Operates until a signal ends the watch. Where a Lease is named, this waits until it holds the Lease.

    Raises:
        LeadershipLostError: another operator may act from now on.
        CancelledError: a signal came before kopf, which has its own handlers, had taken over.
    """
    _end_on_signals()
    metrics = Metrics()
    heartbeat = Heartbeat(asyncio.get_running_loop().time, settings.resync_seconds, has_lease=not settings.lease_namespace)
    async with AsyncExitStack() as stack:
        cluster = await Cluster.connect(metrics.count_request)
        stack.push_async_callback(cluster.close)
        await stack.enter_async_context(serving(heartbeat, metrics.registry, settings.health_port))
        if settings.lease_namespace:
            lease = (settings.lease_namespace, settings.lease_name, settings.lease_identity)
            await lead(cluster.api, *lease, heartbeat.follow, lambda: operate(cluster, settings, heartbeat, metrics))
        else:
            await operate(cluster, settings, heartbeat, metrics)


async def operate(cluster: Cluster, settings: Settings, heartbeat: Heartbeat, metrics: Metrics) -> None:
    """Watches and reconciles until a signal ends the watch.

    Before everything was listed once, only new jobs are worked on, and each is read from the API server.
    """
    queue, cache, synced = WorkQueue(asyncio.get_running_loop().time, only_urgent=True), Cache(), asyncio.Event()
    heartbeat.lead()
    metrics.show_queue(queue)
    poller = ProgressPoller(queue.add, time.time)
    reconciler = build_reconciler(cluster, cache, poller, settings, queue.__contains__, synced.is_set)

    def listed(phases: Counter[str]) -> None:
        synced.set()
        queue.open_slow_lane()
        heartbeat.sync()
        metrics.show_jobs(phases)

    served = await _served_namespaces(cluster, settings)
    async with aiohttp.ClientSession(trust_env=False) as session, asyncio.TaskGroup() as group:
        tasks = [group.create_task(work(queue, reconciler, metrics)) for _ in range(settings.concurrency)]
        tasks.append(group.create_task(resync(queue, cluster, cache, settings, heartbeat.beat, listed)))
        tasks.append(group.create_task(poller.run(session)))
        await synced.wait()  # kopf lists everything once more: beside the first round it would double the time until anything is decided
        await events.watch(queue, cache, served)
        for task in tasks:
            task.cancel()


def build_reconciler(
    cluster: Cluster,
    cache: Cache,
    poller: ProgressPoller,
    settings: Settings,
    has_news: Callable[[Key], bool],
    is_synced: Callable[[], bool] = lambda: True,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Reconciler:
    """Builds a reconciler, its observer and its executor."""
    observer = Observer(cluster, cache, poller, WarningEvents(cluster, cache.is_child, now), now)
    return Reconciler(observer, Executor(cluster, cache), settings, has_news, is_synced)


async def _served_namespaces(cluster: Cluster, settings: Settings) -> tuple[str, ...]:
    """Waits for an API server that answers and has the CRD: kopf looks once at what there is to watch, and never again.

    A namespace that may not be listed, such as one that was deleted with its Role, would end kopf, and with it the service of all others: it is left to the
    periodic re-list, and watched from the next start on.

    Returns:
        Which ones to watch; none means all of the cluster.
    """
    while True:
        try:
            for _ in range(_LOOKS):  # an API server that has just started refuses everything until it knows its Roles
                served = [namespace for namespace in settings.namespaces or ("",) if await _may_be_listed(cluster, namespace)]
                if len(served) == len(settings.namespaces or ("",)):
                    break
                await asyncio.sleep(CRD_SECONDS)
            if not served:
                raise ApiError(403, "Forbidden", f"none of {', '.join(settings.namespaces)} may be listed")
        except FAILED as error:
            is_missing = isinstance(error, ApiError) and error.status == 404
            problem = (
                "The CRD of FineTuneJobs is not installed"
                if is_missing
                else f"FineTuneJobs can't be listed: {type(error).__name__}: {error}"
            )
            logger.warning("%s; looking again in %.0f s", problem, CRD_SECONDS)
            await asyncio.sleep(CRD_SECONDS)
        else:
            return tuple(namespace for namespace in served if namespace)


async def _may_be_listed(cluster: Cluster, namespace: str) -> bool:
    try:
        async for _ in cluster.list_pages(Kind.FINETUNEJOB, namespace):
            break
    except ApiError as error:
        if error.status != 403 or not namespace:
            raise
        logger.error("Namespace %s is not watched: %s", namespace, error)
        return False
    return True


def main() -> None:
    """The console script: exit code 0 after a signal, 1 after a failure, 2 for wrong settings."""
    try:
        settings = Settings()
    except ValidationError as error:
        problems = "; ".join(f"FINETUNE_OPERATOR_{'_'.join(map(str, item['loc'])).upper()}: {item['msg']}" for item in error.errors())
        _refuse(problems)
    except SettingsError as error:
        _refuse(f"{error}; lists and maps are written as JSON")
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf").setLevel(max(logging.WARNING, logging.getLevelName(settings.log_level)))
    logger.info("Watching %s", ", ".join(settings.namespaces) or "all namespaces")
    try:
        asyncio.run(run(settings))
    except LeadershipLostError as error:
        logger.error("%s This process ends, and another one leads.", error)
        sys.exit(1)
    except asyncio.CancelledError:
        logger.info("A signal ended the start")


def _end_on_signals() -> None:
    """Lets a signal cancel the current task, so that an operator that has just started need not get the Lease before it ends."""
    task = cast("asyncio.Task[None]", asyncio.current_task())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def _refuse(problems: str) -> NoReturn:
    print(f"The operator's settings are wrong: {problems}.", file=sys.stderr)  # noqa: T201 logging is not set up yet
    sys.exit(2)


if __name__ == "__main__":
    main()

"""metrics.py, and the few lines of cluster.py, reconcile.py and work_queue.py that feed it, against a real HTTP server in place of the API server."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from finetune_api.status import Phase
from finetune_operator.cache import Cache
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.main import build_reconciler
from finetune_operator.metrics import DOCS_FILE, ERRORS, LABELS, PHASES, Metrics, metrics_markdown
from finetune_operator.progress import ProgressPoller
from finetune_operator.reconcile import work
from finetune_operator.resync import resync
from finetune_operator.settings import Settings
from finetune_operator.subject import Key
from finetune_operator.work_queue import WorkQueue
from kubernetes.aio import client
from support.simulated_cluster import build_finetunejob

A, B = Key("ml", "a"), Key("ml", "b")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def value_of(metrics: Metrics, name: str, **labels: str) -> float | None:
    """As a scrape sees it; None when there is no such sample."""
    return metrics.registry.get_sample_value(f"finetune_operator_{name}", labels)


@asynccontextmanager
async def api_server(handler: Handler, metrics: Metrics) -> AsyncIterator[Cluster]:
    """A connection to a server that answers every request so."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    api = client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}"))
    try:
        yield Cluster(api, metrics.count_request)
    finally:
        await api.close()
        await runner.cleanup()


def answering(status: int, body: Any) -> Handler:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response(body, status=status)

    return handle


async def cut(request: web.Request) -> web.StreamResponse:
    """Ends the connection in the middle of the answer."""
    response = web.StreamResponse(headers={"Content-Length": "100"})
    await response.prepare(request)
    await response.write(b"{")
    assert request.transport is not None
    request.transport.abort()
    return response


def a_list(*jobs: dict[str, Any], more: str = "") -> dict[str, Any]:
    return {"items": list(jobs), "metadata": {"continue": more, "resourceVersion": "9"}}


async def until(condition: Callable[[], object]) -> None:
    """AssertionError when it does not hold within 10 s."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 what is awaited sets no event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running(endless: Awaitable[None]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(endless)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.mark.parametrize("status", [200, 404, 409, 429, 503])
async def test_a_request_counts_by_its_verb_and_the_status_of_its_answer(metrics: Metrics, status: int) -> None:
    async with api_server(answering(status, {}), metrics) as cluster:
        for _ in range(2):
            with suppress(ApiError):
                await cluster.create_job({"metadata": {"namespace": "ml"}})
        with suppress(ApiError):
            await cluster.read_job("ml", "a")
    assert value_of(metrics, "api_requests_total", verb="POST", code=str(status)) == 2
    assert value_of(metrics, "api_requests_total", verb="GET", code=str(status)) == 1


async def test_a_request_without_a_whole_answer_has_no_code(metrics: Metrics) -> None:
    async with api_server(cut, metrics) as cluster:
        with pytest.raises(aiohttp.ClientError):
            await cluster.read_job("ml", "a")
    assert value_of(metrics, "api_requests_total", verb="GET", code="none") == 1


async def test_a_server_that_is_away_gives_no_code(metrics: Metrics) -> None:
    async with api_server(answering(200, {}), metrics) as cluster:
        address = cluster.api.configuration.host
    away = Cluster(client.ApiClient(client.Configuration(host=address)), metrics.count_request)
    with pytest.raises(aiohttp.ClientError):
        await away.read_job("ml", "a")
    await away.close()
    assert value_of(metrics, "api_requests_total", verb="GET", code="none") == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ApiError(409, "Conflict", ""), "conflict"),
        (ApiError(409, "AlreadyExists", ""), "conflict"),
        (ApiError(403, "Forbidden", ""), "api"),
        (ApiError(500, "", ""), "api"),
        (aiohttp.ServerDisconnectedError(), "network"),
        (ConnectionResetError(), "network"),
        (TimeoutError(), "network"),
        (KeyError("x"), "defect"),
        (AssertionError(), "defect"),
    ],
)
def test_a_failed_pass_counts_once_by_its_kind_and_the_error_goes_on(metrics: Metrics, error: Exception, kind: str) -> None:
    with pytest.raises(type(error)), metrics.reconciling():
        raise error
    assert {name: value_of(metrics, "reconcile_errors_total", kind=name) for name in ERRORS} == {
        name: float(name == kind) for name in ERRORS
    }
    assert value_of(metrics, "reconcile_seconds_count") == 1


def test_a_pass_that_is_cancelled_is_no_error(metrics: Metrics) -> None:
    with pytest.raises(asyncio.CancelledError), metrics.reconciling():
        raise asyncio.CancelledError
    assert sum(value_of(metrics, "reconcile_errors_total", kind=kind) or 0 for kind in ERRORS) == 0


@pytest.mark.parametrize(
    ("handler", "kind"),
    [(answering(500, {}), "api"), (answering(409, {}), "conflict"), (cut, "network"), (answering(200, {}), "defect")],
)
async def test_a_worker_counts_its_passes_and_how_they_failed(metrics: Metrics, handler: Handler, kind: str) -> None:
    queue = WorkQueue(asyncio.get_running_loop().time)
    async with api_server(handler, metrics) as cluster:
        reconciler = build_reconciler(cluster, Cache(), ProgressPoller(queue.add, lambda: 0.0), Settings(), queue.__contains__)
        async with running(work(queue, reconciler, metrics)):
            queue.add(A)
            await until(lambda: value_of(metrics, "reconcile_errors_total", kind=kind) == 1)
    assert value_of(metrics, "reconcile_seconds_count") == 1


async def test_a_worker_times_a_pass_that_succeeds(metrics: Metrics) -> None:
    queue = WorkQueue(asyncio.get_running_loop().time)
    async with api_server(answering(404, {}), metrics) as cluster:
        reconciler = build_reconciler(cluster, Cache(), ProgressPoller(queue.add, lambda: 0.0), Settings(), queue.__contains__)
        async with running(work(queue, reconciler, metrics)):
            queue.add(A)
            await until(lambda: value_of(metrics, "reconcile_seconds_count") == 1)
    assert 0 < (value_of(metrics, "reconcile_seconds_sum") or 0) < 10
    assert sum(value_of(metrics, "reconcile_errors_total", kind=kind) or 0 for kind in ERRORS) == 0


def test_the_queue_shows_what_is_due_what_is_delayed_and_for_how_long_the_oldest_has_waited(metrics: Metrics) -> None:
    now = 100.0
    queue = WorkQueue(lambda: now)
    metrics.show_queue(queue)

    def shown() -> tuple[float | None, ...]:
        depths = (value_of(metrics, "queue_depth", state=state) for state in ("due", "delayed"))
        return (*depths, value_of(metrics, "queue_oldest_seconds"))

    assert shown() == (0, 0, 0)
    queue.add(A)
    queue.add(B, 5.0)
    now += 2.0
    assert shown() == (1, 1, 2.0)
    now += 4.0
    assert shown() == (2, 0, 6.0)
    assert queue.poll() == (A, None)
    assert shown() == (1, 0, 1.0)
    queue.poll()
    queue.retry(A)
    queue.done(B)
    assert shown() == (0, 1, 0)


def test_a_key_that_an_event_named_during_its_pass_waits_since_then(metrics: Metrics) -> None:
    now = 100.0
    queue = WorkQueue(lambda: now)
    metrics.show_queue(queue)
    queue.add(A)
    queue.poll()
    queue.add(A)
    now += 3.0
    assert value_of(metrics, "queue_oldest_seconds") == 3.0


async def test_the_resync_tells_the_phases_of_all_pages_once_it_has_seen_them_all(metrics: Metrics) -> None:
    told: list[Counter[str]] = []

    async def handle(request: web.Request) -> web.Response:
        if not request.path.endswith("finetunejobs"):
            return web.json_response(a_list())
        if request.query.get("continue"):
            return web.json_response(a_list(build_finetunejob(status={"phase": "Failed"}, name="c"), build_finetunejob(name="d")))
        return web.json_response(
            a_list(*(build_finetunejob(status={"phase": "Succeeded"}, name=name) for name in "ab"), more="the second page")
        )

    async with (
        api_server(handle, metrics) as cluster,
        running(resync(WorkQueue(lambda: 0.0), cluster, Cache(), Settings(), _nothing, told.append)),
    ):
        await until(lambda: told)
    metrics.show_jobs(told[0])
    shown = {phase: value_of(metrics, "finetunejobs", phase=phase) for phase in PHASES}
    assert shown == dict.fromkeys(PHASES, 0) | {"none": 1, "Succeeded": 2, "Failed": 1}
    assert value_of(metrics, "last_list_timestamp_seconds") == pytest.approx(datetime.now(UTC).timestamp(), abs=60)


async def test_a_list_that_breaks_off_tells_nothing(metrics: Metrics) -> None:
    told: list[Counter[str]] = []
    broken = 0

    async def handle(request: web.Request) -> web.Response:
        nonlocal broken
        if request.query.get("continue"):
            broken += 1
            return web.json_response({}, status=410)
        return web.json_response(a_list(build_finetunejob(), more="the second page"))

    settings = Settings(resync_seconds=0.01)
    async with (
        api_server(handle, metrics) as cluster,
        running(resync(WorkQueue(lambda: 0.0), cluster, Cache(), settings, _nothing, told.append)),
    ):
        await until(lambda: broken >= 2)
    assert not told


def test_a_phase_that_this_version_does_not_know_counts_as_none(metrics: Metrics) -> None:
    metrics.show_jobs(Counter({"Exploded": 2, "Running": 1}))
    assert value_of(metrics, "finetunejobs", phase="none") == 2
    assert value_of(metrics, "finetunejobs", phase="Running") == 1
    assert value_of(metrics, "finetunejobs", phase="Exploded") is None


def test_a_phase_that_no_job_has_any_more_goes_back_to_zero(metrics: Metrics) -> None:
    metrics.show_jobs(Counter({"Running": 1}))
    metrics.show_jobs(Counter({"Failed": 1}))
    assert {phase: value_of(metrics, "finetunejobs", phase=phase) for phase in Phase} == {
        phase: float(phase == "Failed") for phase in Phase
    }


def test_two_processes_worth_of_metrics_share_nothing() -> None:
    first, second = Metrics(), Metrics()
    first.count_request("GET", "200")
    assert value_of(second, "api_requests_total", verb="GET", code="200") is None


def test_the_process_says_how_much_memory_it_has(metrics: Metrics) -> None:
    resident = metrics.registry.get_sample_value("process_resident_memory_bytes")
    assert resident is not None
    assert resident > 10e6


def test_the_page_is_the_generated_one() -> None:
    assert DOCS_FILE.read_text(encoding="utf-8") == metrics_markdown(), "run `make crd`"


def test_every_metric_and_label_is_on_the_page(metrics: Metrics) -> None:
    metrics.show_queue(WorkQueue(lambda: 0.0))
    metrics.show_jobs(Counter())
    metrics.count_request("GET", "200")
    own = [family for family in metrics.registry.collect() if family.name.startswith("finetune_operator_")]
    assert len(own) == 7
    for family in own:
        assert family.documentation.endswith(".")
        assert {label for sample in family.samples for label in sample.labels} - {"le"} == set(LABELS.get(family.name, {}))
        assert family.name in metrics_markdown()


def _nothing() -> None:
    """Nobody listens to the heartbeat."""

"""The fault proxy before a small real server: each fault does what it says to both sides, and nothing else changes on the way."""

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import pytest
from aiohttp import web
from support.fault_proxy import CutError, Fault, FaultProxy, draw_fault, kind_of, proxy_before, troubled
from yarl import URL

JOBS = "/apis/batch/v1/namespaces/ml/jobs"


@dataclass
class Backend:
    """Remembers what it was asked; a watch sends what is put on the queue."""

    asked: list[tuple[str, str, bytes]] = field(default_factory=list)
    lines: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.asked.append((request.method, request.raw_path, await request.read()))
        if "watch" in request.query:
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(await self.lines.get())
        if request.path.endswith("missing"):
            return web.json_response({"reason": "NotFound"}, status=404)
        return web.json_response(
            {"agent": request.headers.get("User-Agent"), "type": request.headers.get("Content-Type"), "pad": "x" * 1000}
        )


@asynccontextmanager
async def serving(backend: Backend) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", backend.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@dataclass
class Bench:
    backend: Backend
    proxy: FaultProxy
    client: aiohttp.ClientSession

    def url(self, path: str) -> URL:
        return URL(f"http://127.0.0.1:{self.proxy.port}{path}", encoded=True)

    def always(self, fault: Fault) -> None:
        self.proxy.poisons[re.compile("")] = fault

    async def post(self, seconds: float = 5) -> int:
        """The code of a creation; a request of its own connection, so that nothing is retried."""
        limit = aiohttp.ClientTimeout(total=seconds)
        async with self.client.post(self.url(JOBS), json={"kind": "Job"}, timeout=limit, headers={"Connection": "close"}) as answer:
            await answer.read()
            return answer.status


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    backend = Backend()
    async with (
        serving(backend) as server,
        aiohttp.ClientSession() as upstream,
        proxy_before(upstream, server, seed=1) as proxy,
        aiohttp.ClientSession() as client,
    ):
        yield Bench(backend, proxy, client)


async def test_without_trouble_a_request_and_its_answer_pass_unchanged(bench: Bench) -> None:
    path = f"{JOBS}?labelSelector=finetune.dev%2Fjob%3Da"
    headers = {"Content-Type": "application/merge-patch+json", "User-Agent": "operator"}
    async with bench.client.patch(bench.url(path), data=b'{"a": 1}', headers=headers) as answer:
        said = await answer.json()
    assert bench.backend.asked == [("PATCH", path, b'{"a": 1}')]
    assert (said["agent"], said["type"]) == ("operator", "application/merge-patch+json")
    async with bench.client.get(bench.url("/missing")) as answer:
        assert (answer.status, (await answer.json())["reason"]) == (404, "NotFound")


@pytest.mark.parametrize(
    ("fault", "code"), [(Fault.THROTTLED, 429), (Fault.ERROR, 500), (Fault.UNAVAILABLE, 503), (Fault.CONFLICT, 409), (Fault.GONE, 410)]
)
async def test_a_refusal_is_a_status_and_reaches_nobody(bench: Bench, fault: Fault, code: int) -> None:
    bench.always(fault)
    async with bench.client.post(bench.url(JOBS)) as answer:
        assert answer.status == code
        assert ("Retry-After" in answer.headers) == (code == 429)
        assert (await answer.json())["code"] == code
    assert not bench.backend.asked


@pytest.mark.parametrize("fault", [Fault.CUT, Fault.LOST, Fault.TORN])
async def test_a_cut_connection_is_cut_before_or_after_the_deed(bench: Bench, fault: Fault) -> None:
    bench.always(fault)
    with pytest.raises(aiohttp.ClientError):
        await bench.post()
    assert bool(bench.backend.asked) == (fault is not Fault.CUT)
    assert bench.proxy.seen[0].acted == (fault is not Fault.CUT)


@pytest.mark.parametrize("fault", [Fault.SILENT, Fault.LOST_SILENT])
async def test_no_answer_comes_before_or_after_the_deed(bench: Bench, fault: Fault) -> None:
    bench.always(fault)
    with pytest.raises(TimeoutError):
        await bench.post(seconds=0.5)
    assert bool(bench.backend.asked) == (fault is Fault.LOST_SILENT)


@pytest.mark.parametrize("fault", [Fault.SLOW, Fault.STALE])
async def test_a_slow_answer_comes(bench: Bench, fault: Fault) -> None:
    bench.always(fault)
    assert await bench.post() == 200
    assert bench.proxy.seen[0].acted


async def test_what_a_killed_client_asked_for_slowly_is_never_done(bench: Bench) -> None:
    bench.always(Fault.SLOW)
    with pytest.raises(TimeoutError):
        await bench.post(seconds=0.2)
    await asyncio.sleep(3.1)
    assert not bench.backend.asked


async def test_a_watch_is_passed_on_line_by_line(bench: Bench) -> None:
    async with bench.client.get(bench.url(f"{JOBS}?watch=true")) as answer:
        for line in (b'{"type": "ADDED"}\n', b'{"type": "DELETED"}\n'):
            bench.backend.lines.put_nowait(line)
            async with asyncio.timeout(2):
                assert await answer.content.readline() == line
    assert bench.proxy.seen[0].is_watch


async def test_an_open_watch_is_cut_when_the_server_goes_away_and_nobody_listens(bench: Bench) -> None:
    async with bench.client.get(bench.url(f"{JOBS}?watch=1")) as answer:
        bench.backend.lines.put_nowait(b"{}\n")
        await answer.content.readline()
        await bench.proxy.go_away()
        with pytest.raises(aiohttp.ClientError):
            await answer.content.readline()
    with pytest.raises(aiohttp.ClientConnectorError):
        await bench.post()
    await bench.proxy.come_back()
    assert await bench.post() == 200


async def lines_of(fault: Fault | None, count: int, seed: int = 0) -> list[bytes]:
    """What reaches the client of so many events, until the stream ends or is cut."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()
    for line in [*(f"{number}\n".encode() for number in range(count)), None]:
        queue.put_nowait(line)
    received: list[bytes] = []
    calm = asyncio.Event()
    asyncio.get_running_loop().call_later(0.5, calm.set)
    try:
        async for line in troubled(queue, fault, random.Random(seed), calm):  # noqa: S311
            received += [line]
    except CutError:
        received += [b"cut"]
    return received


async def test_a_watch_without_a_fault_loses_nothing() -> None:
    assert await lines_of(None, 20) == [f"{number}\n".encode() for number in range(20)]


@pytest.mark.parametrize("fault", [Fault.WATCH_CUT, Fault.WATCH_SILENT])
async def test_a_broken_watch_gives_its_first_events_and_no_more(fault: Fault) -> None:
    *events, end = await lines_of(fault, 20)
    assert events == [f"{number}\n".encode() for number in range(len(events))]
    assert len(events) < 20
    assert end == b"cut"


async def test_a_watch_that_is_gone_says_410_as_an_event() -> None:
    *_, last = await lines_of(Fault.WATCH_GONE, 20)
    event = json.loads(last)
    assert (event["type"], event["object"]["code"]) == ("ERROR", 410)


async def test_doubled_events_come_again_in_their_order_and_end_with_the_newest() -> None:
    received = [int(line) for line in await lines_of(Fault.WATCH_DOUBLED, 20)]
    assert sorted(set(received)) == list(range(20))
    assert len(received) > 20
    assert received[-1] == 19


async def test_reordered_events_are_all_there() -> None:
    received = [int(line) for line in await lines_of(Fault.WATCH_REORDERED, 20, seed=1)]
    assert sorted(received) == list(range(20))
    assert received != list(range(20))


def test_a_seed_draws_the_same_again_and_another_draws_otherwise() -> None:
    def drawn(seed: int) -> list[Fault | None]:
        return [draw_fault(seed, number, "PATCH", is_watch=False, rate=0.2) for number in range(2000)]

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8)
    assert 300 < sum(fault is not None for fault in drawn(7)) < 500


def test_every_fault_is_drawn_somewhere_and_only_where_it_can_happen() -> None:
    def kinds(verb: str, *, is_watch: bool = False) -> set[Fault | None]:
        return {draw_fault(1, number, verb, is_watch=is_watch, rate=1.0) for number in range(2000)}

    reads, writes, watches = kinds("GET"), kinds("PATCH"), kinds("GET", is_watch=True)
    assert reads | writes | watches == set(Fault)
    assert not reads & {Fault.CONFLICT, Fault.LOST}
    assert all(fault and fault.startswith("watch") for fault in watches - writes - {Fault.GONE})


async def test_a_poison_meets_one_object_alone_also_by_its_label(bench: Bench) -> None:
    bench.proxy.poisons[re.compile(r"[/=]bad\b")] = Fault.ERROR
    codes = []
    for path in (f"{JOBS}/bad", f"{JOBS}?labelSelector=finetune.dev%2Fjob%3Dbad", f"{JOBS}/good"):
        async with bench.client.get(bench.url(path)) as answer:
            codes.append(answer.status)
    assert codes == [500, 500, 200]


async def test_requests_are_counted(bench: Bench) -> None:
    for _ in range(3):
        await bench.post()
    assert bench.proxy.counts() == {("POST", "jobs", 200): 3}
    assert [item.body for item in bench.proxy.writes] == [{"kind": "Job"}] * 3
    assert bench.proxy.busiest_second() == 3


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/api/v1/pods", "pods"),
        ("/api/v1/namespaces/ml/pods/a", "pods"),
        (f"{JOBS}/a", "jobs"),
        ("/apis/finetune.dev/v1alpha1/namespaces/ml/finetunejobs/a/status", "finetunejobs/status"),
        ("/apis/finetune.dev/v1alpha1/finetunejobs", "finetunejobs"),
    ],
)
def test_the_kind_of_object_is_read_from_a_path(path: str, kind: str) -> None:
    assert kind_of(path) == kind

"""A reverse proxy on loopback between the operator and a real API server that makes trouble: seeded, counted, and switched from outside.

Each request draws from a generator made of the seed and the request's number, so a seed replays the same trouble for the same requests in the
same order. What the API server did is always real: a fault delays, refuses, loses or repeats, and never invents an object.
"""

import asyncio
import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

import aiohttp
import yaml
from aiohttp import web
from support.api_client import Json, session_to
from yarl import URL

WRITES = ("POST", "PUT", "PATCH", "DELETE")
HOLD_SECONDS = 60.0  # longer than the operator waits for any answer
RETRY_AFTER_SECONDS = 1
_ANSWER_LIMIT = aiohttp.ClientTimeout(total=60)
_EVENTS_BEFORE = 8  # a watch that is to break does so within so many events,
_SECONDS_BEFORE = 10.0  # or within so many seconds
_HOP_BY_HOP = ("host", "connection", "content-length", "transfer-encoding", "accept-encoding", "authorization", "keep-alive")


class Fault(StrEnum):
    """What can happen to a request."""

    THROTTLED = "429 with Retry-After"
    ERROR = "500"
    UNAVAILABLE = "503"
    CONFLICT = "409"
    SILENT = "no answer, nothing done"
    CUT = "connection cut, nothing done"
    LOST = "done, connection cut before the answer"
    LOST_SILENT = "done, no answer"
    TORN = "done, connection cut within the answer"
    SLOW = "done late"
    STALE = "done, answered late"
    GONE = "410"
    WATCH_GONE = "watch: 410 as an event"
    WATCH_SILENT = "watch: open, nothing more comes"
    WATCH_CUT = "watch: cut"
    WATCH_DOUBLED = "watch: events come again"
    WATCH_LATE = "watch: events come late"
    WATCH_REORDERED = "watch: an event comes after later ones"


# Weights. What costs the operator a whole time limit is rarer than what it hears of at once.
_READ = {
    Fault.THROTTLED: 4, Fault.ERROR: 4, Fault.UNAVAILABLE: 4, Fault.CUT: 4, Fault.TORN: 2, Fault.SLOW: 3, Fault.STALE: 4, Fault.SILENT: 1
}  # fmt: skip
_WRITE = _READ | {Fault.CONFLICT: 4, Fault.LOST: 6, Fault.LOST_SILENT: 1}
_WATCH = {
    Fault.GONE: 2, Fault.WATCH_GONE: 3, Fault.WATCH_SILENT: 3, Fault.WATCH_CUT: 4, Fault.WATCH_DOUBLED: 3, Fault.WATCH_LATE: 3,
    Fault.WATCH_REORDERED: 3, Fault.ERROR: 1, Fault.UNAVAILABLE: 1, Fault.THROTTLED: 1, Fault.CUT: 1
}  # fmt: skip
_STATUSES = {
    Fault.THROTTLED: (429, "TooManyRequests"),
    Fault.ERROR: (500, "InternalError"),
    Fault.UNAVAILABLE: (503, "ServiceUnavailable"),
    Fault.CONFLICT: (409, "Conflict"),
    Fault.GONE: (410, "Expired"),
}


def draw_fault(seed: int, number: int, verb: str, *, is_watch: bool, rate: float) -> Fault | None:
    """What happens to the request of this number; None with a probability of 1 - rate."""
    dice = random.Random(f"{seed}/{number}")  # noqa: S311 a replay, no secret
    if dice.random() >= rate:
        return None
    weights = _WATCH if is_watch else _WRITE if verb in WRITES else _READ
    return dice.choices(list(weights), list(weights.values()))[0]


@dataclass
class Seen:
    """One request.

    Attributes:
        at: when it came, on the monotonic clock.
        code: of the answer that was sent; 0 while there is none, and when none was sent.
        acted: whether the API server did what was asked.
    """

    number: int
    at: float
    verb: str
    path: str
    is_watch: bool
    fault: Fault | None
    body: Json | None = None
    code: int = 0
    acted: bool = False

    @property
    def is_write(self) -> bool:
        """Whether it asks for a change."""
        return self.verb in WRITES


class CutError(Exception):
    """The connection to the client is to be cut."""


@dataclass
class FaultProxy:
    """The proxy. Its fields may be changed at any time.

    Attributes:
        rate: the share of the requests that something happens to.
        watch_rate: likewise for watches, of which there are few.
        poisons: what always happens to requests whose path and query match a pattern.
        seen: every request so far.
    """

    seed: int
    rate: float = 0.0
    watch_rate: float = 0.0
    poisons: dict[re.Pattern[str], Fault] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    port: int = 0
    _session: aiohttp.ClientSession | None = None
    _server: str = ""
    _runner: web.AppRunner | None = None
    _site: web.TCPSite | None = None
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)
    _calm: asyncio.Event = field(default_factory=asyncio.Event)

    # Switches.

    def trouble(self, rate: float, watch_rate: float) -> None:
        """Faults from now on."""
        self.rate, self.watch_rate = rate, watch_rate
        self._calm.clear()

    def calm(self) -> None:
        """The last fault: no more are drawn, and watches that fell silent are cut. A request that got no answer gets none."""
        self.rate = self.watch_rate = 0.0
        self._calm.set()

    async def go_away(self) -> None:
        """Nobody listens any more, and every connection is cut: an API server that is down."""
        assert self._site is not None
        await self._site.stop()
        self.cut_all()

    async def come_back(self) -> None:
        """Listens again, at the same port."""
        assert self._runner is not None
        await self.listen(self._runner)

    async def listen(self, runner: web.AppRunner) -> None:
        """Takes connections, at the port that it had."""
        self._runner, self._site = runner, web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True)
        await self._site.start()
        self.port = runner.addresses[0][1]

    def cut_all(self) -> None:
        """Every connection that is open, whether or not a request is on it."""
        assert self._runner is not None
        assert self._runner.server is not None
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()

    # What tests read.

    def write_kubeconfig(self, path: Path) -> Path:
        """A kubeconfig that leads here; the proxy brings the credentials."""
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "users": [{"name": "operator", "user": {"token": "the-proxy-has-its-own"}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "operator"}}],
            "current-context": "proxy",
        }
        path.write_text(yaml.safe_dump(content))
        return path

    @property
    def writes(self) -> list[Seen]:
        """Every request that asked for a change."""
        return [item for item in self.seen if item.is_write]

    def counts(self) -> Counter[tuple[str, str, int]]:
        """How many requests of each verb, kind of object and code."""
        return Counter((item.verb, kind_of(item.path), item.code) for item in self.seen)

    def busiest_second(self, since: float = 0.0) -> int:
        """The most requests that came within one second after a moment of the monotonic clock."""
        times = sorted(item.at for item in self.seen if item.at >= since)
        return max((sum(start <= moment < start + 1 for moment in times) for start in times), default=0)

    def summary(self) -> str:
        """For a person: how many requests, and what happened to them."""
        faults = Counter(item.fault.value for item in self.seen if item.fault)
        lines = [f"{len(self.seen)} requests, {len(self.writes)} of them writes, {faults.total()} with a fault (seed {self.seed}):"]
        lines += [f"  {count:5} x {name}" for name, count in faults.most_common()]
        return "\n".join(lines)

    # The way of one request.

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Forwards a request, with what it drew."""
        is_watch = request.query.get("watch") in ("1", "true", "True")
        number = next(self._numbers)
        fault = self._poison(unquote(request.raw_path)) or draw_fault(
            self.seed, number, request.method, is_watch=is_watch, rate=self.watch_rate if is_watch else self.rate
        )
        body = await request.read()
        seen = Seen(number, time.monotonic(), request.method, request.path, is_watch, fault, _parsed(body))
        self.seen.append(seen)
        dice = random.Random(f"{self.seed}/{number}/how")  # noqa: S311 a replay, no secret
        try:
            return await (self._watch(request, seen, dice) if is_watch else self._answer(request, body, seen, dice))
        except (CutError, aiohttp.ClientError):
            _cut(request)
            return web.Response(status=502)  # goes nowhere: the connection is gone

    def _poison(self, path: str) -> Fault | None:
        return next((fault for pattern, fault in self.poisons.items() if pattern.search(path)), None)

    async def _answer(self, request: web.Request, body: bytes, seen: Seen, dice: random.Random) -> web.StreamResponse:
        if refusal := await _refused(seen):
            return refusal
        if seen.fault is Fault.SLOW:
            await asyncio.sleep(dice.uniform(0.5, 3.0))
        code, headers, data = await self._forward(request, body)
        seen.acted = code < 300
        if seen.fault is Fault.LOST:
            raise CutError
        if seen.fault is Fault.LOST_SILENT:
            await _hold()
        if seen.fault is Fault.STALE:
            await asyncio.sleep(dice.uniform(0.5, 3.0))
        if seen.fault is Fault.TORN:
            await _tear(request, code, headers, data)
        seen.code = code
        return web.Response(status=code, headers=headers, body=data)

    async def _forward(self, request: web.Request, body: bytes) -> tuple[int, dict[str, str], bytes]:
        async with self._ask(request, _ANSWER_LIMIT, body) as answer:
            return answer.status, _kept(answer.headers), await answer.read()

    def _ask(
        self, request: web.Request, limit: aiohttp.ClientTimeout, body: bytes = b""
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        assert self._session is not None
        headers = _kept(request.headers) | {"Accept-Encoding": "identity"}
        address = URL(self._server + request.raw_path, encoded=True)
        return self._session.request(request.method, address, data=body or None, headers=headers, timeout=limit)

    async def _watch(self, request: web.Request, seen: Seen, dice: random.Random) -> web.StreamResponse:
        if refusal := await _refused(seen):
            return refusal
        async with self._ask(request, aiohttp.ClientTimeout(total=None)) as answer:
            response = web.StreamResponse(status=answer.status, headers=_kept(answer.headers))
            await response.prepare(request)
            seen.code, seen.acted = answer.status, answer.status == 200
            async with _lines(answer) as lines:
                async for line in troubled(lines, seen.fault, dice, self._calm):
                    await response.write(line)
            await response.write_eof()
            return response


Lines: TypeAlias = "asyncio.Queue[bytes | None]"  # None: no more come


async def troubled(lines: Lines, fault: Fault | None, dice: random.Random, calm: asyncio.Event) -> AsyncIterator[bytes]:
    """The lines of a watch as they reach the client.

    Raises:
        CutError: the connection is to be cut.
    """
    if fault in (Fault.WATCH_GONE, Fault.WATCH_SILENT, Fault.WATCH_CUT):
        async for line in _first(lines, dice.randrange(_EVENTS_BEFORE), dice.uniform(0, _SECONDS_BEFORE)):
            yield line
        if fault is Fault.WATCH_GONE:
            yield json.dumps({"type": "ERROR", "object": _status(410, "Expired", "too old resource version")}).encode() + b"\n"
            return
        if fault is Fault.WATCH_SILENT:
            await calm.wait()
        raise CutError
    disturb = {Fault.WATCH_DOUBLED: _doubled, Fault.WATCH_LATE: _late, Fault.WATCH_REORDERED: _reordered}.get(fault) if fault else None
    async for line in disturb(lines, dice, calm) if disturb else _all(lines):
        yield line


async def _all(lines: Lines) -> AsyncIterator[bytes]:
    while (line := await lines.get()) is not None:
        yield line


async def _first(lines: Lines, count: int, seconds: float) -> AsyncIterator[bytes]:
    """So many lines, or those of so many seconds."""
    end = asyncio.get_running_loop().time() + seconds
    for _ in range(count):
        try:
            async with asyncio.timeout_at(end):
                line = await lines.get()
        except TimeoutError:
            return
        if line is None:
            return
        yield line


async def _doubled(lines: Lines, dice: random.Random, calm: asyncio.Event) -> AsyncIterator[bytes]:
    """As after a watch that was opened anew at an older version: the last few events come again, in their order."""
    latest: list[bytes] = []
    async for line in _all(lines):
        latest = [*latest[-3:], line]
        yield line
        if dice.random() < 1 / 3 and not calm.is_set():
            for again in latest:
                yield again


async def _late(lines: Lines, dice: random.Random, calm: asyncio.Event) -> AsyncIterator[bytes]:
    async for line in _all(lines):
        if dice.random() < 1 / 3 and not calm.is_set():
            await asyncio.sleep(dice.uniform(0.2, 4.0))
        yield line


async def _reordered(lines: Lines, dice: random.Random, calm: asyncio.Event) -> AsyncIterator[bytes]:
    """An event waits until another has passed it, or for two seconds. No API server does this to one object: the re-list must heal it."""
    async for line in _all(lines):
        if dice.random() < 1 / 4 and not calm.is_set():
            later = None
            with suppress(TimeoutError):
                async with asyncio.timeout(2):
                    later = await lines.get()
                    if later is None:
                        yield line
                        return
            if later is not None:
                yield later
        yield line


@asynccontextmanager
async def _lines(answer: aiohttp.ClientResponse) -> AsyncIterator[Lines]:
    """The lines of an answer on a queue, so that a time limit on the next one loses none."""
    queue: Lines = asyncio.Queue()

    async def pump() -> None:
        try:
            async for line in answer.content:
                queue.put_nowait(line)
        except aiohttp.ClientError:
            pass
        queue.put_nowait(None)

    pumping = asyncio.create_task(pump())
    try:
        yield queue
    finally:
        pumping.cancel()


def kind_of(path: str) -> str:
    """The plural of the objects that a path speaks of, with its subresource."""
    parts = path.strip("/").split("/")
    rest = parts[3 if parts[0] == "apis" else 2 :]
    rest = rest[2:] if rest[:1] == ["namespaces"] and len(rest) > 2 else rest
    return "/".join([*rest[:1], *rest[2:3]])


async def _refused(seen: Seen) -> web.Response | None:
    """An answer that the API server has no part in; None where it has.

    Raises:
        CutError: there is no answer.
    """
    if seen.fault is Fault.SILENT:
        await _hold()
    if seen.fault is Fault.CUT:
        raise CutError
    if seen.fault not in _STATUSES:
        return None
    code, reason = _STATUSES[seen.fault]
    seen.code = code
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if seen.fault is Fault.THROTTLED else {}
    return web.json_response(_status(code, reason, "the fault proxy says so"), status=code, headers=headers)


def _status(code: int, reason: str, message: str) -> Json:
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message, "reason": reason, "code": code}


async def _hold() -> None:
    """No answer, until the client gives up."""
    await asyncio.sleep(HOLD_SECONDS)
    raise CutError


async def _tear(request: web.Request, code: int, headers: dict[str, str], data: bytes) -> None:
    response = web.StreamResponse(status=code, headers=headers)
    response.content_length = len(data)
    await response.prepare(request)
    await response.write(data[: len(data) // 2])
    raise CutError


def _cut(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _kept(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in _HOP_BY_HOP}


def _parsed(body: bytes) -> Json | None:
    try:
        return dict(json.loads(body)) if body else None
    except ValueError:
        return None


@asynccontextmanager
async def fault_proxy(kubeconfig: Path, seed: int) -> AsyncIterator[FaultProxy]:
    """A proxy before the server of this kubeconfig for the block; it makes no trouble until it is told to."""
    async with session_to(kubeconfig, "fault-proxy", 0) as (session, server), proxy_before(session, server, seed) as proxy:
        yield proxy


@asynccontextmanager
async def proxy_before(session: aiohttp.ClientSession, server: str, seed: int) -> AsyncIterator[FaultProxy]:
    """Likewise before the server of this address, asked through this session."""
    proxy = FaultProxy(seed, _session=session, _server=server)
    application = web.Application(client_max_size=8 * 2**20)
    application.router.add_route("*", "/{path:.*}", proxy.handle)
    # A request whose client is gone is dropped, as the API server itself does: what was killed does not act from the grave.
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await proxy.listen(runner)
        yield proxy
    finally:
        proxy.cut_all()
        await runner.cleanup()

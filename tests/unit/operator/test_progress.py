"""progress.py against a real server on this machine: a good report is read, and everything else is None."""

import asyncio
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web
from finetune_api.progress import MAX_BYTES, ProgressReport
from finetune_api.status import Progress, Stage
from finetune_operator import progress
from finetune_operator.progress import read_progress

GOOD = ProgressReport(train_digest="a" * 64, stage=Stage.TRAINING, progress=Progress(summary="1/4", step=1, total_steps=4))
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    application = web.Application()
    application.add_routes([web.get("/progress", handler), web.get("/elsewhere", good)])
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def good(_: web.Request) -> web.Response:
    return web.Response(text=GOOD.model_dump_json(by_alias=True))


async def answer_of(handler: Handler) -> ProgressReport | None:
    async with serving(handler) as port, aiohttp.ClientSession(trust_env=False) as session:
        return await read_progress(session, "127.0.0.1", port)


async def test_a_good_report_is_read() -> None:
    assert await answer_of(good) == GOOD


@pytest.mark.parametrize("text", ["", "not JSON", "[]", '{"version": 2}', GOOD.model_dump_json(by_alias=True)[:-1] + ', "colour": "red"}'])
async def test_anything_that_is_not_a_report_is_none(text: str) -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(text=text)

    assert await answer_of(handler) is None


async def test_a_report_in_too_many_bytes_is_none() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(text=GOOD.model_dump_json(by_alias=True) + " " * MAX_BYTES)

    assert await answer_of(handler) is None


async def test_a_stream_without_end_is_left_after_64_kib() -> None:
    sent = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while sent < 1000 * MAX_BYTES:
            await response.write(b" " * 8192)
            sent += 8192
        return response

    assert await answer_of(handler) is None
    assert sent < 1000 * MAX_BYTES


async def test_a_small_answer_that_unpacks_to_too_much_is_none() -> None:
    async def handler(_: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(b" " * 100 * MAX_BYTES), headers={"Content-Encoding": "gzip"})

    assert await answer_of(handler) is None


async def test_a_redirect_is_not_followed() -> None:
    async def handler(_: web.Request) -> web.Response:
        raise web.HTTPFound("/elsewhere")

    assert await answer_of(handler) is None


async def test_an_error_page_is_none() -> None:
    async def handler(_: web.Request) -> web.Response:
        raise web.HTTPServiceUnavailable

    assert await answer_of(handler) is None


async def test_an_answer_that_takes_too_long_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "TIMEOUT_SECONDS", 0.05)

    async def handler(_: web.Request) -> web.Response:
        await asyncio.sleep(1)
        return await good(_)

    assert await answer_of(handler) is None


async def test_an_answer_that_breaks_off_is_none() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"{")
        assert request.transport is not None
        request.transport.close()
        return response

    assert await answer_of(handler) is None


async def test_a_pod_that_listens_nowhere_is_none() -> None:
    async with serving(good) as port:
        pass
    async with aiohttp.ClientSession(trust_env=False) as session:
        assert await read_progress(session, "127.0.0.1", port) is None


@pytest.mark.parametrize("address", ["", "no address", "::1%x", "a/b"])
async def test_a_strange_address_is_none(address: str) -> None:
    async with aiohttp.ClientSession(trust_env=False) as session:
        assert await read_progress(session, address, 1) is None

"""The start of main.py: an API server that is not ready yet is waited for, whatever it says."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import aiohttp
import pytest
import yaml
from finetune_operator import main
from finetune_operator.cache import Kind
from finetune_operator.cluster import ApiError, Cluster, Listing
from finetune_operator.settings import Settings
from support.s3_server import free_port


class Unready:
    """Refuses as often as there are errors, then lists."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    async def list_pages(self, _kind: Kind, _namespace: str) -> AsyncIterator[Listing]:
        if self.errors:
            raise self.errors.pop(0)
        yield Listing([], 1)


async def test_an_api_server_that_is_not_ready_ends_no_operator(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(main, "CRD_SECONDS", 0)
    cluster = Unready(
        [ApiError(404, "NotFound", "no CRD"), ApiError(503, "ServiceUnavailable", "not yet"), aiohttp.ClientError(), TimeoutError()]
    )
    assert await main._served_namespaces(cast("Cluster", cluster), Settings(trainer_image="trainer")) == ()
    assert cluster.errors == []
    said = [record.message for record in caplog.records]
    assert said[0] == "The CRD of FineTuneJobs is not installed; looking again in 0 s"
    assert said[1] == "FineTuneJobs can't be listed: ApiError: 503 ServiceUnavailable: not yet; looking again in 0 s"
    assert len(said) == 4


class Closed:
    """Refuses to list what is closed; lets its list be opened by a test."""

    def __init__(self, *closed: str) -> None:
        self.closed = set(closed)

    async def list_pages(self, _kind: Kind, namespace: str) -> AsyncIterator[Listing]:
        if namespace in self.closed:
            raise ApiError(403, "Forbidden", "no Role in this namespace")
        yield Listing([], 1)


@pytest.mark.parametrize(("closed", "watched"), [("a", ("b", "c")), ("b", ("a", "c")), ("", ("a", "b", "c"))])
async def test_a_namespace_that_may_not_be_listed_keeps_no_other_from_being_watched(
    closed: str, watched: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "CRD_SECONDS", 0)
    settings = Settings(trainer_image="trainer", namespaces=("a", "b", "c"))
    assert await main._served_namespaces(cast("Cluster", Closed(closed)), settings) == watched


async def test_a_namespace_whose_role_comes_a_little_later_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Closed("a")

    async def open_it(_: float) -> None:
        cluster.closed.clear()

    monkeypatch.setattr(main.asyncio, "sleep", open_it)
    settings = Settings(trainer_image="trainer", namespaces=("a", "b"))
    assert await main._served_namespaces(cast("Cluster", cluster), settings) == ("a", "b")


async def test_where_no_namespace_may_be_listed_one_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = Closed("a", "b")

    waits = iter(range(100))

    async def open_one(_: float) -> None:
        if next(waits) == 7:
            cluster.closed.discard("b")

    monkeypatch.setattr(main.asyncio, "sleep", open_one)
    settings = Settings(trainer_image="trainer", namespaces=("a", "b"))
    assert await main._served_namespaces(cast("Cluster", cluster), settings) == ("b",)
    assert any("none of a, b may be listed" in record.message for record in caplog.records)


def write_kubeconfig(path: Path, server: str) -> None:
    named = {"name": "nowhere"}
    config = {
        "clusters": [named | {"cluster": {"server": server}}],
        "users": [named | {"user": {"token": "x"}}],
        "contexts": [named | {"context": {"cluster": "nowhere", "user": "nowhere"}}],
        "current-context": "nowhere",
    }
    path.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **config}))


async def test_an_operator_whose_api_server_never_answers_is_alive_and_never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Semaphore(0)

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        asked.release()

    server, port = await asyncio.start_server(hang_up, "127.0.0.1", 0), free_port("127.0.0.1")
    write_kubeconfig(tmp_path / "config", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    monkeypatch.setattr("kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "config"))
    running = asyncio.create_task(main.run(Settings(lease_namespace="system", health_port=port)))
    async with server, asyncio.timeout(20), aiohttp.ClientSession(trust_env=False) as session:
        for _ in range(2):  # the second time, the first was taken in
            await asked.acquire()
        answers = [(await session.get(f"http://127.0.0.1:{port}{path}")).status for path in ("/healthz", "/readyz")]
        running.cancel()
        await asyncio.wait({running})
    assert answers == [200, 503]

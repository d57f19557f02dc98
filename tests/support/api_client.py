"""A bare asyncio client of the test cluster's API server: JSON in, JSON out, and watches. For what kubectl is too slow for. No fixtures here."""

import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import yaml

Json = dict[str, Any]
MERGE = "application/merge-patch+json"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
TIMEOUT_SECONDS = 60
_LONGEST_LINE = 2**21


class RefusedError(Exception):
    """The API server refused a request."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"{status}: {body[:500]}")
        self.status = status


class ApiClient:
    """Requests to one API server as one user."""

    def __init__(self, session: aiohttp.ClientSession, server: str) -> None:
        self._session = session
        self._server = server

    async def request(self, method: str, path: str, body: Json | None = None, content_type: str = "application/json") -> Json:
        """The answer's body.

        Raises:
            RefusedError: any status from 300 on.
        """
        data = None if body is None else json.dumps(body)
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        headers = {"Content-Type": content_type}
        async with self._session.request(method, self._server + path, data=data, headers=headers, timeout=timeout) as answer:
            text = await answer.text()
        if answer.status >= 300:
            raise RefusedError(answer.status, text)
        return dict(json.loads(text))

    async def list(self, path: str, page: int = 500) -> AsyncIterator[Json]:
        """Every object of a list, page by page; `path` may hold a query."""
        more = ""
        while True:
            query = f"{'&' if '?' in path else '?'}limit={page}" + (f"&continue={more}" if more else "")
            answer = await self.request("GET", path + query)
            for item in answer["items"]:
                yield item
            more = answer["metadata"].get("continue") or ""
            if not more:
                return

    async def watch(self, path: str, *, metadata_only: bool = False) -> AsyncIterator[tuple[str, Json]]:
        """(ADDED, MODIFIED or DELETED, object) from now on, after an ADDED for each object that is there; until the connection ends."""
        headers = {"Accept": METADATA} if metadata_only else {}
        url = f"{self._server}{path}{'&' if '?' in path else '?'}watch=1"
        async with self._session.get(url, headers=headers, timeout=aiohttp.ClientTimeout(total=None)) as answer:
            if answer.status >= 300:
                raise RefusedError(answer.status, await answer.text())
            async for line in answer.content:
                event = json.loads(line)
                yield event["type"], event["object"]


@asynccontextmanager
async def connected(kubeconfig: Path, agent: str, connections: int = 64) -> AsyncIterator[ApiClient]:
    """A client with the token of a kubeconfig.

    Args:
        agent: what the API server's audit log calls it.
        connections: most that are open at the same time, watches included.
    """
    async with session_to(kubeconfig, agent, connections) as (session, server):
        yield ApiClient(session, server)


@asynccontextmanager
async def session_to(kubeconfig: Path, agent: str, connections: int = 64) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    """As `connected`, for what is no JSON in and out: (a session that trusts the server and brings the token, the server's address)."""
    config = yaml.safe_load(kubeconfig.read_text())  # noqa: ASYNC240 a small local file, once
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
    tls.check_hostname = False  # the certificate is the test cluster's own, and the only one trusted here
    headers = {"Authorization": f"Bearer {user['token']}", "User-Agent": agent, "Accept": "application/json"}
    connector = aiohttp.TCPConnector(ssl=tls, limit=connections)
    async with aiohttp.ClientSession(connector=connector, headers=headers, trust_env=False, read_bufsize=_LONGEST_LINE) as session:
        yield session, cluster["server"]

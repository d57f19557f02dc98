"""GET /healthz for the liveness probe: whether the event loop answers and the resync still comes round. Started by main.py.

That the API server answers is not asked: a restart would not mend it.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from aiohttp import web

ROUNDS = 3
SLACK_SECONDS = 120.0


class Heartbeat:
    """When the resync last began a round."""

    def __init__(self, clock: Callable[[], float], resync_seconds: float) -> None:
        self._clock = clock
        self._limit_seconds = ROUNDS * resync_seconds + SLACK_SECONDS
        self._last: float | None = None

    def beat(self) -> None:
        """A round begins."""
        self._last = self._clock()

    def is_alive(self) -> bool:
        """Whether the last round began not too long ago; one that waits for the Lease has no rounds yet."""
        return self._last is None or self._clock() - self._last <= self._limit_seconds


@asynccontextmanager
async def serving(heartbeat: Heartbeat, port: int) -> AsyncIterator[int]:
    """Serves /healthz within the block and yields the port (useful for port 0)."""

    async def healthz(_: web.Request) -> web.Response:
        alive = heartbeat.is_alive()
        return web.Response(text="ok\n" if alive else "the resync has stopped\n", status=200 if alive else 503)

    application = web.Application()
    application.add_routes([web.get("/healthz", healthz)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    # Every interface of the pod's own network namespace: the kubelet asks from outside of it.
    site = web.TCPSite(runner, "0.0.0.0", port)  # noqa: S104
    await site.start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()

"""GET /healthz, /readyz and /metrics on one port. Started by main.py.

- /healthz, for the liveness probe: whether the event loop answers and the resync still comes round. That the API server answers is not asked:
  a restart would not mend it.
- /readyz: whether the first list of all FineTuneJobs is done. An operator that waits for the Lease is ready once it has seen that another one holds
  it: a rollout waits for the new pod to be ready before it stops the old one, which holds the Lease until then. One that never reached the API
  server has seen nothing, so that an install that waits for it fails. Once ready it stays so, also when the API server goes away: nothing is routed
  to an operator, and taking it off would mend nothing.
"""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.aiohttp import make_aiohttp_handler

ROUNDS = 3
SLACK_SECONDS = 120.0

Answer = tuple[int, str]


class Heartbeat:
    """When the resync last gave a sign of life, and whether a round has ever come to its end.

    Args:
        clock: gives seconds.
        resync_seconds: from one sign to the next, while no round is under way.
        has_lease: whether this operator may act from the start.
    """

    def __init__(self, clock: Callable[[], float], resync_seconds: float, *, has_lease: bool = True) -> None:
        self._clock = clock
        self._limit_seconds = ROUNDS * resync_seconds + SLACK_SECONDS
        self._last: float | None = None
        self._has_lease = has_lease
        self._is_following = False
        self._is_synced = False

    def follow(self) -> None:
        """Notes that another operator was seen to hold the Lease."""
        self._is_following = True

    def lead(self) -> None:
        """Notes that this operator holds the Lease, or needs none."""
        self._has_lease = True

    def beat(self) -> None:
        """Notes that a round begins, or is waited for."""
        self._last = self._clock()

    def sync(self) -> None:
        """Notes that a round has seen every FineTuneJob."""
        self._is_synced = True

    def is_alive(self) -> bool:
        """Whether the last sign of life is not too old; one that waits for the Lease has no rounds yet."""
        return self._last is None or self._clock() - self._last <= self._limit_seconds

    def health(self) -> Answer:
        """The answer of /healthz."""
        return (200, "ok\n") if self.is_alive() else (503, "the resync has stopped\n")

    def readiness(self) -> Answer:
        """The answer of /readyz."""
        if not self._has_lease:
            return (
                (200, "waiting for the Lease\n")
                if self._is_following
                else (503, "the Lease is not taken, and no other holder of it was seen\n")
            )
        return (200, "ok\n") if self._is_synced else (503, "the first list of all FineTuneJobs is not done\n")


@asynccontextmanager
async def serving(heartbeat: Heartbeat, registry: CollectorRegistry, port: int) -> AsyncIterator[int]:
    """Serves within the block and yields the port (useful for port 0)."""

    def answering(answer: Callable[[], Answer]) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(_: web.Request) -> web.Response:
            status, text = answer()
            return web.Response(text=text, status=status)

        return handle

    application = web.Application()
    application.add_routes(
        [
            web.get("/healthz", answering(heartbeat.health)),
            web.get("/readyz", answering(heartbeat.readiness)),
            web.get("/metrics", make_aiohttp_handler(registry)),
        ]
    )
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.SockSite(runner, _listening(port)).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def _listening(port: int) -> socket.socket:
    """A socket on every interface of the pod's own network namespace, since the kubelet asks from outside of it: at its IPv6 address where the cluster has no other."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))

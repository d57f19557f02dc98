"""`GET /progress` (JSON) and `/metrics` (Prometheus) of the pod, on port 8080: cosmetics, losing it loses nothing.

Started by pipeline.py in a cluster only. The operator reads /progress; whoever scrapes pods reads /metrics.
"""

import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from finetune_api.progress import ProgressReport
from finetune_api.status import Progress
from prometheus_client import CollectorRegistry, Gauge, make_wsgi_app

_IDLE_SECONDS = 10
_POLL_SECONDS = 0.1  # what the end of a run waits for at most


class Endpoint:
    """Holds the last report and answers with it."""

    def __init__(self) -> None:
        self._last = b"{}"
        registry = CollectorRegistry()
        self._metrics = make_wsgi_app(registry)
        self._gauges = {
            "step": Gauge("finetune_step", "Optimizer steps done.", registry=registry),
            "total_steps": Gauge("finetune_total_steps", "Optimizer steps in all.", registry=registry),
            "loss": Gauge("finetune_loss", "Training loss of the last step, in nats per token.", registry=registry),
            "tokens_per_second": Gauge("finetune_tokens_per_second", "Tokens per second of this attempt.", registry=registry),
        }
        self._stage = Gauge("finetune_stage", "1 for the stage that the trainer is in.", ["stage"], registry=registry)

    def update(self, report: ProgressReport) -> None:
        """Takes the newest report."""
        self._last = report.model_dump_json(by_alias=True, exclude_none=True).encode()
        self._stage.clear()
        self._stage.labels(report.stage.value).set(1)
        if report.progress:
            self._set(report.progress)

    def answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        """The WSGI application."""
        if environ["PATH_INFO"] == "/metrics":
            return self._metrics(environ, start_response)
        if environ["PATH_INFO"] == "/progress":
            start_response("200 OK", [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
            return [self._last]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"here are /progress and /metrics\n"]

    def _set(self, progress: Progress) -> None:
        for name, gauge in self._gauges.items():
            gauge.set(float(getattr(progress, name) or 0))


class _Server(ThreadingMixIn, WSGIServer):
    """A connection that asks nothing, such as a browser's spare one, holds up neither the others nor the end of the run."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """Whoever asked has gone: no traceback for that."""


class _DualStack(_Server):
    """On an IPv6 address, `::` takes IPv4's too."""

    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        """Asks for both, whatever the kernel's default is."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Quiet(WSGIRequestHandler):
    timeout = _IDLE_SECONDS

    def log_message(self, *args: Any) -> None:
        """The operator asks every few seconds: no line for that."""


@contextmanager
def serving(endpoint: Endpoint, address: str, port: int) -> Iterator[int]:
    """Serves within the block and yields the port (useful for port 0).

    Raises:
        OSError: the port is taken, or this machine has no such address.
    """
    kind = _DualStack if ":" in address else _Server
    server = make_server(address, port, endpoint.answer, server_class=kind, handler_class=_Quiet)
    thread = threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

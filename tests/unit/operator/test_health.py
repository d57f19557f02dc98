"""health.py: /healthz says whether the resync still comes round, /readyz whether it was ever complete."""

import socket

import aiohttp
import pytest
from finetune_operator.health import Heartbeat, serving
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families


class Clock:
    """Time that stands still."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


async def answer_of(
    heartbeat: Heartbeat, path: str = "/healthz", registry: CollectorRegistry | None = None, host: str = "127.0.0.1"
) -> tuple[int, str]:
    async with (
        serving(heartbeat, registry or CollectorRegistry(), 0) as port,
        aiohttp.ClientSession(trust_env=False) as session,
        session.get(f"http://{host}:{port}{path}") as response,
    ):
        return response.status, await response.text()


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", pytest.param("[::1]", marks=pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this kernel has no IPv6"))],
)
async def test_it_answers_on_ipv4_and_on_ipv6(host: str) -> None:
    assert await answer_of(Heartbeat(Clock(), 60), host=host) == (200, "ok\n")


async def test_where_the_kernel_has_no_ipv6_it_answers_on_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    assert await answer_of(Heartbeat(Clock(), 60)) == (200, "ok\n")


async def test_a_fresh_operator_is_healthy() -> None:
    assert await answer_of(Heartbeat(Clock(), 60)) == (200, "ok\n")


async def test_an_operator_whose_resync_stopped_is_not() -> None:
    clock = Clock()
    heartbeat = Heartbeat(clock, 60)
    heartbeat.beat()
    clock.now += 301
    assert await answer_of(heartbeat) == (503, "the resync has stopped\n")


def test_an_operator_that_waits_for_its_turn_is_healthy_however_long_that_takes() -> None:
    clock = Clock()
    heartbeat = Heartbeat(clock, 60)
    clock.now += 10_000
    assert heartbeat.is_alive()


def test_three_late_rounds_and_two_minutes_are_forgiven() -> None:
    clock = Clock()
    heartbeat = Heartbeat(clock, 60)
    heartbeat.beat()
    clock.now += 300
    assert heartbeat.is_alive()
    clock.now += 1
    assert not heartbeat.is_alive()


def test_a_beat_makes_it_alive_again() -> None:
    clock = Clock()
    heartbeat = Heartbeat(clock, 60)
    clock.now += 1000
    heartbeat.beat()
    assert heartbeat.is_alive()


async def test_an_operator_is_not_ready_before_it_has_seen_every_job() -> None:
    heartbeat = Heartbeat(Clock(), 60)
    heartbeat.beat()
    assert await answer_of(heartbeat, "/readyz") == (503, "the first list of all FineTuneJobs is not done\n")
    heartbeat.sync()
    assert await answer_of(heartbeat, "/readyz") == (200, "ok\n")


def test_an_operator_stays_ready_when_the_resync_no_longer_succeeds() -> None:
    clock = Clock()
    heartbeat = Heartbeat(clock, 60)
    heartbeat.sync()
    clock.now += 10_000
    heartbeat.beat()
    assert heartbeat.readiness()[0] == 200


async def test_an_operator_that_waits_for_the_lease_is_ready_once_it_has_seen_another_holder_and_says_so_until_it_leads() -> None:
    heartbeat = Heartbeat(Clock(), 60, has_lease=False)
    assert await answer_of(heartbeat, "/readyz") == (503, "the Lease is not taken, and no other holder of it was seen\n")
    heartbeat.follow()
    assert await answer_of(heartbeat, "/readyz") == (200, "waiting for the Lease\n")
    heartbeat.lead()
    assert heartbeat.readiness()[0] == 503


async def test_metrics_are_those_of_the_registry() -> None:
    registry = CollectorRegistry()
    Counter("seen", "What was seen.", registry=registry).inc(3)
    status, text = await answer_of(Heartbeat(Clock(), 60), "/metrics", registry)
    (family,) = [item for item in text_string_to_metric_families(text) if item.name == "seen"]
    assert (status, family.samples[0].value) == (200, 3.0)


@pytest.mark.parametrize("path", ["/", "/healthz/x", "/debug"])
async def test_nothing_else_is_served(path: str) -> None:
    status, _ = await answer_of(Heartbeat(Clock(), 60), path)
    assert status == 404

"""health.py: /healthz says whether the resync still comes round."""

import aiohttp
from finetune_operator.health import Heartbeat, serving


class Clock:
    """Time that stands still."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


async def answer_of(heartbeat: Heartbeat, path: str = "/healthz") -> tuple[int, str]:
    async with (
        serving(heartbeat, 0) as port,
        aiohttp.ClientSession(trust_env=False) as session,
        session.get(f"http://127.0.0.1:{port}{path}") as response,
    ):
        return response.status, await response.text()


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


async def test_nothing_else_is_served() -> None:
    status, _ = await answer_of(Heartbeat(Clock(), 60), "/metrics")
    assert status == 404

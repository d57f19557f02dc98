"""warning_events.py: one listing for all jobs that wait, and nothing that waits for one."""

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import cast

import pytest
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.subject import Json
from finetune_operator.warning_events import FRESH_SECONDS, STALE_SECONDS, WarningEvents
from support.simulated_cluster import NOW, written

FRESH = timedelta(seconds=FRESH_SECONDS)
EARLIER, LATER = NOW - timedelta(minutes=1), NOW + timedelta(minutes=1)


def event(uid: str, message: str, seen: datetime = NOW, **changes: object) -> Json:
    return {
        "metadata": {},
        "involvedObject": {"uid": uid},
        "reason": "FailedMount",
        "message": message,
        "lastTimestamp": written(seen),
    } | changes


class Events:
    """A namespace's warning events in two pages, and the clock.

    Attributes:
        listings: how often they were asked for.
        failure: what the next listing ends with.
        takes: how long a listing takes.
    """

    def __init__(self, *events: Json) -> None:
        self.events = list(events)
        self.listings = 0
        self.now = NOW
        self.failure: Exception | None = None
        self.takes = timedelta()
        self.warnings = WarningEvents(cast("Cluster", self), lambda uid: uid.startswith("our"), lambda: self.now)

    async def list_warnings(self, _namespace: str) -> AsyncIterator[list[Json]]:
        self.listings += 1
        self.now += self.takes
        await asyncio.sleep(0)
        if self.failure:
            raise self.failure
        yield self.events[:1]
        yield self.events[1:]

    def about(self, *uids: str, since: datetime = EARLIER) -> list[tuple[str, ...]]:
        """What is said of these, asked for at the same time."""

        async def ask() -> list[tuple[str, ...]]:
            return await asyncio.gather(*(self.warnings.about("ml", uid, since) for uid in uids))

        return asyncio.run(ask())


def test_the_newest_warning_about_an_object_comes_first_and_old_ones_are_left_out() -> None:
    events = Events(event("our-pod", "old", EARLIER), event("our-pod", "new", LATER), event("our-pod", "now"), event("our-job", "other"))
    assert events.about("our-pod", since=NOW) == [("new", "now")]


def test_jobs_that_wait_together_cost_one_listing() -> None:
    events = Events(event("our-pod", "no claim"), event("our-job", "quota"))
    events.about("our-pod")
    assert events.about("our-pod", "our-job", "our-third") == [("no claim",), ("quota",), ()]
    assert events.listings == 1


def test_nobody_waits_for_a_listing_that_another_one_has_begun() -> None:
    events = Events(event("our-pod", "no claim"), event("our-job", "quota"))
    assert events.about("our-pod", "our-job") == [("no claim",), ()]
    assert events.listings == 1


def test_they_are_listed_again_when_they_are_not_fresh() -> None:
    events = Events()
    assert events.about("our-pod") == [()]
    events.events.append(event("our-pod", "no claim"))
    events.now += FRESH
    assert events.about("our-pod") == [("no claim",)]


@pytest.mark.parametrize(("takes", "pause"), [(0.1, FRESH_SECONDS), (1.0, 19.0), (10.0, STALE_SECONDS)])
def test_what_takes_long_is_listed_less_often(takes: float, pause: float) -> None:
    events = Events()
    events.takes = timedelta(seconds=takes)
    events.about("our-pod")
    events.now += timedelta(seconds=pause - 0.01)
    events.about("our-pod")
    assert events.listings == 1
    events.now += timedelta(seconds=0.01)
    events.about("our-pod")
    assert events.listings == 2


def test_no_listing_begins_while_another_one_lasts() -> None:
    events = Events()
    events.takes = timedelta(seconds=30)
    events.about("our-pod", "our-job", "our-third")
    assert events.listings == 1


@pytest.mark.parametrize("failure", [ApiError(504, "Timeout", "etcd"), TimeoutError(), ConnectionResetError()])
def test_a_listing_that_fails_leaves_what_was_known(failure: Exception) -> None:
    events = Events(event("our-pod", "no claim"))
    events.about("our-pod")
    events.now += FRESH
    events.failure = failure
    assert events.about("our-pod") == [("no claim",)]
    assert events.about("our-pod") == [("no claim",)]
    assert events.listings == 2


@pytest.mark.parametrize(
    "ignored",
    [
        pytest.param(event("foreign-pod", "x"), id="about others"),
        pytest.param(event("our-pod", "x", reason="FailedScheduling"), id="the scheduler's"),
        pytest.param(event("our-pod", "x", lastTimestamp=None), id="without a time"),
    ],
)
def test_what_explains_nothing_is_not_kept(ignored: Json) -> None:
    assert Events(ignored).about(ignored["involvedObject"]["uid"]) == [()]


def test_an_event_of_the_newer_kind_has_its_time_elsewhere() -> None:
    events = Events(event("our-pod", "no claim", lastTimestamp=None, eventTime="2026-01-01T12:00:00.123456Z"))
    assert events.about("our-pod") == [("no claim",)]

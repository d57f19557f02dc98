"""resync.py: what it lists, what it queues, and what one namespace that may not be read does to the others."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import cast

import pytest
from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import ApiError, Cluster, Listing
from finetune_operator.pacing import SHARE, pause_after
from finetune_operator.resync import pause, resync
from finetune_operator.settings import Settings
from finetune_operator.subject import Json, Key
from finetune_operator.work_queue import WorkQueue
from hypothesis import given
from hypothesis import strategies as st
from support.simulated_cluster import build_finetunejob

TURNS = 50  # of the event loop: more than a round takes, and then it sleeps
Namespaces = dict[str, list[Json] | ApiError]


class Lists:
    """Namespaces of FineTuneJobs, or why one can't be listed; there are no Jobs and no pods."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces

    async def list_pages(self, kind: Kind, namespace: str) -> AsyncIterator[Listing]:
        found = self._namespaces[namespace]
        if isinstance(found, ApiError):
            raise found
        yield Listing(found if kind is Kind.FINETUNEJOB else [], 100)


def finetunejob(namespace: str, name: str, *, phase: str = "") -> Json:
    raw = build_finetunejob(name=name, status={"phase": phase, "observedGeneration": 1} if phase else None)
    raw["metadata"] |= {"namespace": namespace, "uid": f"{namespace}-{name}"}
    return raw


def first_round(namespaces: Namespaces) -> tuple[list[Key], list[Counter[str]]]:
    """The keys that the first round queued, in the order in which a worker gets them, and the phases that it told of."""
    queue, told = WorkQueue(lambda: 0.0), list[Counter[str]]()

    async def run() -> None:
        lists, settings = cast("Cluster", Lists(namespaces)), Settings(trainer_image="trainer", namespaces=tuple(namespaces))
        task = asyncio.create_task(resync(queue, lists, Cache(), settings, lambda: None, told.append))
        for _ in range(TURNS):
            await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())
    keys = []
    while (key := queue.poll()[0]) is not None:
        keys.append(key)
    return keys, told


def test_every_unfinished_job_is_queued_and_the_phases_are_counted() -> None:
    jobs: list[Json] = [finetunejob("ml", "runs", phase="Running"), finetunejob("ml", "done", phase="Succeeded"), finetunejob("ml", "new")]
    keys, told = first_round({"ml": jobs})
    assert set(keys) >= {Key("ml", "runs"), Key("ml", "new")}
    assert told == [Counter({"Running": 1, "Succeeded": 1, "none": 1})]


def test_a_job_for_which_nothing_was_done_yet_comes_first() -> None:
    keys, _ = first_round({"ml": [finetunejob("ml", "a-running-one", phase="Running"), finetunejob("ml", "new")]})
    assert keys == [Key("ml", "new"), Key("ml", "a-running-one")]


def test_a_namespace_that_may_not_be_listed_keeps_no_other_from_being_served() -> None:
    refused = ApiError(403, "Forbidden", "no Role in this namespace")
    keys, told = first_round({"closed": refused, "ml": [finetunejob("ml", "new")]})
    assert keys == [Key("ml", "new")]
    assert len(told) == 1


@pytest.mark.parametrize(
    "namespaces",
    [
        pytest.param({"closed": ApiError(403, "Forbidden", "no Role")}, id="the only namespace may not be listed"),
        pytest.param({"ml": [], "broken": ApiError(500, "InternalError", "etcd")}, id="one of several can't be listed now"),
    ],
)
def test_a_round_that_has_not_seen_everything_tells_nothing(namespaces: Namespaces) -> None:
    assert first_round(namespaces) == ([], [])


@given(st.floats(0, 1000), st.floats(1, 3600))
def test_rounds_take_a_small_share_of_the_time_and_are_never_more_frequent_than_wanted(took: float, wanted: float) -> None:
    pause = pause_after(took, wanted)
    assert pause >= wanted
    assert took <= SHARE * (took + pause) * 1.001
    assert pause == wanted or took > SHARE * wanted


def test_it_shows_that_it_is_alive_while_it_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    beats = []
    monkeypatch.setattr("finetune_operator.resync.asyncio.sleep", sleep)
    asyncio.run(pause(100.0, 45.0, lambda: beats.append(len(slept))))
    assert slept == [45.0, 45.0, 10.0]
    assert beats == [1, 2]

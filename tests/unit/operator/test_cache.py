"""cache.py: what is new is news, what is old never wins, and what has ended costs nothing."""

from typing import Any

import pytest
from finetune_api import names
from finetune_operator.cache import Cache, Kind
from finetune_operator.subject import Json, Key
from hypothesis import given
from hypothesis import strategies as st
from support.simulated_cluster import build_finetunejob

KEY = Key("ml", "tiny")


def versioned(version: int, uid: str = "uid-1", **spec: Any) -> Json:
    raw = build_finetunejob(spec)
    raw["metadata"] |= {"resourceVersion": str(version), "uid": uid}
    return raw


def job(version: int, uid: str = "job-1", **status: Any) -> Json:
    metadata = {"name": uid, "namespace": "ml", "uid": uid, "resourceVersion": str(version), "labels": {names.LABEL_JOB: "tiny"}}
    return {"metadata": metadata, "spec": {"suspend": False, "template": {"large": "x" * 1000}}, "status": status}


@pytest.fixture
def cache() -> Cache:
    return Cache()


def test_the_newest_of_an_object_is_kept_in_whatever_order_it_comes(cache: Cache) -> None:
    assert cache.update(Kind.FINETUNEJOB, versioned(2, training={"seed": 2})) == KEY
    assert cache.update(Kind.FINETUNEJOB, versioned(1, training={"seed": 1})) is None
    assert cache.update(Kind.FINETUNEJOB, versioned(2, training={"seed": 2})) is None
    found = cache.finetunejob(KEY)
    assert found is not None
    assert found["spec"]["training"]["seed"] == 2
    assert found["metadata"]["resourceVersion"] == "2"


def test_only_the_fields_that_decisions_read_are_kept_and_only_their_change_is_news(cache: Cache) -> None:
    cache.update(Kind.FINETUNEJOB, versioned(1))
    assert cache.update(Kind.JOB, job(1)) == KEY
    assert cache.update(Kind.JOB, job(2, ready=1)) is None
    assert cache.update(Kind.JOB, job(3, ready=1, completionTime="now")) == KEY
    (kept,) = cache.children(Kind.JOB, KEY)
    assert kept == {
        "metadata": {"name": "job-1", "namespace": "ml", "uid": "job-1"},
        "spec": {"suspend": False},
        "status": {"completionTime": "now"},
    }


def test_a_job_that_got_another_label_is_gone_once_it_is_deleted(cache: Cache) -> None:
    """Kept under both labels, the first copy would outlive it, and its version be missing when a listing is compared."""
    cache.update(Kind.FINETUNEJOB, versioned(1))
    cache.update(Kind.JOB, job(1))
    relabelled = job(2, completionTime="now")
    relabelled["metadata"]["labels"] = {names.LABEL_JOB: "other"}
    assert cache.update(Kind.JOB, relabelled) == KEY
    assert cache.children(Kind.JOB, Key("ml", "other")) == ()
    assert cache.delete(Kind.JOB, relabelled) == KEY
    assert cache.children(Kind.JOB, KEY) == ()
    for _ in range(2):
        cache.prune_tombstones()
    assert cache.delete_unlisted(Kind.JOB, (), 9, KEY) == []


def test_what_is_deleted_does_not_come_back_with_a_late_event(cache: Cache) -> None:
    cache.update(Kind.FINETUNEJOB, versioned(1))
    cache.update(Kind.JOB, job(1))
    assert cache.delete(Kind.JOB, job(3)) == KEY
    assert cache.update(Kind.JOB, job(2)) is None
    assert cache.children(Kind.JOB, KEY) == ()


def test_a_namesake_that_was_made_anew_wins_over_one_whose_deletion_nobody_has_heard_of(cache: Cache) -> None:
    cache.update(Kind.FINETUNEJOB, versioned(5, "new"))
    cache.update(Kind.FINETUNEJOB, versioned(4, "old"))
    found = cache.finetunejob(KEY)
    assert found is not None
    assert found["metadata"]["uid"] == "new"


def test_what_a_listing_lacks_is_gone_unless_it_is_newer_than_the_listing(cache: Cache) -> None:
    cache.update(Kind.FINETUNEJOB, versioned(1))
    for uid, version in (("kept", 1), ("lost", 2), ("new", 9)):
        cache.update(Kind.JOB, job(version, uid))
    assert cache.delete_unlisted(Kind.JOB, ["kept"], 5) == [KEY]
    assert {item["metadata"]["uid"] for item in cache.children(Kind.JOB, KEY)} == {"kept", "new"}


def test_a_listing_for_one_job_says_nothing_of_another(cache: Cache) -> None:
    cache.update(Kind.JOB, job(1))
    assert cache.delete_unlisted(Kind.JOB, [], 5, Key("ml", "other")) == []
    assert len(cache.children(Kind.JOB, KEY)) == 1


def test_a_job_that_has_ended_is_no_news_until_it_changes(cache: Cache) -> None:
    cache.update(Kind.FINETUNEJOB, versioned(1))
    cache.update(Kind.JOB, job(1))
    cache.mark_finished(KEY)
    assert cache.finetunejob(KEY) is None
    assert cache.update(Kind.FINETUNEJOB, versioned(1)) is None
    assert cache.update(Kind.FINETUNEJOB, versioned(2)) == KEY


def test_what_becomes_of_the_jobs_of_an_ended_one_is_neither_kept_nor_news(cache: Cache) -> None:
    cache.update(Kind.FINETUNEJOB, versioned(1))
    cache.update(Kind.JOB, job(1))
    cache.mark_finished(KEY)
    assert cache.update(Kind.JOB, job(2, completionTime="now")) is None
    assert cache.delete_unlisted(Kind.JOB, [], 5) == []
    assert cache.update(Kind.JOB, job(6, "another")) is None
    assert cache.delete(Kind.JOB, job(7, "another")) is None
    cache.update(Kind.FINETUNEJOB, versioned(2))
    assert cache.children(Kind.JOB, KEY) == ()
    assert cache.update(Kind.JOB, job(8, "later")) == KEY


def test_a_job_whose_deletion_is_heard_of_is_not_remembered_as_ended(cache: Cache) -> None:
    cache.update(Kind.FINETUNEJOB, versioned(1))
    cache.mark_finished(KEY)
    assert cache.delete(Kind.FINETUNEJOB, versioned(2)) is None
    cache.update(Kind.JOB, job(3))
    assert cache.update(Kind.FINETUNEJOB, versioned(4, "made anew")) == KEY
    assert len(cache.children(Kind.JOB, KEY)) == 1


def test_a_job_that_is_seen_before_its_owner_is_kept_and_told_of_with_it(cache: Cache) -> None:
    assert cache.update(Kind.JOB, job(1)) is None
    assert cache.update(Kind.FINETUNEJOB, versioned(2)) == KEY
    assert len(cache.children(Kind.JOB, KEY)) == 1


def test_of_a_job_that_is_gone_its_jobs_and_pods_are_known_until_they_go(cache: Cache) -> None:
    """One of the same name waits for their end."""
    cache.update(Kind.FINETUNEJOB, versioned(1))
    cache.update(Kind.JOB, job(2))
    cache.evict_finetunejob(KEY)
    assert cache.finetunejob(KEY) is None
    cache.update(Kind.FINETUNEJOB, versioned(3, uid="uid-2"))
    assert len(cache.children(Kind.JOB, KEY)) == 1
    cache.delete(Kind.JOB, job(4))
    assert cache.children(Kind.JOB, KEY) == ()


def test_deletions_are_remembered_for_two_rounds_of_listings(cache: Cache) -> None:
    cache.update(Kind.FINETUNEJOB, versioned(1))
    cache.delete(Kind.JOB, job(1))
    cache.prune_tombstones()
    assert cache.update(Kind.JOB, job(2)) is None
    cache.prune_tombstones()
    assert cache.update(Kind.JOB, job(2)) == KEY


@given(st.permutations([versioned(version, training={"seed": version}) for version in range(1, 6)]))
def test_every_order_of_events_ends_in_the_same_state(events: list[Json]) -> None:
    cache = Cache()
    for item in events:
        cache.update(Kind.FINETUNEJOB, item)
    found = cache.finetunejob(KEY)
    assert found is not None
    assert found["spec"]["training"]["seed"] == 5

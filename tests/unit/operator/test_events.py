"""events.py: each event of the three kinds puts the right key on the queue, and kopf is told to write and list nothing."""

import pytest
from finetune_api import names
from finetune_operator.cache import Cache
from finetune_operator.cluster import PAGE
from finetune_operator.events import build_kopf_settings, build_registry
from finetune_operator.subject import Json, Key
from finetune_operator.work_queue import WorkQueue
from support.simulated_cluster import build_finetunejob

LONG = "n" * 100


class Watch:
    """The handlers that kopf would call, by the plural of their kind."""

    def __init__(self) -> None:
        self.queue = WorkQueue(lambda: 0.0)
        self.cache = Cache()
        registry = build_registry(self.queue, self.cache)
        self.handlers = {handler.selector.any_name: handler for handler in registry._watching.get_all_handlers()}

    async def see(self, plural: str, item: Json, type_: str | None = "MODIFIED") -> Key | None:
        await self.handlers[plural].fn(event={"type": type_, "object": item})
        key, _ = self.queue.poll()
        if key:
            self.queue.done(key)
        return key


def build_child(label: str, version: int = 1) -> Json:
    return {"metadata": {"name": "x", "namespace": "ml", "uid": "x", "resourceVersion": str(version), "labels": {names.LABEL_JOB: label}}}


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_three_kinds_are_watched_and_no_other(watch: Watch) -> None:
    assert set(watch.handlers) == {"finetunejobs", "jobs", "pods"}


@pytest.mark.parametrize("type_", [None, "ADDED", "MODIFIED"])
async def test_an_event_of_a_finetunejob_puts_its_key_on_the_queue(watch: Watch, type_: str | None) -> None:
    assert await watch.see("finetunejobs", build_finetunejob(), type_) == Key("ml", "tiny")
    assert await watch.see("finetunejobs", build_finetunejob(), "DELETED") == Key("ml", "tiny")


@pytest.mark.parametrize("kind", ["jobs", "pods"])
async def test_an_event_of_a_child_puts_the_key_of_its_finetunejob_on_the_queue(watch: Watch, kind: str) -> None:
    await watch.see("finetunejobs", build_finetunejob())
    assert await watch.see(kind, build_child("tiny")) == Key("ml", "tiny")
    assert await watch.see(kind, build_child("tiny", 2)) is None, "nothing that matters has changed"
    assert await watch.see(kind, build_child("tiny", 3), "DELETED") == Key("ml", "tiny")


@pytest.mark.parametrize("kind", ["jobs", "pods"])
async def test_a_child_of_a_long_name_is_mapped_back_through_its_label(watch: Watch, kind: str) -> None:
    assert await watch.see("finetunejobs", build_finetunejob(name=LONG)) == Key("ml", LONG)
    assert await watch.see(kind, build_child(names.job_label(LONG))) == Key("ml", LONG)


def test_kopf_posts_no_events() -> None:
    assert build_kopf_settings().posting.enabled is False


def test_kopf_does_not_scan_for_kinds_and_namespaces() -> None:
    assert build_kopf_settings().scanning.disabled is True


def test_kopf_has_no_peering_objects() -> None:
    assert build_kopf_settings().peering.standalone is True


def test_kopf_lists_in_pages_as_we_do() -> None:
    assert build_kopf_settings().watching.chunk_size == PAGE


def test_the_api_server_sends_only_jobs_and_pods_of_ours() -> None:
    selectors = build_kopf_settings().watching.label_selectors
    assert selectors["batch", "v1", "jobs"] == selectors["", "v1", "pods"] == names.LABEL_JOB

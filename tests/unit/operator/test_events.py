"""events.py: each event of the three kinds puts the right key on the queue, and kopf is told to write and list nothing."""

from typing import Any

import pytest
from finetune_api import names
from finetune_operator.events import build_kopf_settings, build_registry
from finetune_operator.subject import Key
from finetune_operator.work_queue import WorkQueue

LONG = "n" * 100


class Watch:
    """The handlers that kopf would call, by the plural of their kind."""

    def __init__(self) -> None:
        self.queue = WorkQueue(lambda: 0.0)
        registry = build_registry(self.queue)
        self.handlers = {handler.selector.any_name: handler for handler in registry._watching.get_all_handlers()}

    async def see(self, plural: str, **event: Any) -> Key | None:
        await self.handlers[plural].fn(namespace="ml", **event)
        key, _ = self.queue.poll()
        return key


@pytest.fixture
def watch() -> Watch:
    return Watch()


def test_three_kinds_are_watched_and_no_other(watch: Watch) -> None:
    assert set(watch.handlers) == {"finetunejobs", "jobs", "pods"}


def test_only_jobs_and_pods_with_our_label_are_handled(watch: Watch) -> None:
    assert [list(watch.handlers[kind].labels) for kind in ("jobs", "pods")] == [[names.LABEL_JOB], [names.LABEL_JOB]]


async def test_an_event_of_a_finetunejob_puts_its_key_on_the_queue(watch: Watch) -> None:
    assert await watch.see("finetunejobs", name="tiny", type="ADDED") == Key("ml", "tiny")


@pytest.mark.parametrize("kind", ["jobs", "pods"])
async def test_an_event_of_a_child_puts_the_key_of_its_finetunejob_on_the_queue(watch: Watch, kind: str) -> None:
    assert await watch.see(kind, name="tiny-1", labels={names.LABEL_JOB: "tiny"}, type="DELETED") == Key("ml", "tiny")


@pytest.mark.parametrize("kind", ["jobs", "pods"])
async def test_a_child_of_a_long_name_is_mapped_back_through_its_label(watch: Watch, kind: str) -> None:
    assert await watch.see("finetunejobs", name=LONG) == Key("ml", LONG)
    watch.queue.succeed(Key("ml", LONG))
    assert await watch.see(kind, name="x", labels={names.LABEL_JOB: names.job_label(LONG)}) == Key("ml", LONG)


def test_kopf_posts_no_events() -> None:
    assert build_kopf_settings().posting.enabled is False


def test_kopf_does_not_scan_for_kinds_and_namespaces() -> None:
    assert build_kopf_settings().scanning.disabled is True


def test_kopf_has_no_peering_objects() -> None:
    assert build_kopf_settings().peering.standalone is True


def test_the_api_server_sends_only_jobs_and_pods_of_ours() -> None:
    selectors = build_kopf_settings().watching.label_selectors
    assert selectors["batch", "v1", "jobs"] == selectors["", "v1", "pods"] == names.LABEL_JOB

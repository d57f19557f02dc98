"""Watch events come in here, in the only file that knows kopf: every event goes into the cache, and the job for which it is news onto the queue.

kopf writes nothing here: no finalizers, annotations, events or peering objects, and no scan for CRDs or namespaces.
"""

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

import kopf
from finetune_api import names
from finetune_api.spec import GROUP, PLURAL, VERSION

from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import PAGE
from finetune_operator.subject import is_new
from finetune_operator.work_queue import WorkQueue

SERVER_TIMEOUT_SECONDS = 300  # a whole number: the API server refuses "300.0"
CLIENT_TIMEOUT_SECONDS = 330  # a watch that fell silent without being closed is opened anew


async def watch(queue: WorkQueue, cache: Cache, namespaces: tuple[str, ...]) -> None:
    """Watches FineTuneJobs, Jobs and pods until SIGTERM or SIGINT.

    Args:
        namespaces: where; none means everywhere.

    Raises:
        Exception: what ended kopf; the process should end too and be restarted.
    """
    await kopf.operator(
        registry=build_registry(queue, cache),
        settings=build_kopf_settings(),
        standalone=True,
        clusterwide=not namespaces,
        namespaces=namespaces,
    )


def build_registry(queue: WorkQueue, cache: Cache) -> kopf.OperatorRegistry:
    """Registers the handlers of the three kinds, and the login."""
    registry = kopf.OperatorRegistry()

    def handler(kind: Kind) -> Callable[..., Coroutine[Any, Any, None]]:
        async def on_event(event: Mapping[str, Any], **_: Any) -> None:
            key = cache.delete(kind, event["object"]) if event["type"] == "DELETED" else cache.update(kind, event["object"])
            if key:
                queue.add(key, urgent=kind is Kind.FINETUNEJOB and is_new(event["object"]))

        return on_event

    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(handler(Kind.FINETUNEJOB))
    kopf.on.event("batch", "v1", "jobs", registry=registry)(handler(Kind.JOB))
    kopf.on.event("", "v1", "pods", registry=registry)(handler(Kind.POD))
    kopf.on.login(registry=registry)(_login)
    return registry


class _NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc] # kopf's classes carry no types here
    """Keeps kopf from working out what has changed: that would take most of an event's time, and nothing here asks for it."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return cast("kopf.BodyEssence", {})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        return None


def build_kopf_settings() -> kopf.OperatorSettings:
    """The settings with which kopf watches only what is asked for, and writes nothing."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.persistence.diffbase_storage = _NoDiffBase()
    settings.queueing.idle_timeout = 0.5  # seconds that a task lives on after its object's last event; there may be thousands
    settings.watching.chunk_size = PAGE  # else a start among 10,000 jobs holds all of their objects at once, more than a GB
    settings.watching.server_timeout = SERVER_TIMEOUT_SECONDS
    settings.watching.client_timeout = CLIENT_TIMEOUT_SECONDS
    settings.watching.label_selectors["batch", "v1", "jobs"] = names.LABEL_JOB
    settings.watching.label_selectors["", "v1", "pods"] = names.LABEL_JOB
    return settings


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

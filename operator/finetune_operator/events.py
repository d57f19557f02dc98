"""Where events come in: kopf watches FineTuneJobs, and the Jobs and pods that carry our label, and every event puts a key on the queue.

kopf does nothing else here. It writes no annotations and no finalizers, and no handler's result is ever stored by it.
"""

from collections.abc import Callable
from typing import Any

import kopf
from finetune_api import names
from finetune_api.spec import GROUP, PLURAL, VERSION

from finetune_operator.reconcile import Key


def register(registry: kopf.OperatorRegistry, add: Callable[[Key], None]) -> None:
    """Registers the three watches.

    Args:
        registry: kopf's.
        add: takes the key of the FineTuneJob that an event is about.
    """
    labels = {names.LABEL_JOB: kopf.PRESENT}
    known: dict[Key, str] = {}  # (namespace, label) -> name: a label is shorter than a long name

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
    def on_finetunejob(namespace: str, name: str, **_: Any) -> None:
        known[namespace, names.job_label(name)] = name
        add((namespace, name))

    @kopf.on.event("batch", "v1", "jobs", labels=labels, registry=registry)
    @kopf.on.event("", "v1", "pods", labels=labels, registry=registry)
    def on_child(namespace: str, labels: Any, **_: Any) -> None:
        label = labels[names.LABEL_JOB]
        add((namespace, known.get((namespace, label), label)))


def kopf_settings(settings: kopf.OperatorSettings) -> None:
    """What keeps kopf to watching: no posting of events, no scanning of the cluster's CRDs and namespaces, no peering."""
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330

"""Where watch events come in, and the only file that knows kopf: every event puts a key on the queue and is then forgotten.

kopf writes nothing here: no finalizers, annotations, events or peering objects, and no scan for CRDs or namespaces.
"""

from typing import Any

import kopf
from finetune_api import names
from finetune_api.spec import GROUP, PLURAL, VERSION

from finetune_operator.settings import Settings
from finetune_operator.subject import Key
from finetune_operator.work_queue import WorkQueue

SERVER_TIMEOUT_SECONDS = 300  # a whole number: the API server refuses "300.0"
CLIENT_TIMEOUT_SECONDS = 330  # a watch that fell silent without being closed is opened anew


async def watch(queue: WorkQueue, settings: Settings) -> None:
    """Watches FineTuneJobs, Jobs and pods until SIGTERM or SIGINT.

    Raises:
        Exception: what ended kopf; the process should end too and be restarted.
    """
    await kopf.operator(
        registry=build_registry(queue),
        settings=build_kopf_settings(),
        standalone=True,
        clusterwide=not settings.namespaces,
        namespaces=settings.namespaces,
    )


def build_registry(queue: WorkQueue) -> kopf.OperatorRegistry:
    """Handlers for the three kinds, and the login."""
    registry = kopf.OperatorRegistry()
    full_names: dict[Key, str] = {}

    async def on_finetunejob(namespace: str, name: str, **_: Any) -> None:
        if names.job_label(name) != name:
            full_names[Key(namespace, names.job_label(name))] = name
        queue.add(Key(namespace, name))

    async def on_child(namespace: str, labels: dict[str, str], **_: Any) -> None:
        label = labels.get(names.LABEL_JOB, "")
        queue.add(Key(namespace, full_names.get(Key(namespace, label), label)))

    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(on_finetunejob)
    kopf.on.event("batch", "v1", "jobs", labels={names.LABEL_JOB: kopf.PRESENT}, registry=registry)(on_child)
    kopf.on.event("", "v1", "pods", labels={names.LABEL_JOB: kopf.PRESENT}, registry=registry)(on_child)
    kopf.on.login(registry=registry)(_login)
    return registry


def build_kopf_settings() -> kopf.OperatorSettings:
    """Only what we ask for is watched, nothing is written."""
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.watching.server_timeout = SERVER_TIMEOUT_SECONDS
    settings.watching.client_timeout = CLIENT_TIMEOUT_SECONDS
    settings.watching.label_selectors["batch", "v1", "jobs"] = names.LABEL_JOB
    settings.watching.label_selectors["", "v1", "pods"] = names.LABEL_JOB
    return settings


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

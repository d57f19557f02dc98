"""Reconciles one key: observe (only reads), decide (pure), execute (children, then the status where it differs).

Every step is safe to repeat and the process may end between any two of them. Called by the workers of main.py's queue.
"""

import logging
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp
from finetune_api import names
from finetune_api.progress import ProgressReport
from finetune_api.status import FineTuneJobStatus

from finetune_operator.cluster import Cluster
from finetune_operator.decide import CreateJob, DeleteJob, PatchJob, Plan, decide
from finetune_operator.observed import TERMINAL, World, owner_uid, stored_status
from finetune_operator.progress import read_progress
from finetune_operator.settings import Settings

Manifest = dict[str, Any]
Key = tuple[str, str]
"""Namespace and name of a FineTuneJob."""

log = logging.getLogger(__name__)


@dataclass
class Reconciler:
    """The effects around `decide`.

    Attributes:
        progress_written: when each key's progress was last stored (monotonic seconds), to keep writes rare.
    """

    cluster: Cluster
    settings: Settings
    session: aiohttp.ClientSession
    progress_written: dict[Key, float] = field(default_factory=dict)

    async def reconcile(self, key: Key) -> float | None:
        """Brings one FineTuneJob a step further.

        Returns:
            Seconds after which it should be looked at again, when that is sooner than the next re-list.
        """
        world = await self.observe(key)
        if world is None:
            self.progress_written.pop(key, None)
            return None
        plan = decide(world, self.settings, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        await self.execute(key, world, plan)
        return self.settings.progress_seconds if _has_running_pod(world) else None

    async def observe(self, key: Key) -> World | None:
        """Reads all that a decision may look at; None when the FineTuneJob is gone."""
        namespace, name = key
        job = await self.cluster.read_finetunejob(namespace, name)
        if job is None:
            return None
        label, uid = names.job_label(name), job["metadata"]["uid"]
        listed = await self.cluster.list_jobs(namespace, label)
        owned = tuple(item for item in listed if owner_uid(item) == uid)
        uids = {item["metadata"]["uid"] for item in owned}
        pods = tuple(item for item in await self.cluster.list_pods(namespace, label) if owner_uid(item) in uids)
        world = World(job, owned, pods=pods)
        for action in decide(world, self.settings, "1970-01-01T00:00:00Z").actions:
            if isinstance(action, CreateJob):
                found = await self.cluster.read_job(namespace, action.manifest["metadata"]["name"])
                return World(job, owned, found if found and owner_uid(found) != uid else None, pods)
        return World(job, owned, None, pods, await self._progress(world))

    async def execute(self, key: Key, world: World, plan: Plan) -> None:
        """Does what the plan says: actions in order, then the status."""
        namespace = key[0]
        for action in plan.actions:
            log.info("%s/%s: %s", *key, _describe(action))
            match action:
                case CreateJob(manifest):
                    await self.cluster.create_job(manifest)
                case PatchJob(name, patch):
                    await self.cluster.patch_job(namespace, name, patch)
                case DeleteJob(name, uid):
                    await self.cluster.delete_job(namespace, name, uid)
        if plan.status is not None:
            await self._store(key, world, plan.status)

    async def _store(self, key: Key, world: World, status: FineTuneJobStatus) -> None:
        before, after = stored_status(world.job), status
        if _only_progress(before, after):
            if (
                time.monotonic() - self.progress_written.get(key, -self.settings.progress_write_seconds)
                < self.settings.progress_write_seconds
            ):
                return
            self.progress_written[key] = time.monotonic()
        wire = after.model_dump(mode="json", by_alias=True, exclude_none=True)
        if wire != (world.job.get("status") or {}):
            await self.cluster.patch_status(world.job, wire)

    async def _progress(self, world: World) -> ProgressReport | None:
        run = stored_status(world.job).run
        running = _running_pod(world)
        if running is None or run is None:
            return None
        return await read_progress(self.session, running["status"]["podIP"], run.train_digest)


def _only_progress(before: FineTuneJobStatus, after: FineTuneJobStatus) -> bool:
    """Whether nothing but the progress (and the sentence that quotes it) moved, and it had moved before."""
    if before.progress is None or before == after:
        return False
    blank: dict[str, Any] = {"progress": None, "message": "", "conditions": ()}
    same = before.model_copy(update=blank) == after.model_copy(update=blank)
    return same and [(item.type, item.status, item.reason) for item in before.conditions] == [
        (item.type, item.status, item.reason) for item in after.conditions
    ]


def _running_pod(world: World) -> Manifest | None:
    if stored_status(world.job).phase in TERMINAL:
        return None
    alive = [pod for pod in world.pods if pod.get("status", {}).get("phase") == "Running" and pod["status"].get("podIP")]
    return alive[-1] if alive else None


def _has_running_pod(world: World) -> bool:
    return _running_pod(world) is not None


def _describe(action: CreateJob | PatchJob | DeleteJob) -> str:
    name = action.manifest["metadata"]["name"] if isinstance(action, CreateJob) else action.name
    return f"{type(action).__name__} {name}"

"""Executes a plan: one request an action, in order, stopping at the first that fails. Makes no decision of its own."""

import logging
from collections.abc import Awaitable
from dataclasses import dataclass

from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import FAILED, ApiError, Cluster
from finetune_operator.plan import Action, CreateJob, DeleteJob, EmitEvent, PatchJob, Plan, WriteStatus
from finetune_operator.subject import FineTuneJob, Json, is_controlled_by

logger = logging.getLogger(__name__)


class JobRefusedError(ApiError):
    """The API server has refused to create a Job."""


class ChangeRefusedError(ApiError):
    """The API server has refused to change a Job."""


class StatusRefusedError(ApiError):
    """The API server has refused a status as invalid."""


@dataclass(frozen=True)
class Executor:
    """Executes plans. What the API server answers goes into the cache: the next pass must not decide on less than this one has done."""

    cluster: Cluster
    cache: Cache

    async def execute(self, subject: FineTuneJob, plan: Plan) -> None:
        """Does one action after the other.

        Raises:
            ApiError: a request was refused; what comes after it is not done.
        """
        for action in plan.actions:
            logger.info("%s: %s", subject.key, _summary(action))
            await self._act(subject, action)

    async def _act(self, subject: FineTuneJob, action: Action) -> None:
        namespace = subject.key.namespace
        match action:
            case WriteStatus(patch):
                await self._write(subject, patch)
            case CreateJob(manifest):
                await self._create(subject, manifest)
            case PatchJob(name, patch):
                await self._patch(namespace, name, patch)
            case DeleteJob(name, uid):
                await self._update_unless_gone(self.cluster.delete_job(namespace, name, uid))
            case EmitEvent(event):
                await self._emit(subject, event)

    async def _write(self, subject: FineTuneJob, patch: Json) -> None:
        try:
            stored = await self.cluster.patch_status(subject.key, subject.metadata["resourceVersion"], patch)
        except ApiError as error:
            if error.status == 422:
                raise StatusRefusedError(error.status, error.reason, error.message) from error
            raise
        self.cache.update(Kind.FINETUNEJOB, stored)

    async def _emit(self, subject: FineTuneJob, event: Json) -> None:
        """Creates an event. Events only inform people, so that a failure delays nothing."""
        try:
            await self.cluster.create_event(event)
        except FAILED as error:
            if not isinstance(error, ApiError) or error.reason != "AlreadyExists":
                logger.warning("%s: no event %s: %s", subject.key, event["reason"], error)

    async def _create(self, subject: FineTuneJob, manifest: Json) -> None:
        try:
            self.cache.update(Kind.JOB, await self._created(subject, manifest))
        except ApiError as error:
            if error.is_refusal:
                raise JobRefusedError(error.status, error.reason, error.message) from error
            raise

    async def _created(self, subject: FineTuneJob, manifest: Json) -> Json:
        try:
            return await self.cluster.create_job(manifest)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            # Another operator was faster, or the last answer was lost. The name is made of UID and digest; the owner shows whether the Job is ours.
            found = await self.cluster.read_job(manifest["metadata"]["namespace"], manifest["metadata"]["name"])
            if found is None or not is_controlled_by(found, subject.uid):
                raise
            return found

    async def _patch(self, namespace: str, name: str, patch: Json) -> None:
        try:
            await self._update_unless_gone(self.cluster.patch_job(namespace, name, patch))
        except ApiError as error:
            if error.is_refusal:
                raise ChangeRefusedError(error.status, error.reason, error.message) from error
            raise

    async def _update_unless_gone(self, request: Awaitable[Json]) -> None:
        try:
            answer = await request
        except ApiError as error:
            if error.status != 404:
                raise
        else:
            if answer.get("kind") == "Job":  # a deletion that is done at once answers with a Status
                self.cache.update(Kind.JOB, answer)


def _summary(action: Action) -> str:
    match action:
        case WriteStatus(patch):
            return f"status {patch.get('phase', 'updated')}"
        case CreateJob(manifest):
            return f"create Job {manifest['metadata']['name']}"
        case PatchJob(name, patch):
            return f"patch Job {name}: {patch}"
        case DeleteJob(name, _):
            return f"delete Job {name}"
        case EmitEvent(event):
            return f"event {event['reason']}"

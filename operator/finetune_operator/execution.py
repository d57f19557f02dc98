"""Executes a plan: one request an action, in order, stopping at the first that fails. Makes no decision of its own."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime

from finetune_api.states import Reason

from finetune_operator.announcements import Announcement, build_event
from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import FAILED, ApiError, Cluster
from finetune_operator.decide import Situation, report_a_refused_job
from finetune_operator.plan import Action, Announce, CreateJob, DeleteJob, PatchJob, Plan, WriteStatus
from finetune_operator.redaction import clean
from finetune_operator.settings import Settings
from finetune_operator.subject import FineTuneJob, Json, Subject, World, is_controlled_by, read_subject

logger = logging.getLogger(__name__)
FOR_GOOD = (400, 422)
_WEBHOOK = "failed calling webhook"


@dataclass(frozen=True)
class Executor:
    """What an execution needs. What an answer shows goes into the cache: the next pass must not decide on less than this one has done."""

    cluster: Cluster
    cache: Cache
    settings: Settings
    now: Callable[[], datetime]

    async def execute(self, subject: FineTuneJob, plan: Plan) -> None:
        """Raises ApiError where a request is refused; what comes after it is not done."""
        for action in plan.actions:
            logger.info("%s: %s", subject.key, _summary(action))
            await self._act(subject, action)

    async def _act(self, subject: FineTuneJob, action: Action) -> None:
        namespace = subject.key.namespace
        match action:
            case WriteStatus(patch):
                await self._write(subject, patch)
            case CreateJob(manifest):
                await self._create_or_report(subject, manifest)
            case PatchJob(name, patch):
                await self._see_unless_gone(self.cluster.patch_job(namespace, name, patch))
            case DeleteJob(name, uid):
                await self._see_unless_gone(self.cluster.delete_job(namespace, name, uid))
            case Announce(event):
                await self._announce(subject, event)

    async def _write(self, subject: FineTuneJob, patch: Json) -> None:
        """A spec from before the CRD's rules may make every status be refused: then an event is all that can be said."""
        try:
            stored = await self.cluster.patch_status(subject.key, subject.metadata["resourceVersion"], patch)
        except ApiError as error:
            if error.status == 422:
                said = Announcement(Reason.INVALID_SPEC, clean(f"The API server takes no status for this object: {error.message}", 900))
                await self._announce(subject, build_event(subject, said, self.now()))
            raise
        self.cache.see(Kind.FINETUNEJOB, stored)

    async def _announce(self, subject: FineTuneJob, event: Json) -> None:
        """An event is for people who look on: that it can't be made delays nothing."""
        try:
            await self.cluster.create_event(event)
        except FAILED as error:
            if not isinstance(error, ApiError) or error.reason != "AlreadyExists":
                logger.warning("%s: no event %s: %s", subject.key, event["reason"], error)

    async def _create_or_report(self, subject: FineTuneJob, manifest: Json) -> None:
        try:
            self.cache.see(Kind.JOB, await self._created(subject, manifest))
        except ApiError as error:
            if is_refusal(error):
                raw = await self.cluster.read_finetunejob(subject.key)
                now = read_subject(raw) if raw else None
                if isinstance(now, Subject) and now.generation == subject.generation:
                    situation = Situation(World(now), self.now(), self.settings)
                    await self.execute(now, report_a_refused_job(situation, error.message, for_good=error.status in FOR_GOOD))
            raise

    async def _created(self, subject: FineTuneJob, manifest: Json) -> Json:
        try:
            return await self.cluster.create_job(manifest)
        except ApiError as error:
            if error.reason != "AlreadyExists":
                raise
            # Another operator was faster, or the last answer was lost: the name holds UID and digest, the owner says the rest.
            found = await self.cluster.read_job(manifest["metadata"]["namespace"], manifest["metadata"]["name"])
            if found is None or not is_controlled_by(found, subject.uid):
                raise
            return found

    async def _see_unless_gone(self, request: Awaitable[Json]) -> None:
        try:
            answer = await request
        except ApiError as error:
            if error.status != 404:
                raise
        else:
            if answer.get("kind") == "Job":  # a deletion that is done at once answers with a Status
                self.cache.see(Kind.JOB, answer)


def is_refusal(error: ApiError) -> bool:
    """Whether the API server has said no. It asks webhooks before it stores anything; of other errors of its own nobody knows what was done."""
    return error.status in (*FOR_GOOD, 403) or (error.status == 500 and _WEBHOOK in error.message)


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
        case Announce(event):
            return f"event {event['reason']}"

"""observe -> decide -> execute for one key, and the workers that do it for every key on the queue.

Each step is crash-safe: what is lost between two of them is found again by the next observation.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from finetune_operator.cluster import FAILED, ApiError
from finetune_operator.decide import Situation, decide, report_a_refused_change, report_a_refused_job, report_a_refused_status
from finetune_operator.execution import ChangeRefusedError, Executor, JobRefusedError, StatusRefusedError
from finetune_operator.metrics import Metrics
from finetune_operator.observation import Observer
from finetune_operator.plan import Plan, WriteStatus
from finetune_operator.progress import trainer_of
from finetune_operator.settings import Settings
from finetune_operator.subject import FINAL, FineTuneJob, Key, Subject, Unreadable, World, is_unfinished
from finetune_operator.work_queue import WorkQueue

logger = logging.getLogger(__name__)
RECONCILE_SECONDS = 120


@dataclass(frozen=True)
class Reconciler:
    """What a reconcile needs.

    Attributes:
        has_news: whether another look at a job is wanted already.
        is_synced: whether everything was listed once; until then the API server is asked.
        doubtful: jobs whose last pass did not come to its end, so that nobody knows what it has done.
    """

    observer: Observer
    executor: Executor
    settings: Settings
    has_news: Callable[[Key], bool]
    is_synced: Callable[[], bool]
    doubtful: set[Key] = field(default_factory=set)

    async def reconcile(self, key: Key) -> float | None:
        """One pass over one FineTuneJob.

        Returns:
            Seconds until another look is wanted; None when the next event or resync will do.

        Raises:
            ApiError: a request was refused; the same pass may succeed later.
        """
        is_doubtful = key in self.doubtful or not self.is_synced()
        self.doubtful.add(key)
        try:
            seen = await self.observer.look(key, doubtful=is_doubtful)
            again_seconds = await self._act_on(seen) if seen else None
        except ApiError as error:
            if error.is_refusal:  # a clear answer leaves no doubt
                self.doubtful.discard(key)
            raise
        self.observer.poller.follow(key, trainer_of(seen) if isinstance(seen, World) else None)
        self.doubtful.discard(key)
        return again_seconds

    async def _act_on(self, seen: World | Unreadable) -> float | None:
        subject = seen.subject if isinstance(seen, World) else seen
        plan = decide(seen, self.observer.now(), self.settings)
        await self._execute(subject, plan)
        # Where another pass is wanted already, most often by the echo of the end itself, it would have to read again what is evicted here.
        if _ends(subject, plan) and not self.has_news(subject.key):
            self.observer.cache.mark_finished(subject.key)
        return plan.again_seconds

    async def _execute(self, subject: FineTuneJob, plan: Plan) -> None:
        """Executes a plan. A refusal by the API server is reported to the user, and raised."""
        try:
            await self.executor.execute(subject, plan)
        except StatusRefusedError as refusal:
            await self.executor.execute(subject, report_a_refused_status(subject, refusal.message, self.observer.now()))
            raise
        except (JobRefusedError, ChangeRefusedError) as refusal:
            unedited = await self.observer.read_unedited(subject)
            if unedited:
                situation = Situation(World(unedited), self.observer.now(), self.settings)
                report = report_a_refused_job if isinstance(refusal, JobRefusedError) else report_a_refused_change
                await self._execute(unedited, report(situation, refusal.message, needs_edit=refusal.is_invalid))
            raise


async def work(queue: WorkQueue, reconciler: Reconciler, metrics: Metrics) -> None:
    """Reconciles one key after the other until it is cancelled. A failed pass comes back after a backoff and delays no other key."""
    while True:
        key = await queue.take()
        try:
            with metrics.reconciling():
                async with asyncio.timeout(RECONCILE_SECONDS):
                    again_seconds = await reconciler.reconcile(key)
        except FAILED as error:
            _log_failure(key, error, queue.retry(key))
        except Exception:
            logger.exception("%s: a defect of the operator; trying again in %.1f s", key, queue.retry(key))
        else:
            queue.done(key, again_seconds)


def _ends(subject: Subject | Unreadable, plan: Plan) -> bool:
    """Whether nothing is left to do for the job once the plan is executed, until someone edits it."""
    if not is_unfinished(subject.raw) or (isinstance(subject, Subject) and subject.is_latched):
        return True
    return any(isinstance(action, WriteStatus) and action.patch.get("phase") in FINAL for action in plan.actions)


def _log_failure(key: Key, error: BaseException, backoff_seconds: float) -> None:
    level = logging.INFO if isinstance(error, ApiError) and error.status == 409 else logging.WARNING
    logger.log(level, "%s: %s: %s; trying again in %.1f s", key, type(error).__name__, error, backoff_seconds)

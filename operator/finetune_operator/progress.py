"""Asks the trainers' endpoints how far they are. No run depends on it, so that every failure is None. The answers of a pod are not trusted.

Asking has workers of its own, so that a pod that does not answer delays no reconcile.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import aiohttp
from finetune_api.names import PROGRESS_PORT
from finetune_api.progress import MAX_BYTES, TIMEOUT_SECONDS, ProgressReport
from pydantic import ValidationError

from finetune_operator.diagnosis import container_state
from finetune_operator.subject import Key, World
from finetune_operator.work_queue import WorkQueue

WORKERS = 32
POLLS_PER_SECOND = 25  # of all trainers; 100 took a sixth of the operator's time while 10,000 jobs were made


@dataclass(frozen=True)
class Trainer:
    """A container at work.

    Attributes:
        pod_uid: UID of its pod, which the Job controls.
        pod_ip: where it answers.
        started: Unix time of its start, in seconds.
    """

    pod_uid: str
    pod_ip: str
    started: float


class ProgressPoller:
    """Asks every trainer that it follows, and calls `news` when one reports something new.

    Args:
        news: called with the job whose report has changed.
        clock: Unix time in seconds.
    """

    def __init__(self, news: Callable[[Key], None], clock: Callable[[], float]) -> None:
        self._news = news
        self._clock = clock
        self._queue = WorkQueue(clock)
        self._trainers: dict[Key, Trainer] = {}
        self._reports: dict[Key, ProgressReport] = {}

    def follow(self, key: Key, trainer: Trainer | None) -> None:
        """Asks this trainer of a job from now on, or none."""
        before = self._trainers.get(key)
        if before == trainer:
            return
        self._reports.pop(key, None)
        self._trainers.pop(key, None)
        if trainer is not None:
            self._trainers[key] = trainer
            self._queue.add(key)

    def report(self, key: Key) -> ProgressReport | None:
        """What the job's present trainer said last."""
        return self._reports.get(key)

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Asks all trainers until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(self._keep_asking(session))

    async def _keep_asking(self, session: aiohttp.ClientSession) -> None:
        while True:
            key = await self._queue.take()
            trainer = self._trainers.get(key)
            report = await read_progress(session, trainer.pod_ip) if trainer else None
            if report and self._trainers.get(key) == trainer and self._reports.get(key) != report:
                self._reports[key] = report
                self._news(key)
            self._queue.done(key, self._pause_seconds(trainer) if trainer else None)

    def _pause_seconds(self, trainer: Trainer) -> float:
        """A trainer is asked every 2 s at first and every 10 s later, or less often where so many train that there would be too many requests."""
        by_age = min(10.0, max(2.0, (self._clock() - trainer.started) / 6))
        return max(by_age, len(self._trainers) / POLLS_PER_SECOND)


def trainer_of(world: World) -> Trainer | None:
    """The trainer that can be asked how far it is; None when none runs."""
    running = [pod for pod in world.active_pods if container_state(pod, "running") is not None]
    if world.current is None or not running or not running[-1]["status"].get("podIP"):
        return None
    started = (container_state(running[-1], "running") or {}).get("startedAt")
    seconds = datetime.fromisoformat(str(started)).timestamp() if started else 0.0
    return Trainer(str(running[-1]["metadata"]["uid"]), str(running[-1]["status"]["podIP"]), seconds)


async def read_progress(session: aiohttp.ClientSession, pod_ip: str, port: int = PROGRESS_PORT) -> ProgressReport | None:
    """The report of the trainer at this address; None when there is none within 2 s and 64 KiB, without following a redirect.

    Args:
        pod_ip: from the status of a pod that the Job controls; trainer_of chooses it.
    """
    host = f"[{pod_ip}]" if ":" in pod_ip else pod_ip
    limit = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
    try:
        async with session.get(f"http://{host}:{port}/progress", timeout=limit, allow_redirects=False) as response:
            if response.status != 200:
                return None
            body = await _read_at_most(response.content, MAX_BYTES)
    except (aiohttp.ClientError, TimeoutError, asyncio.IncompleteReadError, OSError, ValueError):
        return None
    try:
        return ProgressReport.model_validate_json(body) if body is not None else None
    except ValidationError:
        return None


async def _read_at_most(stream: aiohttp.StreamReader, limit: int) -> bytes | None:
    parts = bytearray()
    async for part in stream.iter_any():
        parts += part
        if len(parts) > limit:
            return None
    return bytes(parts)

"""The operator behind a proxy, started again whenever it ends, as a Deployment's kubelet would. Used by the fault tests."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from support.kubernetes import Cluster
from support.operator_process import OperatorProcess

_LOOK_SECONDS = 0.05
KILLED = -9
_STORY = 6000


class Deployment:
    """One replica.

    Args:
        back_off: seconds before the n-th restart, from 0.
        settings: of the operator, as OperatorProcess takes them.

    Attributes:
        exits: exit codes of the processes that ended, in order; -9 for those that were killed.
    """

    def __init__(self, kube: Cluster, log: Path, kubeconfig: Path, back_off: Callable[[int], float], **settings: str) -> None:
        self._operator = OperatorProcess(kube, log, kubeconfig=kubeconfig, **settings)
        self._back_off = back_off
        self.exits: list[int] = []

    @property
    def log(self) -> str:
        """Everything that all its processes wrote."""
        return self._operator.log

    @property
    def crashes(self) -> list[int]:
        """Exit codes of the processes that ended by themselves."""
        return [code for code in self.exits if code != KILLED]

    async def kill(self) -> None:
        """SIGKILL as soon as it runs; it comes back."""
        while self._operator.exit_code() is not None:  # noqa: ASYNC110 a process sets no event
            await asyncio.sleep(_LOOK_SECONDS)
        self._operator.kill()

    def end(self) -> None:
        """SIGTERM; it comes back."""
        os.kill(self._operator.pid, signal.SIGTERM)

    def ask(self, path: str) -> tuple[int, str]:
        """What the process that runs now answers on its health port."""
        return self._operator.ask(path)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Deployment"]:
        """Keeps it running for the block; when that fails, the end of its log is printed."""
        self._operator.start()
        keeping = asyncio.create_task(self._keep())
        try:
            yield self
            if keeping.done():
                keeping.result()
        except BaseException:
            print(self.log[-_STORY:])
            raise
        finally:
            keeping.cancel()
            await asyncio.wait({keeping})
            self._operator.kill()

    async def _keep(self) -> None:
        while True:
            if (code := self._operator.exit_code()) is not None:
                restart = len(self.exits)
                self.exits.append(code)
                await asyncio.sleep(self._back_off(restart))
                self._operator.start()
            await asyncio.sleep(_LOOK_SECONDS)


def soon(dice: random.Random) -> Callable[[int], float]:
    """Within 1.5 s: many deaths in a short time."""
    return lambda _: dice.uniform(0, 1.5)


def as_a_kubelet(restart: int) -> float:
    """At once, then after 10 s, 20 s, ..., 300 s."""
    return min(10.0 * 2 ** (restart - 1), 300.0) if restart else 0.0

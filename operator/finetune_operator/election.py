"""One operator acts at a time, and a Lease says which: the others wait, and take over within 20 s when its holder dies, at once when it ends well.

The election is the Kubernetes client's own. That two overlap for a moment (a stopped process that wakes up) does no harm: see decide.py's fences.
"""

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from finetune_operator.cluster import UNANSWERED

LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS = 15, 10, 2
STOP_SECONDS = 5
REQUEST_SECONDS = 3  # the election looks at its deadline only between attempts: two that get no answer, and their pauses, end with it

logger = logging.getLogger(__name__)


class LeadershipLostError(Exception):
    """The Lease could not be renewed in time, or another one has it: this process must stop acting."""


async def lead(
    api: client.ApiClient, namespace: str, name: str, identity: str, follow: Callable[[], None], work: Callable[[], Awaitable[None]]
) -> None:
    """Waits for the Lease, works, and gives the Lease back.

    Args:
        namespace: namespace of the Lease.
        name: name of the Lease.
        identity: name under which it is held; empty for one of this process alone.
        follow: called whenever another holder of the Lease is seen.
        work: runs as long as the operator may; it is cancelled when the Lease is lost.

    Raises:
        LeadershipLostError: the Lease was lost; the process should end and be restarted.
    """
    lock = PatientLock(name, namespace, identity or f"{socket.gethostname()}-{secrets.token_hex(4)}", api, follow)
    leading = asyncio.Event()

    async def begin() -> None:
        leading.set()

    election = asyncio.create_task(LeaderElection(Config(lock, LEASE_SECONDS, RENEW_SECONDS, RETRY_SECONDS, begin, None)).run())
    logger.info("Waiting for the Lease %s/%s as %s", namespace, name, lock.identity)
    try:
        await _during(election, lock, leading.wait())
        logger.info("Leading")
        await _during(election, lock, work())
    finally:
        if not election.done():
            election.cancel()
            await lock.release()


async def _during(election: asyncio.Task[None], lock: LeaseLock, work: Awaitable[object]) -> None:
    """Works to the end, unless the election ends before it: then the Lease is lost."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({election, working}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not working.done():
            working.cancel()
            await asyncio.wait({working}, timeout=STOP_SECONDS)
    if election.done():
        election.result()  # a defect of the election is not a lost Lease
        raise LeadershipLostError(f"The Lease {lock.namespace}/{lock.name} could not be renewed within {RENEW_SECONDS} s.")
    await working


class PatientLock(LeaseLock):  # type: ignore[misc] # the client carries no types
    """A Lease whose API server may be away for a while: a request without an answer counts as refused, and is tried again.

    Args:
        follow: called whenever another holder is seen.
    """

    def __init__(self, name: str, namespace: str, identity: str, api: client.ApiClient, follow: Callable[[], None]) -> None:
        super().__init__(name, namespace, identity, api)
        self._follow = follow

    async def get(self, name: str, namespace: str) -> tuple[bool, Any]:
        """Reads the Lease: (whether there is one, the record or the error)."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                found: tuple[bool, Any] = await super().get(name, namespace)
        except UNANSWERED as error:
            return False, ApiException(status=0, reason=_told(error))
        is_there, record = found
        if is_there and record.holder_identity not in (None, self.identity):
            self._follow()
        return found

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        """Creates the Lease and returns whether that worked. The client's own method passes a `pretty` that its own check refuses (kubernetes 37.0)."""
        lease = client.V1Lease(metadata=client.V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        return await self._obtained(self.api_instance.create_namespaced_lease(namespace, lease))

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        """Renews the Lease or takes it over, and returns whether that worked."""
        self.lease_reference.spec = self.update_lease(updated_record, self.lease_reference.spec)
        return await self._obtained(self.api_instance.replace_namespaced_lease(name, namespace, self.lease_reference))

    async def release(self) -> None:
        """Gives the Lease back, so that nobody has to wait for its end. A failure is only logged."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                lease = await self.api_instance.read_namespaced_lease(self.name, self.namespace)
                if lease.spec.holder_identity == self.identity:
                    lease.spec.holder_identity = None
                    await self.api_instance.replace_namespaced_lease(self.name, self.namespace, lease)
        except (ApiException, *UNANSWERED) as error:
            logger.warning("The Lease was not given back: %s", _told(error))

    async def _obtained(self, request: Awaitable[Any]) -> bool:
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                await request
        except (ApiException, *UNANSWERED) as error:
            logger.warning("The Lease can't be written: %s", _told(error))
            return False
        return True


def _told(error: Exception) -> str:
    """The error in one line; one of a time limit has no words of its own."""
    words, _, _ = str(error).partition("\n")
    return f"{type(error).__name__}: {words}"

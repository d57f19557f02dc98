"""election.py: who is seen to hold the Lease. What a real API server makes of it is in tests/cluster/test_replicas.py."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest
from finetune_operator import election
from finetune_operator.election import PatientLock
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord


class Leases:
    """Answers every read with one Lease, or with an error."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def read_namespaced_lease(self, name: str, namespace: str) -> client.V1Lease:
        if isinstance(self._answer, Exception):
            raise self._answer
        return client.V1Lease(spec=client.V1LeaseSpec(holder_identity=self._answer))


async def others_seen(answer: Any) -> int:
    """How often a read of the Lease shows another holder to the operator named `me`."""
    seen: list[None] = []
    lock = PatientLock("lease", "system", "me", client.ApiClient(), lambda: seen.append(None))
    lock.api_instance = Leases(answer)
    await lock.get("lease", "system")
    return len(seen)


async def test_another_holder_is_seen() -> None:
    assert await others_seen("other") == 1


@pytest.mark.parametrize("holder", ["me", None])
async def test_a_lease_of_ones_own_or_of_nobody_shows_no_other_holder(holder: str | None) -> None:
    assert await others_seen(holder) == 0


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientConnectionError("no route"),
        TimeoutError(),
        ApiException(status=403, reason="Forbidden"),
        ApiException(status=404, reason=json.dumps({"code": 404})),
    ],
)
async def test_a_lease_that_can_not_be_read_shows_no_other_holder(error: Exception) -> None:
    assert await others_seen(error) == 0


class Silent:
    """Takes every request and answers none."""

    async def read_namespaced_lease(self, *_: Any) -> client.V1Lease:
        return await asyncio.Future()

    create_namespaced_lease = replace_namespaced_lease = read_namespaced_lease


RECORD = LeaderElectionRecord("me", "15", "2026-01-01 12:00:00.0", "2026-01-01 12:00:00.0")


@pytest.mark.parametrize(
    "ask",
    [
        lambda lock: lock.get("lease", "system"),
        lambda lock: lock.create("lease", "system", RECORD),
        lambda lock: lock.update("lease", "system", RECORD),
        lambda lock: lock.release(),
    ],
    ids=["get", "create", "update", "release"],
)
async def test_a_request_without_an_answer_comes_to_its_end(
    ask: Callable[[PatientLock], Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(election, "REQUEST_SECONDS", 0.01)
    lock = PatientLock("lease", "system", "me", client.ApiClient(), lambda: None)
    lock.api_instance, lock.lease_reference = Silent(), client.V1Lease()
    async with asyncio.timeout(5):
        answer = await ask(lock)
    assert not (answer[0] if isinstance(answer, tuple) else answer)


def test_a_leader_without_answers_stops_before_its_lease_is_taken() -> None:
    attempt_seconds = election.REQUEST_SECONDS + election.RETRY_SECONDS
    attempts = -(-election.RENEW_SECONDS // attempt_seconds)
    assert attempts >= 2
    assert election.RETRY_SECONDS + attempts * attempt_seconds < election.LEASE_SECONDS

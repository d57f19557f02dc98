"""election.py: who is seen to hold the Lease. What a real API server makes of it is in tests/cluster/test_replicas.py."""

import json
from typing import Any

import aiohttp
import pytest
from finetune_operator.election import PatientLock
from kubernetes.aio import client
from kubernetes.aio.client.exceptions import ApiException


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

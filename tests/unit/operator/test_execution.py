"""A pass where the API server refuses what was planned; tests/cluster has the rest, on a real one."""

from typing import Any, cast

import pytest
from finetune_operator.cache import Cache, Kind
from finetune_operator.cluster import ApiError, Cluster
from finetune_operator.main import build_reconciler
from finetune_operator.progress import ProgressPoller
from finetune_operator.settings import Settings
from finetune_operator.subject import Json, Key
from support.simulated_cluster import NOW
from support.specs import job, minimal_spec


class Refusing:
    """An API server that takes events, and of no object a status: no spec that was tried brings a real one to that, since rules stand at their fields.

    Attributes:
        said: the messages of the events.
    """

    def __init__(self, status: int) -> None:
        self._status = status
        self.said: list[str] = []

    async def patch_status(self, _key: Key, _version: str, _patch: Json) -> Json:
        raise ApiError(self._status, "Invalid", "spec.model: must be an object")

    async def create_event(self, event: Json) -> None:
        self.said.append(event["message"])


@pytest.mark.parametrize(
    ("status", "said"), [(422, ["The API server takes no status for this object: spec.model: must be an object"]), (409, [])]
)
async def test_an_event_says_what_no_status_can(status: int, said: list[str]) -> None:
    refusing = Refusing(status)
    raw: dict[str, Any] = job(minimal_spec(), "odd")
    raw["metadata"] |= {"namespace": "ml", "uid": "1", "generation": 1, "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    cache, poller = Cache(), ProgressPoller(lambda _: None, lambda: 0.0)
    cache.update(Kind.FINETUNEJOB, raw)
    reconciler = build_reconciler(cast("Cluster", refusing), cache, poller, Settings(), lambda _: False, now=lambda: NOW)
    with pytest.raises(ApiError, match="must be an object"):
        await reconciler.reconcile(Key("ml", "odd"))
    assert refusing.said == said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ApiError(403, "Forbidden", "exceeded quota"), True),
        (ApiError(422, "Invalid", "spec"), True),
        (ApiError(500, "InternalError", 'Internal error occurred: failed calling webhook "policy.example.com": timeout'), True),
        (ApiError(500, "InternalError", "etcdserver: request timed out"), False),
        (ApiError(503, "ServiceUnavailable", "not yet"), False),
        (ApiError(409, "Conflict", "the object has been modified"), False),
    ],
)
def test_an_answer_that_leaves_open_what_was_done_is_no_refusal(error: ApiError, expected: bool) -> None:
    assert error.is_refusal == expected

"""The start of main.py: an API server that is not ready yet is waited for, whatever it says."""

from collections.abc import AsyncIterator
from typing import cast

import aiohttp
import pytest
from finetune_operator import main
from finetune_operator.cache import Kind
from finetune_operator.cluster import ApiError, Cluster, Listing
from finetune_operator.settings import Settings


class Unready:
    """Refuses as often as there are errors, then lists."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors

    async def list_pages(self, _kind: Kind, _namespace: str) -> AsyncIterator[Listing]:
        if self.errors:
            raise self.errors.pop(0)
        yield Listing([], 1)


async def test_an_api_server_that_is_not_ready_ends_no_operator(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(main, "CRD_SECONDS", 0)
    cluster = Unready(
        [ApiError(404, "NotFound", "no CRD"), ApiError(503, "ServiceUnavailable", "not yet"), aiohttp.ClientError(), TimeoutError()]
    )
    await main._crd_is_there(cast("Cluster", cluster), Settings(trainer_image="trainer"))
    assert cluster.errors == []
    said = [record.message for record in caplog.records]
    assert said[0] == "The CRD of FineTuneJobs is not installed; looking again in 0 s"
    assert said[1] == "FineTuneJobs can't be listed: ApiError: 503 ServiceUnavailable: not yet; looking again in 0 s"
    assert len(said) == 4

"""The only file that talks to the Kubernetes API: reads and writes JSON values, with a time limit on every request.

The API server refuses what it asks for beyond permissions.py.
"""

import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
from finetune_api.names import LABEL_JOB
from finetune_api.spec import GROUP, PLURAL, VERSION
from kubernetes.aio import client, config

from finetune_operator.cache import Kind
from finetune_operator.subject import Json, Key

REQUEST_SECONDS = 15.0
PAGE = 250  # objects of a listing that are in memory at a time
_MERGE = "application/merge-patch+json"
_JOBS = "/apis/batch/v1/namespaces/{}/jobs"
_ROOTS = {Kind.FINETUNEJOB: f"/apis/{GROUP}/{VERSION}", Kind.JOB: "/apis/batch/v1", Kind.POD: "/api/v1"}
_PLURALS = {Kind.FINETUNEJOB: PLURAL, Kind.JOB: "jobs", Kind.POD: "pods"}
_SELECTORS = {Kind.FINETUNEJOB: "", Kind.JOB: LABEL_JOB, Kind.POD: LABEL_JOB}
_INVALID = (400, 422)
_WEBHOOK = "failed calling webhook"


class ApiError(Exception):
    """The API server refused a request. `status` is the HTTP status, `reason` Kubernetes' word for it."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def is_invalid(self) -> bool:
        """Whether the request itself is wrong, so that only an edit helps."""
        return self.status in _INVALID

    @property
    def is_refusal(self) -> bool:
        """Whether it is certain that nothing was stored.

        The API server asks webhooks before it stores anything; after any other error of its own nobody knows what was done.
        """
        return self.is_invalid or self.status == 403 or (self.status == 500 and _WEBHOOK in self.message)


UNANSWERED = (aiohttp.ClientError, TimeoutError, OSError)
"""What a request raises that got no answer."""
FAILED = (ApiError, *UNANSWERED)
"""What a request raises that failed."""


@dataclass(frozen=True)
class Listing:
    """A page of a listing, and the resourceVersion of the whole."""

    items: list[Json]
    version: int


class Cluster:
    """A connection to one API server.

    Args:
        api: the client's connection.
        count_request: called with the HTTP method and status of every request that has ended; "none" is the status of one that got no answer.
    """

    def __init__(self, api: client.ApiClient, count_request: Callable[[str, str], None]) -> None:
        self._api = api
        self._count_request = count_request

    @classmethod
    async def connect(cls, count_request: Callable[[str, str], None]) -> "Cluster":
        """Connects with the pod's service account in a cluster, else with the kubeconfig of KUBECONFIG or the user's home."""
        configuration = client.Configuration()
        # kopf's watches take no proxy from the environment either, and asking for one costs a thread at each request.
        configuration.client_session_kwargs = {"trust_env": False}
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            config.load_incluster_config(configuration)
        else:
            await config.load_kube_config(client_configuration=configuration)
        return cls(client.ApiClient(configuration), count_request)

    @property
    def api(self) -> client.ApiClient:
        """The connection, for the election."""
        return self._api

    async def close(self) -> None:
        """Ends all connections."""
        await self._api.close()

    async def list_pages(self, kind: Kind, namespace: str, selector: str = "") -> AsyncIterator[Listing]:
        """Lists all objects of a kind in a namespace, or in all for an empty one, page by page. Jobs and pods without our label are left out."""
        scope = f"/namespaces/{quote(namespace)}" if namespace else ""
        query = {"labelSelector": selector or _SELECTORS[kind]}
        async for page in self._pages(f"{_ROOTS[kind]}{scope}/{_PLURALS[kind]}", query):
            yield Listing(page["items"], int(page["metadata"]["resourceVersion"]))

    async def read_finetunejob(self, key: Key) -> Json | None:
        """Reads a FineTuneJob; None when there is none."""
        return await self._read(self._finetunejob(key))

    async def patch_status(self, key: Key, resource_version: str, patch: Json) -> Json:
        """Merge-patches the status and returns the object. The answer is 409 when the object has changed since the patch was computed."""
        body = {"metadata": {"resourceVersion": resource_version}, "status": patch}
        return await self._request("PATCH", f"{self._finetunejob(key)}/status", body=body, content_type=_MERGE)

    async def read_job(self, namespace: str, name: str) -> Json | None:
        """Reads a Job; None when there is none."""
        return await self._read(self._job(namespace, name))

    async def create_job(self, manifest: Json) -> Json:
        """Creates a Job and returns it. The answer is 409 when there is one of its name."""
        return await self._request("POST", _JOBS.format(quote(manifest["metadata"]["namespace"])), body=manifest)

    async def patch_job(self, namespace: str, name: str, patch: Json) -> Json:
        """Merge-patches a Job and returns it."""
        return await self._request("PATCH", self._job(namespace, name), body=patch, content_type=_MERGE)

    async def delete_job(self, namespace: str, name: str, uid: str) -> Json:
        """Deletes this very Job in the foreground, and returns it as it stands: it is gone after its pods are."""
        body = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        return await self._request("DELETE", self._job(namespace, name), body=body)

    async def list_warnings(self, namespace: str) -> AsyncIterator[list[Json]]:
        """Lists the warning events of a namespace, page by page."""
        async for page in self._pages(f"/api/v1/namespaces/{quote(namespace)}/events", {"fieldSelector": "type=Warning"}):
            yield page["items"]

    async def create_event(self, event: Json) -> None:
        """Creates an event. The answer is 409 when there is one of its name."""
        await self._request("POST", f"/api/v1/namespaces/{quote(event['metadata']['namespace'])}/events", body=event)

    def _finetunejob(self, key: Key) -> str:
        return f"/apis/{GROUP}/{VERSION}/namespaces/{quote(key.namespace)}/{PLURAL}/{quote(key.name)}"

    def _job(self, namespace: str, name: str) -> str:
        return f"{_JOBS.format(quote(namespace))}/{quote(name)}"

    async def _pages(self, path: str, query: dict[str, str]) -> AsyncIterator[Json]:
        token = ""
        while True:
            page = await self._request("GET", path, {**query, "limit": PAGE, "continue": token})
            yield page
            token = page["metadata"].get("continue") or ""
            if not token:
                return

    async def _read(self, path: str) -> Json | None:
        try:
            return await self._request("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _request(
        self,
        method: str,
        path: str,
        query: dict[str, Any] | None = None,
        *,
        body: Json | None = None,
        content_type: str = "application/json",
    ) -> Json:
        pairs = [(name, value) for name, value in (query or {}).items() if value not in ("", None)]
        headers = {"Accept": "application/json", "Content-Type": content_type}
        prepared = await self._api.param_serialize(
            method, path, query_params=pairs, header_params=headers, body=body, auth_settings=["BearerToken"]
        )
        code = "none"
        try:
            response = await self._api.call_api(*prepared, _request_timeout=REQUEST_SECONDS)
            data = await response.read()
            code = str(response.status)
        finally:
            self._count_request(method, code)
        if response.status >= 300:
            raise _error(response.status, data)
        return dict(json.loads(data))


def _error(status: int, data: bytes) -> ApiError:
    try:
        body = json.loads(data)
        return ApiError(status, str(body.get("reason", "")), str(body.get("message", ""))[:500])
    except (ValueError, AttributeError):
        return ApiError(status, "", "the answer is not a Kubernetes status")

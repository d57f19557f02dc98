"""The only file that talks to the API server: the few reads and writes that a reconcile needs, as JSON values.

Raises ApiError for what is worth a retry. A conflict, an object that is gone, and a Job that exists already are answers, not errors.
"""

import json
from typing import Any
from urllib.parse import quote, urlencode

from finetune_api import names
from finetune_api.spec import GROUP, PLURAL, VERSION
from kubernetes.aio import client, config

Manifest = dict[str, Any]

_TIMEOUT_SECONDS = 20
_MERGE_PATCH = "application/merge-patch+json"
_NOT_FOUND, _CONFLICT = 404, 409


class ApiError(Exception):
    """The API server refused or did not answer; the same request may pass later."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Cluster:
    """One connection pool to the API server."""

    def __init__(self, api: client.ApiClient) -> None:
        self._api = api

    @classmethod
    async def connect(cls) -> "Cluster":
        """With the pod's service account, or the kubeconfig of a developer."""
        try:
            config.load_incluster_config()
        except config.ConfigException:
            await config.load_kube_config()
        return cls(client.ApiClient())

    async def close(self) -> None:
        """Closes the connections."""
        await self._api.close()

    async def read_finetunejob(self, namespace: str, name: str) -> Manifest | None:
        """A FineTuneJob; None when it is gone."""
        return await self._get(f"{_finetunejobs(namespace)}/{quote(name)}")

    async def list_finetunejobs(self, namespace: str | None) -> list[Manifest]:
        """The FineTuneJobs of a namespace, or of all."""
        return await self._list(_finetunejobs(namespace))

    async def patch_status(self, job: Manifest, status: Manifest) -> bool:
        """Replaces the status with a merge patch that carries the resourceVersion it was computed from.

        Returns:
            Whether it was stored; False when the object has changed or is gone since.
        """
        before = job.get("status") or {}
        removed = {key: None for key in before if key not in status}
        metadata = job["metadata"]
        body = {"metadata": {"resourceVersion": metadata["resourceVersion"]}, "status": removed | _with_nulls(before, status)}
        path = f"{_finetunejobs(metadata['namespace'])}/{quote(metadata['name'])}/status"
        return await self._try("PATCH", path, body, _MERGE_PATCH)

    async def read_job(self, namespace: str, name: str) -> Manifest | None:
        """A batch/v1 Job; None when there is none."""
        return await self._get(f"{_jobs(namespace)}/{quote(name)}")

    async def list_jobs(self, namespace: str, label: str) -> list[Manifest]:
        """The Jobs that carry a FineTuneJob's label."""
        return await self._list(_jobs(namespace), f"{names.LABEL_JOB}={label}")

    async def list_pods(self, namespace: str, label: str) -> list[Manifest]:
        """The pods that carry a FineTuneJob's label."""
        return await self._list(f"/api/v1/namespaces/{quote(namespace)}/pods", f"{names.LABEL_JOB}={label}")

    async def create_job(self, manifest: Manifest) -> None:
        """Makes a Job; one of that name that exists already is left for the next look at the world."""
        await self._try("POST", _jobs(manifest["metadata"]["namespace"]), manifest)

    async def patch_job(self, namespace: str, name: str, patch: Manifest) -> None:
        """Merge-patches a Job; one that is gone is left for the next look at the world."""
        await self._try("PATCH", f"{_jobs(namespace)}/{quote(name)}", patch, _MERGE_PATCH)

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        """Deletes exactly this Job in the foreground: its pods go first."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": uid}}
        await self._try("DELETE", f"{_jobs(namespace)}/{quote(name)}", options)

    async def _get(self, path: str) -> Manifest | None:
        try:
            return await self._request("GET", path)
        except ApiError as error:
            if error.status == _NOT_FOUND:
                return None
            raise

    async def _list(self, path: str, selector: str = "") -> list[Manifest]:
        query = f"?{urlencode({'labelSelector': selector})}" if selector else ""
        return list((await self._request("GET", f"{path}{query}")).get("items") or [])

    async def _try(self, method: str, path: str, body: Manifest, content_type: str = "application/json") -> bool:
        try:
            await self._request(method, path, body, content_type)
        except ApiError as error:
            if error.status in (_NOT_FOUND, _CONFLICT):
                return False
            raise
        return True

    async def _request(self, method: str, path: str, body: Manifest | None = None, content_type: str = "application/json") -> Manifest:
        headers = {"Accept": "application/json", "Content-Type": content_type}
        serialized = await self._api.param_serialize(method, path, header_params=headers, body=body, auth_settings=["BearerToken"])
        response = await self._api.call_api(*serialized, _request_timeout=_TIMEOUT_SECONDS)
        text = (await response.read() or b"").decode()
        if response.status >= 400:
            raise ApiError(response.status, _message(text))
        return dict(json.loads(text))


def _finetunejobs(namespace: str | None) -> str:
    middle = f"/namespaces/{quote(namespace)}" if namespace else ""
    return f"/apis/{GROUP}/{VERSION}{middle}/{PLURAL}"


def _jobs(namespace: str) -> str:
    return f"/apis/batch/v1/namespaces/{quote(namespace)}/jobs"


def _with_nulls(before: Manifest, after: Manifest) -> Manifest:
    """A merge patch from one object to the other: keys that are gone become null."""
    patch: Manifest = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            patch[key] = {name: None for name in old if name not in value} | _with_nulls(old, value)
        else:
            patch[key] = value
    return patch


def _message(text: str) -> str:
    """The message of an API server's Status; never a whole body, which may hold other people's data."""
    try:
        document = json.loads(text)
    except ValueError:
        return "no readable answer"
    return (
        str(document.get("message", ""))[:256] if isinstance(document, dict) and document.get("kind") == "Status" else "no readable answer"
    )

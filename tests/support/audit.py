"""What a service account asked of the API server, read from the audit log that tests/cluster/up.sh has the server write."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from support.kubernetes import Cluster

Use = tuple[str, str, str]  # API group, resource with its subresource, verb


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        group, resource, namespace: what it was about; resource is empty for paths such as /api, namespace for whole clusters.
        code: the HTTP status of the answer.
        allowed: whether RBAC allowed it; a quota or an admission policy may have refused it all the same.
    """

    verb: str
    group: str
    resource: str
    namespace: str
    path: str
    code: int
    allowed: bool

    @property
    def use(self) -> Use:
        """As a row of permissions.py names it."""
        return self.group, self.resource, self.verb


def requests_of(kube: Cluster, namespace: str, service_account: str) -> list[Request]:
    """Everything that the account asked for since the cluster started; a watch is there from its beginning."""
    user = f"system:serviceaccount:{namespace}:{service_account}"
    text = (kube.folder / "log" / "audit.log").read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]  # the server may be writing the last one
    return [_request(event) for line in lines if user in line and (event := json.loads(line))["user"]["username"] == user]


def uses_of(requests: Iterable[Request]) -> set[Use]:
    """Verb by resource; paths without a resource (API discovery) are left out."""
    return {request.use for request in requests if request.resource}


def _request(event: dict[str, Any]) -> Request:
    about = event.get("objectRef", {})
    parts = (about.get("resource", ""), about.get("subresource", ""))
    return Request(
        verb=event["verb"],
        group=about.get("apiGroup", ""),
        resource="/".join(part for part in parts if part),
        namespace=about.get("namespace", ""),
        path=event["requestURI"],
        code=int(event.get("responseStatus", {}).get("code", 0)),
        allowed=event.get("annotations", {}).get("authorization.k8s.io/decision") == "allow",
    )

"""Everything that the operator may ask of the API server, and why: the one table of its permissions. Pure data, and pages made of it.

`python -m finetune_operator.permissions` (in `make crd`) writes the chart's rules and the table in docs/security.md. tests/cluster/test_permissions.py
compares it with what an installed operator does, both ways. Never here: secrets, a wildcard, a write to a spec.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from finetune_api.spec import GROUP, PLURAL


@dataclass(frozen=True)
class Permission:
    """One verb on one resource.

    Attributes:
        group: API group; empty for the core.
        resource: plural, with the subresource where it is one.
        why: what would not work without it.
        name: the one object that it is about; empty for all. A create can't be confined so: its object has no name yet.
    """

    group: str
    resource: str
    verb: str
    why: str
    name: str = ""


# In the ClusterRole, or in a Role of each listed namespace.
JOBS: tuple[Permission, ...] = (
    Permission(GROUP, PLURAL, "get", "reads a FineTuneJob before it decides about it"),
    Permission(GROUP, PLURAL, "list", "starts a watch, and looks at every unfinished job again at each resync"),
    Permission(GROUP, PLURAL, "watch", "sees new and edited FineTuneJobs"),
    Permission(GROUP, f"{PLURAL}/status", "patch", "writes the status; the spec is never written"),
    Permission("batch", "jobs", "get", "finds out whether a Job of the run's name exists, and whose it is"),
    Permission("batch", "jobs", "list", "starts a watch, and reads the Jobs of a FineTuneJob"),
    Permission("batch", "jobs", "watch", "sees Jobs end"),
    Permission("batch", "jobs", "create", "starts a run"),
    Permission("batch", "jobs", "patch", "suspend, backoffLimit and deadline while it runs, its TTL after the result is stored"),
    Permission("batch", "jobs", "delete", "stops the run of an earlier spec"),
    Permission("", "pods", "list", "starts a watch, and reads how a run's pods ended or why they wait"),
    Permission("", "pods", "watch", "sees pods start, wait and end"),
    Permission("", "events", "list", "says why a pod is not there: quotas and failed mounts appear nowhere else"),
    Permission("", "events", "create", "tells the story of a run in `kubectl describe`"),
)

# In a Role of the operator's own namespace, which may be one with Leases of others, such as kube-system.
LEASE_NAME = "{{ .Release.Name }}"  # Helm puts it in
LEASE: tuple[Permission, ...] = (
    Permission("coordination.k8s.io", "leases", "get", "sees which operator acts", LEASE_NAME),
    Permission("coordination.k8s.io", "leases", "create", "makes the Lease when there is none"),
    Permission("coordination.k8s.io", "leases", "update", "takes the Lease, renews it and gives it back", LEASE_NAME),
)

_HEAD = "# Generated from operator/finetune_operator/permissions.py by `make crd`; do not edit.\n"
_ROOT = Path(__file__).parents[2]
RULE_FILES = {
    _ROOT / "charts/finetune-operator/files/operator-rules.yaml": JOBS,
    _ROOT / "charts/finetune-operator/files/lease-rules.yaml": LEASE,
}
DOCS_FILE = _ROOT / "docs/security.md"
_BEGIN, _END = "<!-- Generated from operator/finetune_operator/permissions.py by `make crd`; do not edit. -->\n", "<!-- End of it. -->\n"


def build_rules(permissions: tuple[Permission, ...]) -> list[dict[str, Any]]:
    """The RBAC rules: one for each resource, and for each object that is named, in the table's order."""
    targets = dict.fromkeys((item.group, item.resource, item.name) for item in permissions)
    return [
        {
            "apiGroups": [group],
            "resources": [resource],
            **({"resourceNames": [name]} if name else {}),
            "verbs": [item.verb for item in permissions if (item.group, item.resource, item.name) == (group, resource, name)],
        }
        for group, resource, name in targets
    ]


def rules_yaml(permissions: tuple[Permission, ...]) -> str:
    """The content of one of the chart's files."""
    return _HEAD + yaml.safe_dump(build_rules(permissions), sort_keys=False, default_flow_style=None)


def with_table(page: str) -> str:
    """The page with the table between its two marks; ValueError where one of them is missing."""
    before, rest = page.split(_BEGIN)
    _, after = rest.split(_END)
    return f"{before}{_BEGIN}{''.join(_rows())}{_END}{after}"


def _rows() -> Iterator[str]:
    yield "\n| where | resource | verb | what for |\n|---|---|---|---|\n"
    for where, permissions in (("watched namespaces", JOBS), ("its own namespace", LEASE)):
        for item in permissions:
            plural, slash, subresource = item.resource.partition("/")
            resource = f"{plural}.{item.group}".rstrip(".") + slash + subresource
            named = ", the one of the release's name" if item.name else ""
            yield f"| {where} | `{resource}`{named} | {item.verb} | {item.why} |\n"
    yield "\n"


if __name__ == "__main__":
    for path, table in RULE_FILES.items():
        path.write_text(rules_yaml(table), encoding="utf-8")
    DOCS_FILE.write_text(with_table(DOCS_FILE.read_text(encoding="utf-8")), encoding="utf-8")

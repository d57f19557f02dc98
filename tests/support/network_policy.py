"""What a NetworkPolicy lets through, by the rules of networking.k8s.io/v1: for a network plugin that enforces none, as the test cluster's.

Covers what the chart's policy and that of docs/security.md use: pod and namespace selectors, ipBlock, numbered and named ports.
"""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any

Labels = dict[str, str]
Json = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """The other end of a connection: a pod with its labels and its namespace's, or an address outside of all pods."""

    address: str
    pod: Labels | None = None
    namespace: Labels = field(default_factory=dict)


def selects(selector: Json, labels: Labels) -> bool:
    """Whether a label selector matches; an empty one matches everything."""
    expressions = selector.get("matchExpressions", [])
    equal = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return equal and all(_holds(expression, labels) for expression in expressions)


def lets_out(policy: Json, peer: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a selected pod may open a connection to a peer's port."""
    assert "Egress" in policy["spec"]["policyTypes"]
    return any(_is_to(rule.get("to"), peer) and _has_port(rule, {port}, protocol) for rule in policy["spec"].get("egress", []))


def lets_in(policy: Json, peer: Peer, container: Json, port: int, protocol: str = "TCP") -> bool:
    """Whether a peer may open a connection to this port of a selected pod's container."""
    assert "Ingress" in policy["spec"]["policyTypes"]
    called: set[int | str] = {port, *(item["name"] for item in container["ports"] if item["containerPort"] == port)}
    return any(_is_to(rule.get("from"), peer) and _has_port(rule, called, protocol) for rule in policy["spec"].get("ingress", []))


def _holds(expression: Json, labels: Labels) -> bool:
    key, operator = expression["key"], expression["operator"]
    if operator == "Exists":
        return key in labels
    assert operator == "In", operator
    return labels.get(key) in expression["values"]


def _is_to(peers: list[Json] | None, peer: Peer) -> bool:
    return not peers or any(_is_one(item, peer) for item in peers)


def _is_one(item: Json, peer: Peer) -> bool:
    if "ipBlock" in item:
        address, block = ip_address(peer.address), item["ipBlock"]
        return address in ip_network(block["cidr"]) and not any(address in ip_network(part) for part in block.get("except", ()))
    # A peer without a namespaceSelector means the policy's own namespace, which the chart never means.
    return peer.pod is not None and selects(item["podSelector"], peer.pod) and selects(item["namespaceSelector"], peer.namespace)


def _has_port(rule: Json, called: set[int] | set[int | str], protocol: str) -> bool:
    ports = rule.get("ports")
    return not ports or any(item.get("protocol", "TCP") == protocol and item["port"] in called for item in ports)

"""The nodes of the cluster: who is there, whose pods have which addresses, and who claims what another has. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from agent.state import Address, Network


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A node as the cluster knows it."""

    name: str
    addresses: tuple[Address, ...] = ()
    """Its own, at which other nodes reach it (Kubernetes: the InternalIPs), in their order."""
    pod_cidrs: tuple[Network, ...] = ()
    created: str = ""
    """When it came to be (RFC 3339, UTC). Of two nodes that claim the same addresses, the older one has them."""


@dataclass(frozen=True)
class Cluster:
    """The cluster as one of its nodes sees it."""

    own: ClusterNode | None = None
    """The node itself; None as long as nobody has told of it."""
    peers: tuple[ClusterNode, ...] = ()
    """The others, without the pod CIDRs that they were refused."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Which nodes lost pod CIDRs, and why, by name; the node itself may be among them."""
    live: bool = False
    """Whether a source has reported since the agent started. If not, this is what an earlier agent knew, or nothing:
    no reason to take anything away."""


def settle(nodes: Iterable[ClusterNode], own_name: str, *, live: bool) -> Cluster:
    """Return the cluster of these nodes, as the one called `own_name` sees it.

    Every node comes to the same verdict about overlapping pod CIDRs: the older node keeps its own, by name if both are
    of the same age; the other one is refused that prefix.
    """
    own, peers, refused = None, [], {}
    claims = _Claims()
    for node in sorted(nodes, key=lambda each: (each.created, each.name)):
        kept, reasons = [], []
        for cidr in node.pod_cidrs:
            holder = claims.claim(cidr, node.name)
            if holder is None:
                kept.append(cidr)
            else:
                reasons.append(f"pod CIDR {cidr} overlaps with {holder[0]} of node {holder[1]}, which is older")
        if reasons:
            refused[node.name] = "; ".join(reasons)
        settled = node if len(kept) == len(node.pod_cidrs) else replace(node, pod_cidrs=tuple(kept))
        if node.name == own_name:
            own = settled
        else:
            peers.append(settled)
    return Cluster(own, tuple(peers), refused, live)


class _Claims:
    """Disjoint prefixes and who has them. Bisection: with thousands of nodes, comparing all pairs takes seconds."""

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {4: [], 6: []}
        self._held: dict[int, list[tuple[Network, str]]] = {4: [], 6: []}

    def claim(self, cidr: Network, name: str) -> tuple[Network, str] | None:
        """Take the prefix; return None, or the prefix that is in the way with its holder."""
        starts, held = self._starts[cidr.version], self._held[cidr.version]
        first = int(cidr.network_address)
        place = bisect_right(starts, first)
        if place and first <= _last(held[place - 1][0]):
            return held[place - 1]
        if place < len(held) and starts[place] <= _last(cidr):
            return held[place]
        starts.insert(place, first)
        held.insert(place, (cidr, name))
        return None


def _last(cidr: Network) -> int:
    """Return the last address as a number; the library's own answers would stay in memory with each prefix."""
    return int(cidr.network_address) | (1 << (cidr.max_prefixlen - cidr.prefixlen)) - 1

"""The nodes of the cluster: who is there, whose pods have which addresses, and who claims what another has. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_network

from agent.ranges import is_within
from agent.state import Address, Network

NOBODYS: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32"),
            *("::/127", "::ffff:0.0.0.0/96", "fe80::/10", "ff00::/8"),
        ),
    )
)
"""What is neither a pod's nor a node's (RFC 6890). The v4-mapped would pass for IPv4, which in maps has that form."""

_MOST_ADDRESSES = 8
"""So many of a node count: machines with several interfaces have a few; each takes room in every node's maps."""


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
    """The others, without the pod CIDRs and addresses that they were refused."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Which nodes lost pod CIDRs or addresses, and why, by name; the node itself may be among them."""
    live: bool = False
    """Whether a source has reported since the agent started. If not, this is what an earlier agent knew, or nothing:
    no reason to take anything away."""
    outlying: Mapping[str, str] = field(default_factory=dict)
    """Which of the others lost pod CIDRs that are not within the cluster's, and why, by name: some might not tell."""


def settle(
    nodes: Iterable[ClusterNode], own_name: str, cluster_cidrs: Sequence[Network] = (), *, live: bool
) -> Cluster:
    """Return the cluster of these nodes, as the one called `own_name` sees it.

    Every node comes to the same verdict about overlapping pod CIDRs: the older node keeps its own, by name if both are
    of the same age; the other one is refused that prefix. A node is refused an address, too, that is another one's
    pods', whoever is older: a node says itself which addresses it has, but not which pod CIDRs; and all but the first
    few, which makes no difference to the own node. Only where several older nodes live in a pod CIDR, that is what is
    wrong. A pod CIDR that is not within one of the `cluster_cidrs`, if there are any, is nobody's, and in nobody's way.
    """
    own, peers, refused, claims = None, [], {}, _Claims()
    by_age = sorted(nodes, key=lambda each: (each.created, each.name))
    outlying = _outlying(by_age, cluster_cidrs)
    claimed = [_claim(claims, node, outlying) for node in by_age]
    if inhabited := _inhabited(claims, by_age):
        claims = _Claims()
        claimed = [_claim(claims, node, outlying | inhabited) for node in by_age]
    for node, (kept, reasons) in zip(by_age, claimed, strict=True):
        first = node.addresses[:_MOST_ADDRESSES]
        if len(first) < len(node.addresses) and node.name != own_name:
            reasons.append(f"of its {len(node.addresses)} addresses, the first {len(first)} count")
        misplaced = _misplaced(claims, node.name, first)
        settled = node
        if reasons or misplaced:
            refused[node.name] = "; ".join((*reasons, *misplaced.values()))
            addresses = tuple(each for each in first if each not in misplaced)
            settled = replace(node, addresses=addresses, pod_cidrs=kept)
        if node.name == own_name:
            own = settled
        else:
            peers.append(settled)
    return Cluster(own, tuple(peers), refused, live, _claimants(outlying, by_age, own_name))


def _claim(claims: _Claims, node: ClusterNode, barred: Mapping[Network, str]) -> tuple[tuple[Network, ...], list[str]]:
    """Claim the node's pod CIDRs, but for those `barred`; return those that it gets, and why not the others."""
    kept, reasons = [], []
    for cidr in node.pod_cidrs:
        if cidr in barred:
            reasons.append(barred[cidr])
            continue
        holder = claims.claim(cidr, node.name)
        if holder is None:
            kept.append(cidr)
        else:
            whose = f" of node {holder[1]}, which is older" if holder[1] else ", which is no node's"
            reasons.append(f"pod CIDR {cidr} overlaps with {holder[0]}{whose}")
    return tuple(kept), reasons


def _outlying(nodes: Iterable[ClusterNode], cluster_cidrs: Sequence[Network]) -> dict[Network, str]:
    """Return the pod CIDRs that are not within one of the cluster's, if these are known, with what to do about it."""
    if not cluster_cidrs:
        return {}
    known = ", ".join(map(str, cluster_cidrs))
    advice = "extend these if it is the cluster's, else give the node another one"
    return {
        cidr: f"pod CIDR {cidr} is not within cluster_cidrs ({known}): {advice}"
        for node in nodes
        for cidr in node.pod_cidrs
        if not is_within(cidr, cluster_cidrs)
    }


def _claimants(outlying: Mapping[Network, str], nodes: Iterable[ClusterNode], own_name: str) -> dict[str, str]:
    """Return who else claims such pod CIDRs, by name, and why it does not get them."""
    if not outlying:
        return {}
    reasons = {each.name: "; ".join(outlying[cidr] for cidr in each.pod_cidrs if cidr in outlying) for each in nodes}
    return {name: why for name, why in reasons.items() if why and name != own_name}


def _inhabited(claims: _Claims, by_age: Iterable[ClusterNode]) -> dict[Network, str]:
    """Return the pod CIDRs in which several nodes have addresses that are older than the one that claims it, and why.

    As where the pods' addresses overlap with those of the nodes' own network: a young node must not end an old cluster.
    One node alone may be wrong about its addresses, or lie.
    """
    found: dict[Network, set[str]] = {}
    older: set[str] = set()
    for node in by_age:
        older.add(node.name)
        for cidr, name in filter(None, map(claims.holder, node.addresses)):
            if name and name not in older:
                found.setdefault(cidr, set()).add(node.name)
    return {
        cidr: f"pod CIDR {cidr} has addresses of older nodes in it, {min(names)} among them"
        for cidr, names in found.items()
        if len(names) > 1
    }


def _misplaced(claims: _Claims, name: str, addresses: Iterable[Address]) -> dict[Address, str]:
    """Return those of a node's addresses that cannot be its own, and why."""
    found: dict[Address, str] = {}
    for address in addresses:
        holder = claims.holder(address)
        if holder is not None and holder[1] != name:
            whose = f"a pod CIDR of node {holder[1]}" if holder[1] else "which is no node's"
            found[address] = f"address {address} is in {holder[0]}, {whose}"
    return found


class _Claims:
    """Disjoint prefixes and who has them, "" for those that no node may have.

    Bisection: with thousands of nodes, comparing all pairs takes seconds.
    """

    def __init__(self) -> None:
        self._starts: dict[int, list[int]] = {4: [], 6: []}
        self._held: dict[int, list[tuple[Network, str]]] = {4: [], 6: []}
        for each in NOBODYS:
            self.claim(each, "")

    def holder(self, address: Address) -> tuple[Network, str] | None:
        """Return the prefix that the address is in, with its holder."""
        place = bisect_right(self._starts[address.version], int(address))
        held = self._held[address.version][place - 1] if place else None
        return held if held and int(address) <= _last(held[0]) else None

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

"""How this node reaches the others: by which lane, and what that takes in routes and prefixes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from typing import Literal, get_args

from agent.cluster import Cluster, ClusterNode
from agent.config import IPV6_MIN_MTU
from agent.state import Address, Lanes, Network, PeerRoute, Prefix, Routing, Uplink

Lane = Literal["direct", "vxlan", "routed"]
"""To the node itself, on-link; wrapped; or as any other packet, by routers that know the way (`routing: direct`)."""

FAMILIES = (4, 6)

WRAPPING = {4: 20 + 8 + 8 + 14, 6: 40 + 8 + 8 + 14}
"""Bytes that VXLAN adds (RFC 7348 section 5), by the family outside: outer IP, UDP, VXLAN, inner Ethernet."""

# By family; since there may be thousands of ways, they share these.
_LANES: Mapping[tuple[Lane, Lane], Mapping[int, Lane]] = {
    (ipv4, ipv6): {4: ipv4, 6: ipv6} for ipv4 in get_args(Lane) for ipv6 in get_args(Lane)
}


@dataclass(frozen=True)
class Place:
    """All that the ways to others depend on at this end."""

    routing: Routing
    uplinks: tuple[Uplink, ...] = ()
    addresses: tuple[Address, ...] = ()
    """The node's own, at which others reach it, the first one first."""
    tunnel: int = 0
    """The index of the tunnel's device; 0 as long as there is none."""
    tunnel_mtu: int = 0
    """Its MTU in bytes."""
    mtu: int = 0
    """The MTU of the uplinks, in bytes."""
    prefixes: Mapping[Network, Lanes] = field(default_factory=dict)
    """Those that have lanes whoever is in the cluster."""


@dataclass(frozen=True, slots=True)
class Way:
    """The way to one node: lanes and routes to its pods, of each family, and the prefixes that are its own."""

    node: ClusterNode
    peer: Address | None
    """The address at which it is called."""
    lanes: Mapping[int, Lane]
    routes: Mapping[int, PeerRoute]
    prefixes: Mapping[Prefix, Lanes]
    refused: str = ""
    """Which of its pod CIDRs are not reached, and why; empty if all are."""


@dataclass(frozen=True)
class Peers:
    """The ways to all nodes, by their names, and these together with the prefixes of the place."""

    ways: Mapping[str, Way] = field(default_factory=dict)
    routes: dict[Prefix, PeerRoute] = field(default_factory=dict)
    prefixes: dict[Prefix, Lanes] = field(default_factory=dict)
    counts: Mapping[tuple[Lane, int], int] = field(default_factory=dict)
    """How many nodes are reached by which lane, by lane and family."""
    needs_tunnel: bool = False
    """Whether anything of theirs is reached by the tunnel, be it there or not."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Whose pod CIDRs this node does not reach, and why, by name; its own is named where others will not reach it."""


class Ways:
    """Finds the ways. What it found for a node is kept while node and place are the same: there may be thousands."""

    def __init__(self) -> None:
        self._place = Place("auto")
        self._covers = _Covers({})
        self._routes: dict[tuple[tuple[int, PeerRoute], ...], Mapping[int, PeerRoute]] = {}  # by the tunnel: all alike
        self._cluster: Cluster | None = None
        self._paths: Mapping[Address, int] = {}
        self._peers = Peers()

    def find(self, place: Place, cluster: Cluster, paths: Mapping[Address, int] | None = None) -> Peers:
        """Return the ways from the place to all of the cluster's peers; the same object while nothing changes.

        `paths` are the path MTUs, in bytes, that are known to some addresses.
        """
        paths = paths or {}
        moved = place != self._place
        if not moved and cluster is self._cluster and paths == self._paths:
            return self._peers
        if moved:
            self._covers = _Covers(place.prefixes)
            self._routes = {}
        changed = {each for each in paths.keys() | self._paths.keys() if paths.get(each) != self._paths.get(each)}
        ways: dict[str, Way] = {}
        for node in cluster.peers:
            way = self._peers.ways.get(node.name)
            fits = way is not None and (way.node is node or way.node == node) and changed.isdisjoint(node.addresses)
            ways[node.name] = way if way is not None and fits and not moved else self._way(place, node, paths, way)
        self._place, self._cluster, self._paths = place, cluster, paths
        self._peers = _together(place, ways, cluster.own)
        return self._peers

    def _way(self, place: Place, node: ClusterNode, paths: Mapping[Address, int], before: Way | None) -> Way:
        """Find a way, of what there is already: others hold the prefixes that it had before."""
        way = _way(place, self._covers, node, paths)
        had = {each: each for each in (before.prefixes if before else ())}
        return replace(
            way,
            prefixes={had.setdefault(prefix, prefix): lanes for prefix, lanes in way.prefixes.items()},
            routes=self._routes.setdefault(tuple(way.routes.items()), way.routes),
        )


def _together(place: Place, ways: Mapping[str, Way], own: ClusterNode | None) -> Peers:
    routes: dict[Prefix, PeerRoute] = {}
    prefixes: dict[Prefix, Lanes] = {}
    for way in ways.values():
        for prefix, lanes in way.prefixes.items():
            if prefix not in prefixes or _is_called_at(prefix, lanes):
                prefixes[prefix] = lanes
            if not lanes.node and (route := way.routes.get(prefix.version)):
                routes[prefix] = route
    lanes_of = Counter(tuple(way.lanes.items()) for way in ways.values())
    counts: Counter[tuple[Lane, int]] = Counter()
    for each, count in lanes_of.items():
        counts.update({(lane, family): count for family, lane in each})
    needs_tunnel = any(map(_needs_tunnel, ways.values()))
    refused = {name: way.refused for name, way in ways.items() if way.refused}
    if own is not None and (why := _harmless(place, own.pod_cidrs)[1]):
        refused[own.name] = why
    return Peers(ways, routes, {**_within(place.prefixes, prefixes), **prefixes}, counts, needs_tunnel, refused)


def _needs_tunnel(way: Way) -> bool:
    """Say whether the tunnel leads to anything of the node's: a lane of a family that it has nothing of does not."""
    tunnelled = {family for family, lane in way.lanes.items() if lane == "vxlan"}
    claimed = (*way.node.pod_cidrs, *way.node.addresses) if tunnelled and way.peer else ()
    return any(each.version in tunnelled for each in claimed)


def _is_called_at(prefix: Prefix, lanes: Lanes) -> bool:
    return lanes.node and lanes.peer is not None and prefix == Prefix.of_address(lanes.peer)


def _within(inner: Mapping[Network, Lanes], outer: Mapping[Prefix, Lanes]) -> dict[Prefix, Lanes]:
    """Return the `inner` prefixes, each with what it has from the longest of the `outer` ones that covers it."""
    lengths = sorted({each.length for each in outer}, reverse=True)
    result = {Prefix.of(network): lanes for network, lanes in inner.items()}
    for prefix, lanes in list(result.items()):
        for length in lengths:
            covering = outer.get(prefix.covering(length)) if length <= prefix.length else None
            if covering is not None:
                result[prefix] = replace(covering, node=False, stack=lanes.stack or covering.stack)
                break
    return result


class _Covers:
    """Finds the longest prefix that covers another, among few that are to be asked for often."""

    def __init__(self, prefixes: Mapping[Network, Lanes]) -> None:
        self._by_length: dict[tuple[int, int], dict[int, Lanes]] = {}
        for network, lanes in prefixes.items():
            starts = self._by_length.setdefault((network.version, network.prefixlen), {})
            starts[int(network.network_address)] = lanes
        self._lengths = sorted(self._by_length, reverse=True)

    def __getitem__(self, network: Network) -> Lanes:
        start = int(network.network_address)
        for version, length in self._lengths:
            if version == network.version and length <= network.prefixlen:
                host_bits = network.max_prefixlen - length
                found = self._by_length[version, length].get(start >> host_bits << host_bits)
                if found is not None:
                    return found
        return Lanes()


def _way(place: Place, covers: _Covers, node: ClusterNode, paths: Mapping[Address, int]) -> Way:
    own, known = set(place.addresses), node
    if not own.isdisjoint(node.addresses):  # as of one whose machine is this node's now: no way leads there
        node = replace(node, addresses=tuple(each for each in node.addresses if each not in own))
    peer, hops = _called(place, node), _hops(place, node)
    mtu = _narrower(place, peer, paths)
    lanes = _LANES[_lane(place, hops.get(4)), _lane(place, hops.get(6))]
    found = {version: _route(place, lanes[version], hops.get(version), version, mtu) for version in FAMILIES}
    routes = {version: route for version, route in found.items() if route is not None}
    pod_cidrs, refused = _harmless(place, node.pod_cidrs)
    tunnels = {version: place.tunnel if lane == "vxlan" and peer else 0 for version, lane in lanes.items()}
    prefixes: dict[Prefix, Lanes] = {}
    same: dict[Lanes, Lanes] = {}  # as a rule, both families share theirs
    for networks, is_node in ((pod_cidrs, False), (map(ip_network, node.addresses), True)):
        for network in networks:
            tunnel = tunnels[network.version]
            called = _called_at(place, peer, network.network_address) if is_node else peer
            its = Lanes(
                native=True,
                stack=covers[network].stack,
                peer=peer,
                node=is_node,
                tunnel=tunnel,
                mtu=_narrower(place, called, paths) if tunnel else 0,
            )
            prefixes[Prefix.of(network)] = same.setdefault(its, its)
    return Way(known, peer, lanes, routes, prefixes, refused)


def _harmless(place: Place, pod_cidrs: Sequence[Network]) -> tuple[Sequence[Network], str]:
    """Return those pod CIDRs to which there may be ways, and why not to the others.

    The way to one that holds a next hop of the uplinks' would lead past that hop, and with it past the world.
    """
    gateways = {gateway for uplink in place.uplinks for gateway in uplink.gateways}
    held = {cidr: gateway for cidr in pod_cidrs for gateway in gateways if gateway in cidr}
    if not held:
        return pod_cidrs, ""
    why = [f"pod CIDR {cidr} holds {gateway}, the next hop of a route of this node's" for cidr, gateway in held.items()]
    return [cidr for cidr in pod_cidrs if cidr not in held], "; ".join(why)


def _called_at(place: Place, peer: Address | None, address: Address) -> Address | None:
    """Return the address at which the node is called for what goes to one of its own: see `bpf/tunnel.h`."""
    is_alike = peer is not None and address.version <= peer.version
    return address if is_alike and any(each.version == address.version for each in place.addresses) else peer


def _narrower(place: Place, peer: Address | None, paths: Mapping[Address, int]) -> int:
    """Return the MTU inside the tunnel where the way to the peer leaves less than the tunnel's own, else 0."""
    if peer is None:
        return 0
    mtu = max(paths.get(peer, place.mtu) - WRAPPING[peer.version], IPV6_MIN_MTU)
    return mtu if mtu < place.tunnel_mtu else 0


def _called(place: Place, node: ClusterNode) -> Address | None:
    """Return the address at which the node is called through the tunnel: of the family that this one is called by.

    That is what the tunnel's MTU is made for. Without one, it is the first of a family that this one has.
    """
    families = dict.fromkeys(each.version for each in place.addresses)
    return next((each for version in families for each in node.addresses if each.version == version), None)


def _hops(place: Place, node: ClusterNode) -> dict[int, tuple[int, Address]]:
    """Return the node's on-link addresses, each with the device, by the family of what is to be sent there.

    IPv4 may go by way of an IPv6 next hop, but not the other way round.
    """
    hops: dict[int, tuple[int, Address]] = {}
    for address in node.addresses:
        for uplink in place.uplinks:
            if any(address in network for network in uplink.networks):
                hops.setdefault(address.version, (uplink.ifindex, address))
    if 6 in hops:
        hops.setdefault(4, hops[6])
    return hops


def _lane(place: Place, hop: tuple[int, Address] | None) -> Lane:
    if place.routing == "vxlan":
        return "vxlan"
    if hop is not None:
        return "direct"
    return "routed" if place.routing == "direct" else "vxlan"


def _route(place: Place, lane: Lane, hop: tuple[int, Address] | None, version: int, mtu: int) -> PeerRoute | None:
    if lane == "direct" and hop is not None:
        return PeerRoute(hop[0], gateway=hop[1])
    if lane == "vxlan" and place.tunnel:
        source = next((each for each in place.addresses if each.version == version), None)
        return PeerRoute(place.tunnel, source=source, mtu=mtu)
    return None

"""The host's routes to the pods of other nodes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import NamedTuple, Self

from pyroute2.netlink.rtnl import RTM_DELROUTE, RTM_NEWROUTE

from agent.netlink.channel import Request, attributes, each, errno_of
from agent.netlink.encode import Value, message
from agent.netlink.rtnl import (
    ADD,
    CHANGE,
    FAMILY,
    PEER_PROTOCOL,
    PROTOCOL,
    ROUTE,
    RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_GATEWAY,
    RTA_METRICS,
    RTA_OIF,
    RTA_PREFSRC,
    RTA_VIA,
    RTAX_LOCK,
    RTAX_MTU,
    RTN_UNICAST,
    U32,
    u32,
)
from agent.netlink.tables import own_routes
from agent.state import KernelError, Network, PeerRoute, Prefix

_VIA = struct.Struct("=H")  # struct rtvia: family, then the address


class PeerRouteTable:
    """`Table[Prefix, PeerRoute]`: the host's routes to other nodes' pods, by a next hop or the tunnel."""

    def __init__(self) -> None:
        self._ways: dict[_Way, PeerRoute] = {}  # of all routes, which share them where they are equal

    def read(self) -> dict[Prefix, PeerRoute]:
        """Return podlane's routes to other nodes. Raises KernelError."""
        before, ways = self._ways, {}

        def decode(packed: bytes, length: int, route: Mapping[int, bytes]) -> tuple[Prefix, PeerRoute]:
            way = _way(route)
            if way not in ways:
                # Better what was written, if it is equal: others hold it anyway, and identity is compared fast.
                ways[way] = before.get(way) or way.route()
            return Prefix.pack(packed, length), ways[way]

        found = dict(own_routes(PEER_PROTOCOL, RTN_UNICAST, decode))
        self._ways = ways
        return found

    def upsert(self, items: Mapping[Prefix, PeerRoute]) -> dict[Prefix, KernelError]:
        """Create or replace the given routes; a route of someone else in the same place is a failure."""
        failures = each(items, (_add(*item, ADD) for item in items.items()))
        taken = [network for network, failure in failures.items() if errno_of(failure) == errno.EEXIST]
        if taken:
            known = self.read()
            ours = [network for network in taken if network in known]
            replaced = each(ours, [_add(network, items[network], CHANGE) for network in ours])
            failures = {key: value for key, value in failures.items() if key not in ours} | replaced
        self._ways.update((_Way.of(route), route) for route in items.values())
        return failures

    def delete(self, keys: Iterable[Prefix]) -> dict[Prefix, KernelError]:
        """Delete podlane's routes to the given prefixes; one that is already gone counts as deleted."""
        keys = list(keys)
        return each(keys, (_delete(network) for network in keys))


def adopt_peer_routes() -> None:
    """Take over the routes that an earlier agent made, under the number of routes to pods. Raises KernelError.

    Else they would be in the way of those to be made, and stay when their node has gone or moved.
    """

    def decode(packed: bytes, length: int, route: Mapping[int, bytes]) -> tuple[Prefix, PeerRoute] | None:
        is_to_pod = length == 8 * len(packed)
        return None if is_to_pod else (Prefix.pack(packed, length), _way(route).route())

    former = dict(own_routes(PROTOCOL, RTN_UNICAST, decode))
    for failure in each(former, [_add(prefix, route, CHANGE) for prefix, route in former.items()]).values():
        raise failure


class _Way(NamedTuple):
    """A `PeerRoute` as it stands in a message: index, addresses (none: empty), and MTU (none: 0)."""

    device: bytes
    gateway: bytes
    source: bytes
    mtu: int

    @classmethod
    def of(cls, route: PeerRoute) -> Self:
        gateway, source = (each.packed if each else b"" for each in (route.gateway, route.source))
        return cls(U32.pack(route.ifindex), gateway, source, route.mtu)

    def route(self) -> PeerRoute:
        gateway, source = (ip_address(each) if each else None for each in (self.gateway, self.source))
        return PeerRoute(u32(self.device), gateway, source, self.mtu)


def _way(route: Mapping[int, bytes]) -> _Way:
    metrics = attributes(route[RTA_METRICS], 0) if RTA_METRICS in route else {}
    return _Way(
        route.get(RTA_OIF, bytes(U32.size)),
        route.get(RTA_GATEWAY) or route.get(RTA_VIA, b"")[_VIA.size :],
        route.get(RTA_PREFSRC, b""),
        u32(metrics[RTAX_MTU]) if RTAX_MTU in metrics else 0,
    )


def _body(network: Network) -> bytes:
    family = FAMILY[network.version]
    return ROUTE.pack(family, network.prefixlen, RT_TABLE_MAIN, PEER_PROTOCOL, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)


def _add(prefix: Prefix, route: PeerRoute, flags: int) -> Request:
    # ip route add NETWORK [via [inet6] GATEWAY] dev DEVICE [src SOURCE] [mtu lock MTU] proto 111
    network = prefix.network
    entry: list[tuple[int, Value]] = [(RTA_DST, network.network_address), (RTA_OIF, route.ifindex)]
    if route.gateway is not None and route.gateway.version == network.version:
        entry.append((RTA_GATEWAY, route.gateway))
    elif route.gateway is not None:
        entry.append((RTA_VIA, _VIA.pack(FAMILY[route.gateway.version]) + route.gateway.packed))
    if route.source is not None:
        entry.append((RTA_PREFSRC, route.source))
    if route.mtu:
        # Locked: else neither forwarding nor bpf_fib_lookup looks at it.
        entry.append((RTA_METRICS, [(RTAX_LOCK, 1 << RTAX_MTU), (RTAX_MTU, route.mtu)]))
    what = f"add route {network} to another node{f' via {route.gateway}' if route.gateway else ''}"
    return message(what, RTM_NEWROUTE, flags, _body(network), entry)


def _delete(prefix: Prefix) -> Request:
    # ip route delete NETWORK proto 111
    network = prefix.network
    gone = (errno.ESRCH, errno.ENOENT)
    what = f"delete route {network} to another node"
    return message(what, RTM_DELROUTE, 0, _body(network), [(RTA_DST, network.network_address)], tolerated=gone)

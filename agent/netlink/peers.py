"""The host's routes to the pods of other nodes."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Mapping

from pyroute2.netlink.rtnl import RTM_DELROUTE, RTM_NEWROUTE

from agent.netlink.channel import Message, Request, each, errno_of
from agent.netlink.devices import tunnel_index
from agent.netlink.encode import Value, message
from agent.netlink.rtnl import (
    ADD,
    CHANGE,
    FAMILY,
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
)
from agent.netlink.tables import OwnRoute, decoded, own_routes
from agent.state import KernelError, Network, PeerRoute

_FORGET = 1000  # routes that were seen once, before they are forgotten
_VIA = struct.Struct("=H")  # struct rtvia: family, then the address


class PeerRouteTable:
    """`Table[Network, PeerRoute]`: the host's routes to other nodes' pods, which have a next hop or use the tunnel."""

    def __init__(self) -> None:
        self._known: dict[bytes, OwnRoute] = {}  # by the message that tells of it: there may be thousands
        self._written: dict[Network, OwnRoute] = {}  # and not read yet

    def read(self) -> dict[Network, PeerRoute]:
        """Return podlane's routes to other nodes. Raises KernelError."""
        tunnel = tunnel_index()
        routes = [each for each in own_routes(RTN_UNICAST, self._decode) if each.leads_to_peer(tunnel)]
        found = {each.network: each.way for each in routes}
        self._written.clear()
        if len(self._known) - len(routes) > _FORGET:
            self._known = {body: each for body, each in self._known.items() if found.get(each.network) is each.way}
        return found

    def _decode(self, answer: Message) -> OwnRoute:
        route = self._known.get(answer.body)
        if route is None:
            route = decoded(answer)
            written = self._written.get(route.network)
            # Better what was written, if it is equal: others hold it anyway, and identity is compared fast.
            self._known[answer.body] = route = written if written == route else route
        return route

    def upsert(self, items: Mapping[Network, PeerRoute]) -> dict[Network, KernelError]:
        """Create or replace the given routes; a route of someone else in the same place is a failure."""
        failures = each(list(items), [_add(*item, ADD) for item in items.items()])
        taken = [network for network, failure in failures.items() if errno_of(failure) == errno.EEXIST]
        if taken:
            known = self.read()
            ours = [network for network in taken if network in known]
            replaced = each(ours, [_add(network, items[network], CHANGE) for network in ours])
            failures = {key: value for key, value in failures.items() if key not in ours} | replaced
        self._written |= {network: OwnRoute(network, way) for network, way in items.items()}
        return failures

    def delete(self, keys: Iterable[Network]) -> dict[Network, KernelError]:
        """Delete podlane's routes to the given prefixes; one that is already gone counts as deleted."""
        keys = list(keys)
        return each(keys, [_delete(network) for network in keys])


def _body(network: Network) -> bytes:
    family = FAMILY[network.version]
    return ROUTE.pack(family, network.prefixlen, RT_TABLE_MAIN, PROTOCOL, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)


def _add(network: Network, route: PeerRoute, flags: int) -> Request:
    # ip route add NETWORK [via [inet6] GATEWAY] dev DEVICE [src SOURCE] [mtu lock MTU] proto 112
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


def _delete(network: Network) -> Request:
    # ip route delete NETWORK proto 112
    gone = (errno.ESRCH, errno.ENOENT)
    what = f"delete route {network} to another node"
    return message(what, RTM_DELROUTE, 0, _body(network), [(RTA_DST, network.network_address)], tolerated=gone)

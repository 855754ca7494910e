"""The host's routes to the pods of other nodes."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from pyroute2.netlink.rtnl import RTM_DELROUTE, RTM_NEWROUTE
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from agent.netlink.channel import Request, each, errno_of, request
from agent.netlink.devices import tunnel_index
from agent.netlink.rtnl import (
    ADD,
    CHANGE,
    FAMILY,
    PROTOCOL,
    RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN,
    RTAX_MTU,
    RTN_UNICAST,
)
from agent.netlink.tables import OwnRoute, own_routes
from agent.state import KernelError, Network, PeerRoute

_FORGET = 1000  # routes that were seen once, before what is remembered of them is thrown away


class PeerRouteTable:
    """`Table[Network, PeerRoute]`: the host's routes to other nodes' pods, which have a next hop or use the tunnel."""

    def __init__(self) -> None:
        self._known: dict[bytes, OwnRoute] = {}

    def read(self) -> dict[Network, PeerRoute]:
        """Return podlane's routes to other nodes. Raises KernelError."""
        tunnel = tunnel_index()
        routes = [each for each in own_routes(RTN_UNICAST, self._known) if each.leads_to_peer(tunnel)]
        if len(self._known) > 2 * len(routes) + _FORGET:
            self._known.clear()
        return {each.network: PeerRoute(each.ifindex, each.gateway, each.source, each.mtu) for each in routes}

    def upsert(self, items: Mapping[Network, PeerRoute]) -> dict[Network, KernelError]:
        """Create or replace the given routes; a route of someone else in the same place is a failure."""
        failures = each(list(items), [_add(*item, ADD) for item in items.items()])
        taken = [network for network, failure in failures.items() if errno_of(failure) == errno.EEXIST]
        if taken:
            known = self.read()
            ours = [network for network in taken if network in known]
            replaced = each(ours, [_add(network, items[network], CHANGE) for network in ours])
            failures = {key: value for key, value in failures.items() if key not in ours} | replaced
        return failures

    def delete(self, keys: Iterable[Network]) -> dict[Network, KernelError]:
        """Delete podlane's routes to the given prefixes; one that is already gone counts as deleted."""
        keys = list(keys)
        return each(keys, [_delete(network) for network in keys])


def _fields(network: Network) -> dict[str, int]:
    return {
        "family": FAMILY[network.version],
        "dst_len": network.prefixlen,
        "table": RT_TABLE_MAIN,
        "proto": PROTOCOL,
        "scope": RT_SCOPE_UNIVERSE,
        "type": RTN_UNICAST,
    }


def _add(network: Network, route: PeerRoute, flags: int) -> Request:
    # ip route add NETWORK [via [inet6] GATEWAY] dev DEVICE [src SOURCE] [mtu lock MTU] proto 112
    entry: list[tuple[str, object]] = [("RTA_DST", str(network.network_address)), ("RTA_OIF", route.ifindex)]
    if route.gateway is not None and route.gateway.version == network.version:
        entry.append(("RTA_GATEWAY", str(route.gateway)))
    elif route.gateway is not None:
        entry.append(("RTA_VIA", {"family": FAMILY[route.gateway.version], "addr": str(route.gateway)}))
    if route.source is not None:
        entry.append(("RTA_PREFSRC", str(route.source)))
    if route.mtu:
        # Locked: else neither forwarding nor bpf_fib_lookup looks at it.
        metrics = [("RTAX_LOCK", 1 << RTAX_MTU), ("RTAX_MTU", route.mtu)]
        entry.append(("RTA_METRICS", {"attrs": metrics}))
    what = f"add route {network} to another node{f' via {route.gateway}' if route.gateway else ''}"
    return request(what, rtmsg, RTM_NEWROUTE, flags, fields=_fields(network), attributes=entry)


def _delete(network: Network) -> Request:
    # ip route delete NETWORK proto 112
    gone = (errno.ESRCH, errno.ENOENT)
    what = f"delete route {network} to another node"
    entry = [("RTA_DST", str(network.network_address))]
    return request(what, rtmsg, RTM_DELROUTE, fields=_fields(network), attributes=entry, tolerated=gone)

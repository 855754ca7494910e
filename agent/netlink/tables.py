"""The host's routes and neighbours for local pods: how the host stack reaches a pod.

Both carry a protocol number, by which a restarted agent recognises its own; all others are left alone.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pyroute2.netlink.rtnl import (
    RTM_DELNEIGH,
    RTM_DELROUTE,
    RTM_GETNEIGH,
    RTM_GETROUTE,
    RTM_NEWNEIGH,
    RTM_NEWROUTE,
)
from pyroute2.netlink.rtnl.ndmsg import NUD_PERMANENT, ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from agent.netlink.channel import Request, attributes, dump, each, errno_of, request
from agent.netlink.devices import tunnel_index
from agent.netlink.rtnl import (
    ADD,
    CHANGE,
    FAMILY,
    NDA_DST,
    NDA_LLADDR,
    NDA_PROTOCOL,
    NEIGHBOUR,
    PROTOCOL,
    PUT,
    ROUTE,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_GATEWAY,
    RTA_METRICS,
    RTA_OIF,
    RTA_PREFSRC,
    RTA_VIA,
    RTAX_MTU,
    RTN_UNICAST,
    RTN_UNREACHABLE,
    u32,
)
from agent.state import Address, HostRoute, KernelError, Neighbour, Network

# The metric of unreachable subnets: whoever knows a way into one of them, as the node itself may, comes first.
_LAST = 1 << 31

HOST_BITS: dict[int, int] = {FAMILY[4]: 32, FAMILY[6]: 128}


class RouteTable:
    """`Table[Address, HostRoute]`: the host's route to each pod's address."""

    def read(self) -> dict[Address, HostRoute]:
        """Return podlane's host routes. Raises KernelError."""
        tunnel = tunnel_index()
        return {
            route.network.network_address: HostRoute(route.ifindex, route.source)
            for route in own_routes(RTN_UNICAST, hosts=True)
            if not route.leads_to_peer(tunnel)
        }

    def upsert(self, items: Mapping[Address, HostRoute]) -> dict[Address, KernelError]:
        """Create or replace the given routes; a route of someone else in the same place is a failure."""
        failures = each(list(items), [_add_route(*item, ADD) for item in items.items()])
        taken = [address for address, failure in failures.items() if errno_of(failure) == errno.EEXIST]
        if taken:
            ours = [address for address in self.read() if address in taken]
            replaced = each(ours, [_add_route(address, items[address], CHANGE) for address in ours])
            failures = {key: value for key, value in failures.items() if key not in ours} | replaced
        return failures

    def delete(self, keys: Iterable[Address]) -> dict[Address, KernelError]:
        """Delete podlane's routes to the given addresses; one that is already gone counts as deleted."""
        keys = list(keys)
        return each(keys, [_delete_route(address) for address in keys])


class SubnetTable:
    """`Table[Network, "unreachable"]`: the pods' subnets, whose addresses lead nowhere unless a pod has them.

    Or unless the node has another route to them: these come last.
    """

    def read(self) -> dict[Network, Literal["unreachable"]]:
        """Return podlane's unreachable subnets. Raises KernelError."""
        return {route.network: "unreachable" for route in own_routes(RTN_UNREACHABLE)}

    def upsert(self, items: Mapping[Network, Literal["unreachable"]]) -> dict[Network, KernelError]:
        """Create the given routes, behind those of others."""
        return each(list(items), [_subnet("add", network, RTM_NEWROUTE, ADD) for network in items])

    def delete(self, keys: Iterable[Network]) -> dict[Network, KernelError]:
        """Delete podlane's routes to the given subnets; one that is already gone counts as deleted."""
        keys = list(keys)
        return each(keys, [_subnet("delete", network, RTM_DELROUTE, 0) for network in keys])


class NeighbourTable:
    """`Table[Neighbour, str]`: the MAC address of each pod, so that the host never has to ask for it."""

    def read(self) -> dict[Neighbour, str]:
        """Return podlane's permanent neighbours and their MAC addresses. Raises KernelError."""
        # ip neighbour show nud permanent; the kernel cannot filter by protocol
        found = {}
        for answer in dump(request("list neighbours", ndmsg, RTM_GETNEIGH)):
            if answer.type != RTM_NEWNEIGH:
                continue
            _, number, state, _, _ = NEIGHBOUR.unpack_from(answer.body)
            if state & NUD_PERMANENT:
                entry = attributes(answer.body, NEIGHBOUR.size)
                if entry.get(NDA_PROTOCOL) == bytes([PROTOCOL]) and NDA_LLADDR in entry:
                    found[Neighbour(_address(entry[NDA_DST]), number)] = entry[NDA_LLADDR].hex(":")
        return found

    def upsert(self, items: Mapping[Neighbour, str]) -> dict[Neighbour, KernelError]:
        """Create or replace the given neighbours; return the failures."""
        return each(list(items), [_add_neighbour(*item) for item in items.items()])

    def delete(self, keys: Iterable[Neighbour]) -> dict[Neighbour, KernelError]:
        """Delete the given neighbours; one already gone, with its device or without, counts as deleted."""
        keys = list(keys)
        return each(keys, [_delete_neighbour(key) for key in keys])


@dataclass(frozen=True, slots=True)
class OwnRoute:
    """One of podlane's routes. `ifindex` is 0 if it leads nowhere, `mtu` (bytes) if it is the device's."""

    network: Network
    ifindex: int
    gateway: Address | None
    source: Address | None
    mtu: int

    def leads_to_peer(self, tunnel: int) -> bool:
        """Say whether it is for another node's pods: those of the node's own have neither a next hop nor the tunnel.

        `tunnel` is the index of the tunnel's device.
        """
        return self.gateway is not None or self.ifindex == tunnel > 0


def own_routes(kind: int, known: dict[bytes, OwnRoute] | None = None, *, hosts: bool = False) -> Iterator[OwnRoute]:
    """Yield podlane's routes of a type (RTN_…), or with `hosts` those to a single address. Raises KernelError.

    What is `known`, by the message that tells of it, need not be decoded again: there may be thousands.
    """
    for family in FAMILY.values():
        # ip route show table main proto 112 type KIND; the kernel filters
        fields = {"family": family, "table": RT_TABLE_MAIN, "proto": PROTOCOL, "type": kind}
        for answer in dump(request("list routes", rtmsg, RTM_GETROUTE, fields=fields)):
            got, length, _, protocol, _, is_kind, _ = ROUTE.unpack_from(answer.body)
            if (answer.type, got, protocol, is_kind) != (RTM_NEWROUTE, family, PROTOCOL, kind):
                continue
            if hosts and length != HOST_BITS[family]:
                continue
            route = known.get(answer.body) if known is not None else None
            if route is None:
                route = _decoded(attributes(answer.body, ROUTE.size), family, length)
                if known is not None:
                    known[answer.body] = route
            yield route


def _decoded(route: dict[int, bytes], family: int, length: int) -> OwnRoute:
    packed = route.get(RTA_DST, bytes(HOST_BITS[family] // 8))  # without one, it is a default route
    metrics = attributes(route.get(RTA_METRICS, b""), 0)
    return OwnRoute(
        ipaddress.ip_network((packed, length)),
        u32(route[RTA_OIF]) if RTA_OIF in route else 0,
        _gateway(route),
        _address(route[RTA_PREFSRC]) if RTA_PREFSRC in route else None,
        u32(metrics[RTAX_MTU]) if RTAX_MTU in metrics else 0,
    )


def _gateway(route: dict[int, bytes]) -> Address | None:
    packed = route.get(RTA_GATEWAY) or route.get(RTA_VIA, b"")[2:]  # after the family
    return _address(packed) if packed else None


def _subnet(verb: str, network: Network, type_: int, flags: int) -> Request:
    # ip route add unreachable NETWORK metric 2147483648 proto 112
    fields = {
        "family": FAMILY[network.version],
        "dst_len": network.prefixlen,
        "table": RT_TABLE_MAIN,
        "proto": PROTOCOL,
        "scope": RT_SCOPE_UNIVERSE,
        "type": RTN_UNREACHABLE,
    }
    gone = (errno.ESRCH, errno.ENOENT) if type_ == RTM_DELROUTE else ()
    entry: list[tuple[str, object]] = [("RTA_DST", str(network.network_address))]
    if type_ == RTM_NEWROUTE:  # to delete, any: earlier agents gave none
        entry.append(("RTA_PRIORITY", _LAST))
    what = f"{verb} unreachable {network}"
    return request(what, rtmsg, type_, flags, fields=fields, attributes=entry, tolerated=gone)


def _route(address: Address) -> dict[str, int]:
    return {
        "family": FAMILY[address.version],
        "dst_len": address.max_prefixlen,
        "table": RT_TABLE_MAIN,
        "proto": PROTOCOL,
        "scope": RT_SCOPE_LINK,
        "type": RTN_UNICAST,
    }


def _add_route(address: Address, route: HostRoute, flags: int) -> Request:
    # ip route add ADDRESS dev DEVICE scope link proto 112 [src SOURCE]
    entry = [("RTA_DST", str(address)), ("RTA_OIF", route.ifindex)]
    if route.source is not None:
        entry.append(("RTA_PREFSRC", str(route.source)))
    what = f"add route {address} to device {route.ifindex}"
    return request(what, rtmsg, RTM_NEWROUTE, flags, fields=_route(address), attributes=entry)


def _delete_route(address: Address) -> Request:
    # ip route delete ADDRESS scope link proto 112
    gone = (errno.ESRCH, errno.ENOENT)
    what = f"delete route {address}"
    entry = [("RTA_DST", str(address))]
    return request(what, rtmsg, RTM_DELROUTE, fields=_route(address), attributes=entry, tolerated=gone)


def _add_neighbour(key: Neighbour, mac: str) -> Request:
    # ip neighbour replace ADDRESS lladdr MAC dev DEVICE nud permanent proto 112
    fields = {"family": FAMILY[key.address.version], "ifindex": key.ifindex, "state": NUD_PERMANENT}
    entry = [("NDA_DST", str(key.address)), ("NDA_LLADDR", mac), ("NDA_PROTOCOL", PROTOCOL)]
    what = f"add neighbour {key.address} on device {key.ifindex}"
    return request(what, ndmsg, RTM_NEWNEIGH, PUT, fields=fields, attributes=entry)


def _delete_neighbour(key: Neighbour) -> Request:
    # ip neighbour delete ADDRESS dev DEVICE
    fields = {"family": FAMILY[key.address.version], "ifindex": key.ifindex}
    gone = (errno.ENOENT, errno.ENODEV)
    what = f"delete neighbour {key.address} on device {key.ifindex}"
    entry = [("NDA_DST", str(key.address))]
    return request(what, ndmsg, RTM_DELNEIGH, fields=fields, attributes=entry, tolerated=gone)


def _address(packed: bytes) -> Address:
    return ipaddress.ip_address(packed)

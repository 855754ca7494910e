"""The host's routes and neighbours for local pods: how the host stack reaches a pod.

Both carry a protocol number, by which a restarted agent recognises its own; all others are left alone.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, TypeVar

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

from agent.netlink.channel import Message, Request, attributes, dump, dump_by, each, errno_of, request
from agent.netlink.encode import Attributes, mac, message
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
    RTA_OIF,
    RTA_PREFSRC,
    RTA_PRIORITY,
    RTN_UNICAST,
    RTN_UNREACHABLE,
    u32,
)
from agent.state import Address, HostRoute, KernelError, Neighbour, Network

# The metric of unreachable subnets: whoever knows a way into one of them, as the node itself may, comes first.
_LAST = 1 << 31

T = TypeVar("T")

HOST_BITS: dict[int, int] = {FAMILY[4]: 32, FAMILY[6]: 128}


class RouteTable:
    """`Table[Address, HostRoute]`: the host's route to each pod's address."""

    def read(self) -> dict[Address, HostRoute]:
        """Return podlane's host routes. Raises KernelError."""

        def decode(packed: bytes, length: int, route: Mapping[int, bytes]) -> tuple[Address, HostRoute] | None:
            if length != 8 * len(packed):
                return None
            source = _address(route[RTA_PREFSRC]) if RTA_PREFSRC in route else None
            return _address(packed), HostRoute(u32(route[RTA_OIF]), source)

        return dict(own_routes(PROTOCOL, RTN_UNICAST, decode))

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

        def decode(packed: bytes, length: int, _: Mapping[int, bytes]) -> Network:
            return ipaddress.ip_network((packed, length))

        return dict.fromkeys(own_routes(PROTOCOL, RTN_UNREACHABLE, decode), "unreachable")

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


def own_routes(protocol: int, kind: int, decode: Callable[[bytes, int, Mapping[int, bytes]], T | None]) -> Iterator[T]:
    """Yield what `decode` makes of podlane's routes of a protocol and a type (RTN_…). Raises KernelError.

    It is given the address and the length of the destination, and all attributes; None leaves the route out.
    """
    for family in FAMILY.values():
        anywhere = bytes(HOST_BITS[family] // 8)  # a default route has no address

        def read(answer: Message, family: int = family, anywhere: bytes = anywhere) -> T | None:
            got, length, _, its, _, is_kind, _ = ROUTE.unpack_from(answer.body)
            if (answer.type, got, its, is_kind) != (RTM_NEWROUTE, family, protocol, kind):
                return None
            route = attributes(answer.body, ROUTE.size)
            return decode(route.get(RTA_DST, anywhere), length, route)

        # ip route show table main proto PROTOCOL type KIND; the kernel filters
        fields = {"family": family, "table": RT_TABLE_MAIN, "proto": protocol, "type": kind}
        yield from dump_by(request("list routes", rtmsg, RTM_GETROUTE, fields=fields), read)


def _subnet(verb: str, network: Network, type_: int, flags: int) -> Request:
    # ip route add unreachable NETWORK metric 2147483648 proto 112
    gone = (errno.ESRCH, errno.ENOENT) if type_ == RTM_DELROUTE else ()
    entry: Attributes = [(RTA_DST, network.network_address)]
    if type_ == RTM_NEWROUTE:  # to delete, any: earlier agents gave none
        entry = [*entry, (RTA_PRIORITY, _LAST)]
    body = _route(network, RT_SCOPE_UNIVERSE, RTN_UNREACHABLE)
    return message(f"{verb} unreachable {network}", type_, flags, body, entry, tolerated=gone)


def _route(network: Network, scope: int, kind: int) -> bytes:
    return ROUTE.pack(FAMILY[network.version], network.prefixlen, RT_TABLE_MAIN, PROTOCOL, scope, kind, 0)


def _host(address: Address) -> bytes:
    return _route(ipaddress.ip_network(address), RT_SCOPE_LINK, RTN_UNICAST)


def _add_route(address: Address, route: HostRoute, flags: int) -> Request:
    # ip route add ADDRESS dev DEVICE scope link proto 112 [src SOURCE]
    entry: Attributes = [(RTA_DST, address), (RTA_OIF, route.ifindex)]
    if route.source is not None:
        entry = [*entry, (RTA_PREFSRC, route.source)]
    return message(f"add route {address} to device {route.ifindex}", RTM_NEWROUTE, flags, _host(address), entry)


def _delete_route(address: Address) -> Request:
    # ip route delete ADDRESS scope link proto 112
    gone = (errno.ESRCH, errno.ENOENT)
    return message(f"delete route {address}", RTM_DELROUTE, 0, _host(address), [(RTA_DST, address)], tolerated=gone)


def _add_neighbour(key: Neighbour, address: str) -> Request:
    # ip neighbour replace ADDRESS lladdr MAC dev DEVICE nud permanent proto 112
    entry: Attributes = [(NDA_DST, key.address), (NDA_LLADDR, mac(address)), (NDA_PROTOCOL, bytes([PROTOCOL]))]
    what = f"add neighbour {key.address} on device {key.ifindex}"
    return message(what, RTM_NEWNEIGH, PUT, _neighbour(key, NUD_PERMANENT), entry)


def _delete_neighbour(key: Neighbour) -> Request:
    # ip neighbour delete ADDRESS dev DEVICE
    gone = (errno.ENOENT, errno.ENODEV)
    what = f"delete neighbour {key.address} on device {key.ifindex}"
    return message(what, RTM_DELNEIGH, 0, _neighbour(key, 0), [(NDA_DST, key.address)], tolerated=gone)


def _neighbour(key: Neighbour, state: int) -> bytes:
    return NEIGHBOUR.pack(FAMILY[key.address.version], key.ifindex, state, 0, 0)


def _address(packed: bytes) -> Address:
    return ipaddress.ip_address(packed)

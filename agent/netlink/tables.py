"""The host's routes and neighbours for local pods: how the host stack reaches a pod.

Both carry a protocol number, by which a restarted agent recognises its own; all others are left alone.
"""

from __future__ import annotations

import errno
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

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

from agent.netlink.channel import Request, attributes, dump, errno_of, execute, request
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
    RT_TABLE_MAIN,
    RTA_DST,
    RTA_OIF,
    RTN_UNICAST,
    u32,
)
from agent.state import Address, KernelError, Neighbour

K = TypeVar("K")


class RouteTable:
    """`Table[Address, int]`: the host's route to each pod's address: the index of the pod's host end."""

    def read(self) -> dict[Address, int]:
        """Return podlane's host routes, address to device index. Raises KernelError."""
        found: dict[Address, int] = {}
        for family, bits in ((FAMILY[4], 32), (FAMILY[6], 128)):
            # ip route show table main proto 112; the kernel filters
            fields = {"family": family, "table": RT_TABLE_MAIN, "proto": PROTOCOL}
            for answer in dump(request("list routes", rtmsg, RTM_GETROUTE, fields=fields)):
                got, length, _, protocol, _, _, _ = ROUTE.unpack_from(answer.body)
                if answer.type == RTM_NEWROUTE and (got, length, protocol) == (family, bits, PROTOCOL):
                    route = attributes(answer.body, ROUTE.size)
                    if RTA_OIF in route:
                        found[_address(route[RTA_DST])] = u32(route[RTA_OIF])
        return found

    def upsert(self, items: Mapping[Address, int]) -> dict[Address, KernelError]:
        """Create or replace the given routes; a route of someone else in the same place is a failure."""
        failures = _each(list(items), [_add_route(*item, ADD) for item in items.items()])
        taken = [address for address, failure in failures.items() if errno_of(failure) == errno.EEXIST]
        if taken:
            ours = [address for address in self.read() if address in taken]
            replaced = _each(ours, [_add_route(address, items[address], CHANGE) for address in ours])
            failures = {key: value for key, value in failures.items() if key not in ours} | replaced
        return failures

    def delete(self, keys: Iterable[Address]) -> dict[Address, KernelError]:
        """Delete podlane's routes to the given addresses; one that is already gone counts as deleted."""
        keys = list(keys)
        return _each(keys, [_delete_route(address) for address in keys])


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
        return _each(list(items), [_add_neighbour(*item) for item in items.items()])

    def delete(self, keys: Iterable[Neighbour]) -> dict[Neighbour, KernelError]:
        """Delete the given neighbours; one already gone, with its device or without, counts as deleted."""
        keys = list(keys)
        return _each(keys, [_delete_neighbour(key) for key in keys])


def _each(keys: Sequence[K], requests: Sequence[Request]) -> dict[K, KernelError]:
    """Send one request per key; return the failures by key."""
    return {key: failure for key, failure in zip(keys, execute(requests), strict=True) if failure}


def _route(address: Address) -> dict[str, int]:
    return {
        "family": FAMILY[address.version],
        "dst_len": address.max_prefixlen,
        "table": RT_TABLE_MAIN,
        "proto": PROTOCOL,
        "scope": RT_SCOPE_LINK,
        "type": RTN_UNICAST,
    }


def _add_route(address: Address, number: int, flags: int) -> Request:
    # ip route add ADDRESS dev DEVICE scope link proto 112
    entry = [("RTA_DST", str(address)), ("RTA_OIF", number)]
    what = f"add route {address} to device {number}"
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

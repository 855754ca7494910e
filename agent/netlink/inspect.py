"""What there is of one pod: both ends of its veth pair, and what its own end carries."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface

from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_GETNEIGH, RTM_GETROUTE, RTM_NEWADDR, RTM_NEWNEIGH, RTM_NEWROUTE
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_UP
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from agent.netlink.channel import Message, attributes, dump, request
from agent.netlink.devices import Link, links
from agent.netlink.netns import in_netns
from agent.netlink.rtnl import (
    ADDRESS,
    FAMILY,
    IFA_ADDRESS,
    IFA_LOCAL,
    IFLA_ADDRESS,
    IFLA_LINK,
    IFLA_LINK_NETNSID,
    IFLA_MTU,
    NDA_DST,
    NDA_LLADDR,
    NEIGHBOUR,
    NEXTHOP,
    ROUTE,
    RTA_DST,
    RTA_MULTIPATH,
    RTA_OIF,
    RTN_UNICAST,
    u32,
)
from agent.state import Address, Network

RTA_GATEWAY, RTA_TABLE = 5, 15


@dataclass(frozen=True, slots=True)
class End:
    """One end of a veth pair. `peer` is the index of the other end where that is in another namespace, else 0."""

    index: int
    peer: int
    mac: str
    mtu: int
    up: bool


@dataclass(frozen=True, slots=True)
class PodRoute:
    """A unicast route over the pod's interface; `gateway` is None for what is on the link."""

    destination: Network
    gateway: Address | None
    table: int


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod's interface, its addresses, its routes in all tables, and the MAC addresses of its neighbours."""

    end: End
    addresses: frozenset[IPv4Interface | IPv6Interface]
    routes: frozenset[PodRoute]
    neighbours: Mapping[Address, str]


def read_pod(netns: int, name: str) -> PodView | None:
    """Return an interface in the network namespace of an open file, or None if there is none of that name.

    Raises KernelError.
    """

    def read() -> PodView | None:
        end = read_end(name)
        if end is None:
            return None
        return PodView(
            end,
            frozenset(_addresses(end.index)),
            frozenset(_routes(end.index)),
            dict(_neighbours(end.index)),
        )

    return in_netns(netns, read)


def read_end(name: str) -> End | None:
    """Return a device of the calling thread's namespace, or None if there is none of that name. Raises KernelError."""
    return next((_end(link) for link in links() if link.name == name), None)


def _end(link: Link) -> End:
    abroad = IFLA_LINK_NETNSID in link.attributes
    return End(
        index=link.index,
        peer=u32(link.attributes[IFLA_LINK]) if abroad and IFLA_LINK in link.attributes else 0,
        mac=link.attributes.get(IFLA_ADDRESS, b"").hex(":"),
        mtu=u32(link.attributes[IFLA_MTU]),
        up=bool(link.flags & IFF_UP),
    )


def _addresses(number: int) -> Iterator[IPv4Interface | IPv6Interface]:
    # ip address show dev POD; the kernel filters
    for answer in dump(request("list the pod's addresses", ifaddrmsg, RTM_GETADDR, fields={"index": number})):
        if answer.type == RTM_NEWADDR:
            _, bits, _, _, _ = ADDRESS.unpack_from(answer.body)
            found = attributes(answer.body, ADDRESS.size)
            yield ipaddress.ip_interface((found.get(IFA_LOCAL) or found[IFA_ADDRESS], bits))


def _routes(number: int) -> Iterator[PodRoute]:
    # ip route show table all dev POD; ip -6 route show table all dev POD. The kernel filters
    for version, family in FAMILY.items():
        fields = {"family": family, "type": RTN_UNICAST}
        query = request("list the pod's routes", rtmsg, RTM_GETROUTE, fields=fields, attributes=[("RTA_OIF", number)])
        for answer in dump(query):
            got, _, _, _, _, kind, _ = ROUTE.unpack_from(answer.body)
            if answer.type == RTM_NEWROUTE and (got, kind) == (family, RTN_UNICAST):
                yield from _hops(answer, version, number)


def _hops(answer: Message, version: int, number: int) -> Iterator[PodRoute]:
    """Yield a route once for each of its next hops on the device."""
    _, bits, table, _, _, _, _ = ROUTE.unpack_from(answer.body)
    route = attributes(answer.body, ROUTE.size)
    anywhere = bytes(4 if version == 4 else 16)
    destination = ipaddress.ip_network((route.get(RTA_DST, anywhere), bits))
    table = u32(route[RTA_TABLE]) if RTA_TABLE in route else table
    if RTA_OIF in route and u32(route[RTA_OIF]) == number:
        yield PodRoute(destination, _gateway(route), table)
    hops, offset = route.get(RTA_MULTIPATH, b""), 0
    while offset + NEXTHOP.size <= len(hops):
        length, _, _, device = NEXTHOP.unpack_from(hops, offset)
        if device == number:
            yield PodRoute(destination, _gateway(attributes(hops[offset : offset + length], NEXTHOP.size)), table)
        offset += max(length, NEXTHOP.size)


def _gateway(hop: Mapping[int, bytes]) -> Address | None:
    return ipaddress.ip_address(hop[RTA_GATEWAY]) if RTA_GATEWAY in hop else None


def _neighbours(number: int) -> Iterator[tuple[Address, str]]:
    # ip neighbour show dev POD; the kernel filters
    query = request(
        "list the pod's neighbours", ndmsg, RTM_GETNEIGH, attributes=[("NDA_IFINDEX", number)]
    )  # fmt: skip
    for answer in dump(query):
        if answer.type == RTM_NEWNEIGH:
            _, device, _, _, _ = NEIGHBOUR.unpack_from(answer.body)
            entry = attributes(answer.body, NEIGHBOUR.size)
            if device == number and NDA_LLADDR in entry:
                yield ipaddress.ip_address(entry[NDA_DST]), entry[NDA_LLADDR].hex(":")

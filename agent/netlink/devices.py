"""The host's network devices: which are podlane's, and what leads out."""

from __future__ import annotations

import errno
import socket
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

from pyroute2.netlink.rtnl import (
    RTM_DELLINK,
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETROUTE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
)
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_UP, ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from agent.netlink import sysctl
from agent.netlink.channel import Message, attributes, dump, dump_by, perform, request
from agent.netlink.encode import message
from agent.netlink.rtnl import (
    ADDRESS,
    FAMILY,
    IFLA_ADDRESS,
    IFLA_IFALIAS,
    IFLA_IFNAME,
    IFLA_MTU,
    LINK,
    NEXTHOP,
    NO_LINK,
    PEER_PROTOCOL,
    PROTOCOL,
    ROUTE,
    RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN,
    RTA_GATEWAY,
    RTA_MULTIPATH,
    RTA_OIF,
    RTA_VIA,
    RTN_UNICAST,
    text,
    u32,
)
from agent.state import Address

# How a restarted agent recognises its devices: by name, and alias or MAC address. The kernel takes no alias as it makes
# a device: one whose maker was killed before it wrote that has the address only.
NAME_PREFIX = "pl"
ALIAS_PREFIX = "podlane:"
OWN_MAC = "02:70:6c:61:6e:65"
"""Of host ends and the tunnel: locally administered, and "plane" in ASCII."""

TUNNEL = "podlane.vx"
"""The name of the device that leads to nodes that are not on-link."""

DEFAULT_MTU = 1500  # bytes

RTEXT_FILTER_SKIP_STATS = 8  # linux/rtnetlink.h
IFF_LOOPBACK = 8
FAMILY_SIZE = 2  # bytes, in struct rtvia


@dataclass(frozen=True, slots=True)
class Link:
    """A network device: index, hardware type (ARPHRD_…), flags (IFF_…), and netlink attributes (IFLA_…)."""

    index: int
    type: int
    flags: int
    attributes: dict[int, bytes]

    @property
    def name(self) -> str:
        """Its name."""
        return text(self.attributes[IFLA_IFNAME])


@dataclass(frozen=True, slots=True)
class Hop:
    """Where a route of the host's leads next: the index of the device, and the gateway there, if there is one."""

    device: int
    gateway: Address | None
    of_default: bool
    """The route is a default one."""


def devices() -> dict[str, int]:
    """Return the host ends of podlane's veth pairs, name to index. Raises KernelError."""
    return {link.name: link.index for link in host_ends()}


def own_devices() -> list[str]:
    """Return the names of all of podlane's devices: host ends, shapers, the tunnel. Raises KernelError."""
    return [link.name for link in links() if is_own(link)]


def fallen_devices() -> set[str]:
    """Return the names of those host ends, and of shapers, that are administratively down. Raises KernelError."""
    return {link.name for kind in ("veth", "ifb") for link in own_links(kind) if not link.flags & IFF_UP}


def index(name: str) -> int | None:
    """Return the index of a device, or None if there is no such device."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def name_of(number: int) -> str | None:
    """Return the name of the device with an index, or None if there is no such device."""
    try:
        return socket.if_indextoname(number)
    except OSError:
        return None


def delete_device(name: str) -> None:
    """Delete a device, and with a veth its other end; one already gone is fine. Raises KernelError."""
    # ip link delete NAME
    name_only = [(IFLA_IFNAME, name)]
    perform([message(f"delete device {name}", RTM_DELLINK, 0, NO_LINK, name_only, tolerated=(errno.ENODEV,))])


def uplink_mtu(routed: Collection[int] | None = None) -> int:
    """Return the MTU, in bytes, of what leads out of this node. Raises KernelError.

    The smallest among the devices of the default routes (`routed`, if these are known); without one, among the devices
    with a global address; else that of Ethernet.
    """
    routed = default_devices(hops()) if routed is None else routed
    outward = (link for link in links() if not link.flags & IFF_LOOPBACK and not is_own(link))
    mtus = {link.index: u32(link.attributes[IFLA_MTU]) for link in outward}
    known = [mtus[number] for number in routed if number in mtus]
    known = known or [mtus[number] for number in _addressed_devices() if number in mtus]
    return min(known, default=DEFAULT_MTU)


def forwarding_enabled() -> bool:
    """Say whether the host stack forwards. Raises KernelError."""
    return sysctl.has("net/ipv4/ip_forward", "1") and (
        not sysctl.ipv6_present() or sysctl.has("net/ipv6/conf/all/forwarding", "1")
    )


def enable_forwarding() -> dict[str, sysctl.Change]:
    """Let the host stack forward between pods and the world; return what that changed. Raises KernelError."""
    changes = sysctl.ensure("net/ipv4/ip_forward", "1")
    if sysctl.ipv6_present():
        changes |= sysctl.keep_router_advertisements()
        changes |= sysctl.ensure("net/ipv6/conf/all/forwarding", "1")
    return changes


def is_own(link: Link) -> bool:
    """Say whether a device is the host end of a pod's veth pair, such a pod's shaper, or the tunnel."""
    alias = text(link.attributes.get(IFLA_IFALIAS, b""))
    is_marked = alias.startswith(ALIAS_PREFIX) or link.attributes.get(IFLA_ADDRESS, b"").hex(":") == OWN_MAC
    return is_marked and (link.name.startswith(NAME_PREFIX) or link.name == TUNNEL)


def links(*filters: tuple[str, object]) -> Iterator[Link]:
    """Yield the devices that pass the filters (attributes of a dump request). Raises KernelError."""
    wanted = [("IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS), *filters]
    for answer in dump(request("list devices", ifinfmsg, RTM_GETLINK, attributes=wanted)):
        if answer.type == RTM_NEWLINK:
            _, hardware, number, flags, _ = LINK.unpack_from(answer.body)
            yield Link(number, hardware, flags, attributes(answer.body, LINK.size))


def host_ends() -> Iterator[Link]:
    """Yield the host ends of podlane's veth pairs. Raises KernelError."""
    return own_links("veth")


def own_links(kind: str) -> Iterator[Link]:
    """Yield podlane's own devices of a kind: veth, or ifb (see `shaping`). Raises KernelError."""
    # ip link show type KIND
    wanted = {"attrs": [("IFLA_INFO_KIND", kind)]}
    return (link for link in links(("IFLA_LINKINFO", wanted)) if is_own(link))


def tunnel_index() -> int:
    """Return the index of the tunnel's device, 0 without one. Raises KernelError."""
    return next((link.index for link in own_links("vxlan") if link.name == TUNNEL), 0)


def default_devices(hops: Iterable[Hop]) -> set[int]:
    """Return the indexes of the devices to which default routes lead by these hops."""
    return {hop.device for hop in hops if hop.of_default}


def hops() -> list[Hop]:
    """Return the hops of the main table's routes, but those of podlane's own. Raises KernelError."""
    # ip route show table main; ip -6 route show table main. The kernel cannot leave podlane's out.
    found = []
    for family in FAMILY.values():
        fields = {"family": family, "table": RT_TABLE_MAIN, "type": RTN_UNICAST}
        for answer in dump_by(request("list routes", rtmsg, RTM_GETROUTE, fields=fields), _others_route):
            for device, way in _ways(attributes(answer.body, ROUTE.size)):
                found.append(Hop(device, _gateway(way), not answer.body[1]))
    return found


def _others_route(answer: Message) -> Message | None:
    if answer.body[5] in (PROTOCOL, PEER_PROTOCOL) and answer.body[1]:  # struct rtmsg: who has made it, and its length
        return None
    _, _, table, _, _, kind, _ = ROUTE.unpack_from(answer.body)
    return answer if (answer.type, table, kind) == (RTM_NEWROUTE, RT_TABLE_MAIN, RTN_UNICAST) else None


def _ways(route: dict[int, bytes]) -> Iterator[tuple[int, dict[int, bytes]]]:
    """Yield the index of each device that a route uses, with what else is said of that way."""
    if RTA_OIF in route:
        yield u32(route[RTA_OIF]), route
    ways, offset = route.get(RTA_MULTIPATH, b""), 0
    while offset + NEXTHOP.size <= len(ways):
        length, _, _, number = NEXTHOP.unpack_from(ways, offset)
        yield number, attributes(ways[offset : offset + length], NEXTHOP.size)
        offset += max(length, NEXTHOP.size)


def _gateway(way: dict[int, bytes]) -> Address | None:
    via = way.get(RTA_VIA, b"")[FAMILY_SIZE:]  # struct rtvia: family, then the address
    packed = way.get(RTA_GATEWAY) or via
    return ip_address(packed) if packed else None


def _addressed_devices() -> set[int]:
    # ip address show scope global
    found = set()
    for answer in dump(request("list addresses", ifaddrmsg, RTM_GETADDR)):
        if answer.type == RTM_NEWADDR:
            _, _, _, scope, number = ADDRESS.unpack_from(answer.body)
            if scope == RT_SCOPE_UNIVERSE:
                found.add(number)
    return found

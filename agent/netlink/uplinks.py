"""What leads out of the node: its uplinks, and the addresses that are the node itself."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pyroute2.netlink.rtnl import RTM_GETADDR, RTM_NEWADDR
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg

from agent.netlink.channel import attributes, dump, request
from agent.netlink.devices import TUNNEL, Hop, Link, default_devices, hops, host_ends, index, is_own, links
from agent.netlink.rtnl import ADDRESS, IFA_ADDRESS, IFA_LOCAL, IFLA_INFO_KIND, IFLA_LINKINFO, RT_SCOPE_UNIVERSE, text
from agent.state import Address, Network, Sources, Uplink

ARPHRD_ETHER = 1  # linux/if_arp.h; the programs read Ethernet frames
# Kinds of devices whose addresses do not make them lead out: what is behind them is on this node (containers of other
# networks, addresses of services), or in a tunnel that another device carries.
INWARD = {"bridge", "dummy", "vxlan", "geneve", "ifb"}
# linux/if_addr.h. Of IPv4, what is not a device's primary address; of IPv6, a temporary one (RFC 8981).
IFA_F_SECONDARY = 0x01
IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x08, 0x20, 0x40
UNFIT = IFA_F_SECONDARY | IFA_F_DADFAILED | IFA_F_DEPRECATED | IFA_F_TENTATIVE


@dataclass(frozen=True, slots=True)
class Assigned:
    """An address on a device, with its scope (RT_SCOPE_…) and flags (IFA_F_…)."""

    address: Address
    bits: int
    device: int
    scope: int
    flags: int
    far: Address
    """Of a point-to-point link, the other end's; else the address itself. The prefix is of this one."""


def uplinks(patterns: Collection[str] = (), ways: Sequence[Hop] | None = None) -> dict[str, Uplink]:
    """Return the devices that lead out, by name. Raises KernelError.

    With `patterns` (shell patterns of names): all Ethernet devices of those names. Else an Ethernet device leads out if
    a default route of the main table uses it (`ways` are all routes', if these are known), or if it has an address of
    global scope and is not of an inward kind. podlane's own devices never do.
    """
    addresses = list(assigned_addresses())
    ways = hops() if ways is None else ways
    routed = default_devices(ways)
    addressed = {each.device for each in addresses if each.scope == RT_SCOPE_UNIVERSE}

    def leads_out(link: Link) -> bool:
        if patterns:
            return any(fnmatchcase(link.name, pattern) for pattern in patterns)
        return link.index in routed or (link.index in addressed and _kind(link) not in INWARD)

    found = [link for link in links() if link.type == ARPHRD_ETHER and not is_own(link) and leads_out(link)]
    return {link.name: _uplink(link.index, addresses, ways) for link in found}


def node_addresses() -> frozenset[Address]:
    """Return all addresses on all devices, of whatever scope, but podlane's own. Raises KernelError."""
    found = set(assigned_addresses())
    tunnel = index(TUNNEL)
    return frozenset(each.address for each in found - on_host_ends(found) if each.device != tunnel)


def _uplink(number: int, addresses: list[Assigned], ways: Sequence[Hop]) -> Uplink:
    own = [each for each in addresses if each.device == number and each.scope == RT_SCOPE_UNIVERSE]
    gateways = frozenset(each.gateway for each in ways if each.device == number and each.gateway is not None)
    return Uplink(number, _sources(own), _networks(own), gateways)


def _sources(addresses: list[Assigned]) -> Sources:
    """Return the addresses that a host would rather use: the first fit one of each family, as the kernel lists them."""
    fit = [each.address for each in addresses if not each.flags & UNFIT]
    return Sources(
        ipv4=next((each for each in fit if isinstance(each, ipaddress.IPv4Address)), None),
        ipv6=next((each for each in fit if isinstance(each, ipaddress.IPv6Address)), None),
    )


def _networks(addresses: list[Assigned]) -> frozenset[Network]:
    """Return the prefixes whose addresses are on the device's own link."""
    return frozenset(ipaddress.ip_network((each.far, each.bits), strict=False) for each in addresses)


def _kind(link: Link) -> str:
    return text(attributes(link.attributes.get(IFLA_LINKINFO, b""), 0).get(IFLA_INFO_KIND, b""))


def assigned_addresses() -> Iterator[Assigned]:
    """Yield all addresses on all devices. Raises KernelError."""
    # ip address show
    for answer in dump(request("list addresses", ifaddrmsg, RTM_GETADDR)):
        if answer.type == RTM_NEWADDR:
            _, bits, flags, scope, device = ADDRESS.unpack_from(answer.body)
            given = attributes(answer.body, ADDRESS.size)
            far = ipaddress.ip_address(given[IFA_ADDRESS])
            address = ipaddress.ip_address(given[IFA_LOCAL]) if IFA_LOCAL in given else far
            yield Assigned(address, bits, device, scope, flags, far)


def on_host_ends(assigned: Iterable[Assigned]) -> set[Assigned]:
    """Return those that are podlane's own (see `addresses`). Raises KernelError."""
    alone = {each for each in assigned if each.bits == each.address.max_prefixlen}
    global_ = {each for each in alone if not (each.address.is_loopback or each.address.is_link_local)}
    own = {link.index for link in host_ends()} if global_ else set()
    return {each for each in global_ if each.device in own}

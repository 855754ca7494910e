"""The tunnel's device: one VXLAN device for all nodes that are not on-link (see `bpf/tunnel.h`)."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping

from pyroute2.netlink.rtnl import RTM_DELADDR, RTM_NEWADDR, RTM_NEWLINK, RTM_SETLINK
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_NOARP, IFF_UP, ifinfmsg

from agent.netlink import sysctl
from agent.netlink.addresses import FOREVER, IFA_F_NODAD, IFA_F_NOPREFIXROUTE
from agent.netlink.channel import Request, attributes, errno_of, perform, request
from agent.netlink.devices import ALIAS_PREFIX, TUNNEL, Link, delete_device, index, links, own_links
from agent.netlink.pods import set_link, up
from agent.netlink.rtnl import (
    ADD,
    FAMILY,
    IFLA_ADDRESS,
    IFLA_IFALIAS,
    IFLA_INFO_DATA,
    IFLA_LINKINFO,
    IFLA_MTU,
    IFLA_VXLAN_COLLECT_METADATA,
    IFLA_VXLAN_LEARNING,
    IFLA_VXLAN_PORT,
    PUT,
    RT_SCOPE_UNIVERSE,
    u32,
)
from agent.netlink.uplinks import assigned_addresses
from agent.state import Address, KernelError, TunnelDevice

_ALIAS = f"{ALIAS_PREFIX}tunnel"
_OF_VXLAN = ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "vxlan")]})


class TunnelDeviceTable:
    """`Table[str, TunnelDevice]`: podlane's own VXLAN device, by its name. `mac` is what it has on all nodes."""

    def __init__(self, mac: str) -> None:
        self._mac = mac

    def read(self) -> dict[str, TunnelDevice]:
        """Return what there is. Raises KernelError."""
        return {link.name: self._read(link) for link in own_links("vxlan") if link.name == TUNNEL}

    def upsert(self, items: Mapping[str, TunnelDevice]) -> dict[str, KernelError]:
        """Make the device, or change it; what cannot be changed is made anew. Return the failures."""
        failures: dict[str, KernelError] = {}
        for name, wanted in items.items():
            try:
                self._put(wanted, self.read().get(name))
            except KernelError as error:
                failures[name] = error
        return failures

    def delete(self, keys: Iterable[str]) -> dict[str, KernelError]:
        """Delete the device; one that is already gone counts as deleted. Return the failures."""
        failures: dict[str, KernelError] = {}
        for name in keys:
            try:
                delete_device(name)
            except KernelError as error:
                failures[name] = error
        return failures

    def _read(self, link: Link) -> TunnelDevice:
        data = _data(link)
        flags = {key: bool(data.get(key, b"\0")[0]) for key in (IFLA_VXLAN_COLLECT_METADATA, IFLA_VXLAN_LEARNING)}
        sound = (
            flags == {IFLA_VXLAN_COLLECT_METADATA: True, IFLA_VXLAN_LEARNING: False}
            and link.attributes.get(IFLA_ADDRESS, b"").hex(":") == self._mac
            and link.flags & (IFF_UP | IFF_NOARP) == IFF_UP | IFF_NOARP
        )
        return TunnelDevice(_port(link), u32(link.attributes[IFLA_MTU]), _addresses(link.index), sound)

    def _put(self, wanted: TunnelDevice, found: TunnelDevice | None) -> None:
        if found is None or not found.sound or found.port != wanted.port:
            if found is not None:
                delete_device(TUNNEL)
            self._make(wanted)
            found = TunnelDevice(wanted.port, wanted.mtu)
        number = index(TUNNEL)
        if number is None:
            raise KernelError(f"set up {TUNNEL}: it is gone")
        perform(
            [
                *(_delete_address(number, address) for address in sorted(found.addresses - wanted.addresses, key=str)),
                *(_add_address(number, address) for address in sorted(wanted.addresses - found.addresses, key=str)),
                *([_set_mtu(wanted.mtu)] if found.mtu != wanted.mtu else []),
            ]
        )

    def _make(self, wanted: TunnelDevice) -> None:
        # ip link add podlane.vx mtu MTU address MAC type vxlan external nolearning dstport PORT
        options = [
            ("IFLA_VXLAN_COLLECT_METADATA", 1),
            ("IFLA_VXLAN_LEARNING", 0),
            ("IFLA_VXLAN_PORT", wanted.port),
        ]
        kind = {"attrs": [("IFLA_INFO_KIND", "vxlan"), ("IFLA_INFO_DATA", {"attrs": options})]}
        values = [
            ("IFLA_IFNAME", TUNNEL),
            ("IFLA_ADDRESS", self._mac),
            ("IFLA_MTU", wanted.mtu),
            ("IFLA_LINKINFO", kind),
        ]
        try:
            perform([request(f"create {TUNNEL}", ifinfmsg, RTM_NEWLINK, ADD, attributes=values)])
        except KernelError as error:
            if errno_of(error) == errno.EEXIST and index(TUNNEL) is None:  # another of its kind has the port
                raise _port_in_use(wanted.port) from error
            raise
        try:
            perform([set_link(TUNNEL, wanted.mtu, [(IFLA_IFALIAS, _ALIAS)]), _without_arp()])
            _prepare()
            perform([up(TUNNEL)])
        except KernelError as error:
            delete_device(TUNNEL)
            if errno_of(error) == errno.EADDRINUSE:
                raise _port_in_use(wanted.port) from error
            raise


def _port_in_use(port: int) -> KernelError:
    """Return the error that says who has the port, as far as the kernel tells, and what to do."""
    holders = ", ".join(link.name for link in links(_OF_VXLAN) if link.name != TUNNEL and _port(link) == port)
    by = f"the device {holders}" if holders else "a program, which `ss -ulnp` on the node names"
    advice = "free it, or give podlane another tunnel.port on all nodes"
    return KernelError(f"set {TUNNEL} up: UDP port {port} is in use, by {by}: {advice}")


def _port(link: Link) -> int:
    return int.from_bytes(_data(link).get(IFLA_VXLAN_PORT, b""), "big")


def _data(link: Link) -> dict[int, bytes]:
    return attributes(attributes(link.attributes[IFLA_LINKINFO], 0).get(IFLA_INFO_DATA, b""), 0)


def _prepare() -> None:
    """Let the host stack forward there, whatever the node's defaults are; packets may come back another way."""
    sysctl.ensure(f"net/ipv4/conf/{TUNNEL}/forwarding", "1")
    sysctl.ensure(f"net/ipv4/conf/{TUNNEL}/rp_filter", "2")
    if sysctl.ipv6_present():
        sysctl.ensure(f"net/ipv6/conf/{TUNNEL}/disable_ipv6", "0")
        sysctl.ensure(f"net/ipv6/conf/{TUNNEL}/accept_ra", "0")
        sysctl.ensure(f"net/ipv6/conf/{TUNNEL}/forwarding", "1")


def _addresses(number: int) -> frozenset[Address]:
    return frozenset(
        each.address for each in assigned_addresses() if each.device == number and each.scope == RT_SCOPE_UNIVERSE
    )


def _without_arp() -> Request:
    # ip link set podlane.vx arp off
    flags = {"flags": IFF_NOARP, "change": IFF_NOARP}
    what = f"set {TUNNEL} to do without ARP"
    return request(what, ifinfmsg, RTM_SETLINK, fields=flags, attributes=[("IFLA_IFNAME", TUNNEL)])


def _set_mtu(mtu: int) -> Request:
    # ip link set podlane.vx mtu MTU
    what = f"set the MTU of {TUNNEL} to {mtu}"
    return request(what, ifinfmsg, RTM_SETLINK, attributes=[("IFLA_IFNAME", TUNNEL), ("IFLA_MTU", mtu)])


def _add_address(number: int, address: Address) -> Request:
    # ip address replace ADDRESS dev podlane.vx [nodad noprefixroute]
    entry: list[tuple[str, object]] = [("IFA_LOCAL", str(address)), ("IFA_ADDRESS", str(address))]
    if address.version == 6:
        times = {"ifa_preferred": FOREVER, "ifa_valid": FOREVER, "cstamp": 0, "tstamp": 0}
        entry += [("IFA_CACHEINFO", times), ("IFA_FLAGS", IFA_F_NODAD | IFA_F_NOPREFIXROUTE)]
    what = f"add address {address} to {TUNNEL}"
    return request(what, ifaddrmsg, RTM_NEWADDR, PUT, fields=_fields(number, address), attributes=entry)


def _delete_address(number: int, address: Address) -> Request:
    # ip address delete ADDRESS dev podlane.vx
    gone = (errno.ENODEV, errno.EADDRNOTAVAIL)
    entry = [("IFA_LOCAL", str(address))]
    what = f"delete address {address} from {TUNNEL}"
    return request(what, ifaddrmsg, RTM_DELADDR, fields=_fields(number, address), attributes=entry, tolerated=gone)


def _fields(number: int, address: Address) -> dict[str, int]:
    return {
        "family": FAMILY[address.version],
        "prefixlen": address.max_prefixlen,
        "index": number,
        "scope": RT_SCOPE_UNIVERSE,
    }

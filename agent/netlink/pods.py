"""Wiring one pod: the veth pair, its host end, and everything inside the pod's network namespace."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv6Address
from pathlib import Path

from pyroute2.netlink.rtnl import RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_SETLINK
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import IFF_UP, ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import NUD_PERMANENT, ndmsg

from agent.netlink import sysctl
from agent.netlink.channel import Request, errno_of, execute, perform, request
from agent.netlink.devices import delete_device, index
from agent.netlink.netns import in_netns
from agent.netlink.routing import DEFAULT_ROUTES, Routing, delete_rule, raise_first
from agent.netlink.rtnl import ADD, FAMILY, PUT, RT_SCOPE_LINK, RT_SCOPE_UNIVERSE
from agent.state import Address, KernelError
from cni.result import Route

IPV6_MIN_MTU = 1280  # bytes, RFC 8200 section 5; the kernel keeps IPv6 off devices below it
IN6_ADDR_GEN_MODE_NONE = 1
IFA_F_NODAD = 0x02
RTF_LOCAL = 0x80000000  # linux/ipv6_route.h
LOCAL_ROUTES = Path("/proc/thread-self/net/ipv6_route")
_LOCAL_ROUTE_SECONDS = 5.0


class InterfaceExists(KernelError):
    """The pod already has an interface of that name."""


def create_pair(host: str, host_mac: str, pod: str, pod_mac: str, mtu: int, alias: str, netns: int) -> int:
    """Create a veth pair, `pod` in the given namespace and `host` in ours, both down; return `host`'s index.

    The MAC addresses are set at creation: systemd-udevd rewrites only those that the kernel made up. `alias`
    is how a restarted agent recognises the device as its own (see `devices`). Raises InterfaceExists if the
    pod has that interface already, else KernelError; either way nothing is left behind.
    """
    what = f"create veth {host} with {pod} in the pod"
    # ip link add HOST address MAC mtu MTU type veth peer name POD netns NETNS address MAC mtu MTU
    peer = [*_identity(pod, pod_mac, mtu), ("IFLA_NET_NS_FD", netns)]
    data = {"attrs": [("VETH_INFO_PEER", {"attrs": peer})]}
    kind = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", data)]}
    ends = [*_identity(host, host_mac, mtu), ("IFLA_LINKINFO", kind)]
    try:
        perform([request(what, ifinfmsg, RTM_NEWLINK, ADD, attributes=ends)])
    except KernelError as error:
        if errno_of(error) == errno.EEXIST and in_netns(netns, lambda: index(pod)):
            raise InterfaceExists(f"{what}: the pod already has an interface {pod}") from error
        raise
    try:
        # Not in one batch with the above: were the name taken, this would change a device that is not ours.
        perform([set_link(host, mtu, [("IFLA_IFALIAS", alias)])])
        return _index(host)
    except KernelError:
        delete_device(host)
        raise


def raise_host(host: str, *, ipv6: bool = True) -> None:
    """Set the host end of a veth pair up, ready to route. Raises KernelError.

    With `ipv6`, also if the node has it switched off by default. A pod's router advertisements are not heard.
    """
    sysctl.ensure(f"net/ipv4/conf/{host}/forwarding", "1")
    if ipv6:
        sysctl.ensure(f"net/ipv6/conf/{host}/disable_ipv6", "0")
        sysctl.ensure(f"net/ipv6/conf/{host}/accept_ra", "0")
        sysctl.ensure(f"net/ipv6/conf/{host}/forwarding", "1")
    perform([up(host)])


def configure_pod(
    netns: int,
    pod: str,
    addresses: Sequence[Address],
    link_local: IPv6Address | None,
    host_mac: str,
    mtu: int,
    gateways: Mapping[int, Address],
    routes: Sequence[Route] | None = None,
) -> tuple[Route, ...]:
    """Give a pod's interface its addresses, neighbours and routes, and set it up; return the routes as they are.

    `addresses` become /32 and /128. For each family among them, `gateways` (by IP version) names the
    link-local address that stands for the node: a permanent neighbour at `host_mac`, and the next hop of every
    route. `routes` are those that the pod gets beside the ones to its gateways, None means a default route of each
    family. Those that the pod has already, from another attachment, stay in front (see `routing`).
    `link_local` is the interface's own fe80:: address, for a pod with IPv6 addresses. `mtu` is that of the
    interface, in bytes. Raises KernelError.
    """
    versions = sorted({address.version for address in addresses})
    hops = [gateways[version] for version in versions]
    if routes is None:
        routes = [Route(DEFAULT_ROUTES[hop.version], gw=hop) for hop in hops]

    def work() -> tuple[Route, ...]:
        number = _index(pod)
        if 6 in versions:
            _enable_ipv6(pod)
        requests = [set_link(pod, mtu, []), up(pod)]
        requests += [_add_address(number, address, address.max_prefixlen) for address in addresses]
        if link_local and 6 in versions:
            requests.append(_add_address(number, link_local, 64))
        requests += [_add_neighbour(number, hop, host_mac) for hop in hops]
        routing = Routing(number, addresses, gateways)
        failures = execute([*requests, *routing.requests(routes)])
        raise_first(failures[: len(requests)])
        made = routing.settle(routes, failures[len(requests) :])
        _wait_until_received([address for address in addresses if address.version == 6])
        return made

    return in_netns(netns, work)


def introduce_node(netns: int, pod: str, gateways: Iterable[Address], host_mac: str) -> None:
    """Make the pod's neighbours for its `gateways`, which the kernel forgets when the pod's MAC address changes.

    Even permanent ones (net/core/neighbour.c, neigh_changeaddr). Raises KernelError.
    """
    in_netns(netns, lambda: perform([_add_neighbour(_index(pod), hop, host_mac) for hop in gateways]))


def forget_pod(netns: int, addresses: Iterable[Address]) -> None:
    """Remove what an interface with these addresses leaves behind in its namespace: rules. Raises KernelError."""
    in_netns(netns, lambda: perform([delete_rule(address) for address in addresses]))


def _index(name: str) -> int:
    number = index(name)
    if number is None:
        raise KernelError(f"set up {name}: there is no such device")
    return number


def _wait_until_received(addresses: Sequence[Address]) -> None:
    """Wait for the kernel to accept packets to these IPv6 addresses. Raises KernelError.

    It makes their local routes in a work queue, even without DAD (net/ipv6/addrconf.c, addrconf_dad_work): some 0.1 ms
    after the address itself, and more on a busy machine. Until then it drops what comes, and the address looks as ever.
    """
    missing = {address.packed.hex() for address in addresses}
    deadline = time.monotonic() + _LOCAL_ROUTE_SECONDS
    while missing:
        routes = LOCAL_ROUTES.read_text().splitlines()
        missing -= {line[:32] for line in routes if int(line.split()[8], 16) & RTF_LOCAL}
        if missing and time.monotonic() > deadline:
            raise KernelError(f"no local route to {', '.join(map(str, addresses))} after {_LOCAL_ROUTE_SECONDS:g} s")
        if missing:
            time.sleep(0.0001)


def _identity(name: str, mac: str, mtu: int) -> list[tuple[str, object]]:
    return [("IFLA_IFNAME", name), ("IFLA_ADDRESS", mac), ("IFLA_MTU", mtu)]


def set_link(name: str, mtu: int, values: Sequence[tuple[str, object]]) -> Request:
    """Return a request to set attributes of a device that is down.

    The kernel shall not make up a link-local address for it.
    """
    # ip link set NAME addrgenmode none
    if mtu >= IPV6_MIN_MTU and sysctl.ipv6_present():
        mode = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]}
        values = [*values, ("IFLA_AF_SPEC", {"attrs": [("AF_INET6", mode)]})]
    return request(f"set up {name}", ifinfmsg, RTM_SETLINK, attributes=[("IFLA_IFNAME", name), *values])


def up(name: str) -> Request:
    """Return a request to set a device up."""
    # ip link set NAME up
    flags = {"flags": IFF_UP, "change": IFF_UP}
    return request(f"set {name} up", ifinfmsg, RTM_SETLINK, fields=flags, attributes=[("IFLA_IFNAME", name)])


def _enable_ipv6(pod: str) -> None:
    for device in ("lo", pod):  # lo too: a pod's packets to itself go through it
        sysctl.ensure(f"net/ipv6/conf/{device}/disable_ipv6", "0")
    # Its routes are set below: it need not solicit routers, and must not believe any.
    sysctl.ensure(f"net/ipv6/conf/{pod}/accept_ra", "0")


def _add_address(number: int, address: Address, bits: int) -> Request:
    # ip address add ADDRESS/BITS dev POD nodad
    flags = IFA_F_NODAD if address.version == 6 else 0
    scope = RT_SCOPE_LINK if address.is_link_local else RT_SCOPE_UNIVERSE
    fields = {
        "family": FAMILY[address.version],
        "prefixlen": bits,
        "index": number,
        "flags": flags,
        "scope": scope,
    }
    value = str(address)
    what = f"add address {value}/{bits} in the pod"
    return request(
        what,
        ifaddrmsg,
        RTM_NEWADDR,
        ADD,
        fields=fields,
        attributes=[("IFA_LOCAL", value), ("IFA_ADDRESS", value)],
    )


def _add_neighbour(number: int, gateway: Address, mac: str) -> Request:
    # ip neighbour replace GATEWAY lladdr MAC dev POD nud permanent
    fields = {"family": FAMILY[gateway.version], "ifindex": number, "state": NUD_PERMANENT}
    what = f"add neighbour {gateway} in the pod"
    entry = [("NDA_DST", str(gateway)), ("NDA_LLADDR", mac)]
    return request(what, ndmsg, RTM_NEWNEIGH, PUT, fields=fields, attributes=entry)

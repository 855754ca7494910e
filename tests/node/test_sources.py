"""Under which of its addresses a node masquerades: as it would choose for itself."""

from __future__ import annotations

import struct

import pytest

from tests.node.echo import TCP, UDP, client, server
from tests.node.internet import (
    join,
)
from tests.node.machine import Machine, Netns, machine

V4, V6 = 0, 1
ANYWHERE = ("0.0.0.0", "::")  # noqa: S104
SERVICE = ("10.96.0.20", "fd00:10:96::20")
BIGGEST = (65507, 65487)  # bytes of a datagram: 64 KB less the headers of UDP and IPv4; IPv6: and those of fragments
# linux/in.h, linux/in6.h, linux/errqueue.h
IP_RECVERR, IPV6_RECVERR = 11, 25
EXTENDED_ERROR = struct.Struct("=IBBBBII")

families = pytest.mark.parametrize("family", [V4, V6])
kinds = pytest.mark.parametrize("kind", [TCP, UDP])


def test_many_uplinks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A node with two uplinks, several addresses and routes by policy masquerades as it chooses for itself.

    cilium#41866, #40705: several addresses, #17463: one on the loopback device, #19497, #39806: policy routing.
    """
    with machine(tmp_path_factory.mktemp("node")) as node:
        ways = two_uplinks(node)
        node.start_agent()
        pod = node.make_pod("a")
        for destination, (world, expected) in ways.items():
            with server(world, UDP, destination, 7) as far:
                for netns in (node.netns, pod.netns):
                    with client(netns, far) as it:
                        assert it.ask()[0] == expected, destination


def two_uplinks(node: Machine) -> dict[str, tuple[Netns, str]]:
    """Give a node two uplinks; return by destination where that is, and from which address the node goes there."""
    first, second = node.add_uplink(), node.add_netns("second")
    join(node.netns, second, "other", ("192.0.3.10/24", "2001:db8:33::10/64"), ("192.0.3.1/24", "2001:db8:33::1/64"))
    for device, address in (("uplink", "192.0.2.11/24"), ("uplink", "192.0.2.12/32"), ("other", "192.0.3.11/24")):
        node.netns.run("ip", "address", "add", address, "dev", device)
    for netns, command in (
        (node.netns, "address add 192.0.4.10/32 dev lo"),
        (first, "route add 192.0.4.10 via 192.0.2.10"),
    ):
        netns.run("ip", *command.split())
    for command in (
        "route add 203.0.113.0/24 via 192.0.2.1 src 192.0.2.12",
        "route add 203.0.113.2 via 192.0.2.1 src 192.0.4.10",
        "route add default via 192.0.3.1 table 100",
        "route add 198.51.100.64/26 via 192.0.3.1 src 192.0.3.11 table 100",
        "rule add to 198.51.100.0/24 table 100",
        "-6 route add default via 2001:db8:33::1 table 100",
        "-6 rule add to 2001:db8:f::/48 table 100",
    ):
        node.netns.run("ip", *command.split())
    ways = {
        "203.0.113.1": (first, "192.0.2.12"),
        "203.0.113.2": (first, "192.0.4.10"),
        "192.0.2.1": (first, "192.0.2.10"),
        "8.8.8.8": (first, "192.0.2.10"),
        "2001:db8:8::8": (first, "2001:db8::10"),
        "198.51.100.1": (second, "192.0.3.10"),
        "198.51.100.65": (second, "192.0.3.11"),
        "2001:db8:f::1": (second, "2001:db8:33::10"),
    }
    for destination, (world, _) in ways.items():
        if destination != "192.0.2.1":
            length = "128" if ":" in destination else "32"
            world.run("ip", "address", "add", f"{destination}/{length}", "dev", "lo")
    return ways

"""Which devices lead out, and which addresses are the node's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from agent import netlink
from agent.cluster import Cluster
from agent.config import Config
from agent.netlink.rtnl import PEER_PROTOCOL, PROTOCOL
from agent.state import Sources, Uplink
from agent.surroundings import Surroundings
from agent.wiring import HOST_MAC
from tests.node.namespaces import fresh_netns, run


@pytest.fixture(autouse=True)
def netns() -> Iterator[None]:
    """Run the test in a namespace with two pairs of devices: eth0 and eth1 are what they are to a node."""
    with fresh_netns():
        for number in (0, 1):
            run(f"ip link add eth{number} type veth peer name far{number}")
            run(f"ip link set far{number} up")
            run(f"ip link set eth{number} up addrgenmode none")
        yield


def number(device: str) -> int:
    """Return a device's index."""
    index = netlink.index(device)
    assert index is not None
    return index


def address(text: str, device: str) -> None:
    """Give a device an address, ready for use."""
    run(f"ip address add {text} dev {device}" + (" nodad" if ":" in text else ""))


def bridge(name: str) -> None:
    """Make a bridge, as other networks have for their containers, with an address."""
    run(f"ip link add {name} type bridge")
    run(f"ip link set {name} up addrgenmode none")
    address("172.17.0.1/16", name)


def test_no_uplinks() -> None:
    """Devices without global addresses and default routes lead nowhere."""
    run("ip address add 169.254.7.7/16 dev eth0 scope link")
    address("fe80::7/64", "eth1")
    assert netlink.uplinks() == {}


def test_addresses_make_uplinks() -> None:
    """Devices with an address of global scope lead out, under the first of each family."""
    address("192.0.2.10/24", "eth0")
    address("192.0.2.11/24", "eth0")
    address("198.51.100.1/24", "eth0")
    address("2001:db8::10/64", "eth1")
    networks = [frozenset(map(ip_network, each)) for each in (("192.0.2.0/24", "198.51.100.0/24"), ("2001:db8::/64",))]
    assert netlink.uplinks() == {
        "eth0": Uplink(number("eth0"), Sources(IPv4Address("192.0.2.10"), None), networks[0]),
        "eth1": Uplink(number("eth1"), Sources(None, IPv6Address("2001:db8::10")), networks[1]),
    }


def test_networks_of_an_uplink() -> None:
    """On-link is what the prefixes of its global addresses hold: of a point-to-point link, the other end's."""
    address("192.0.2.10 peer 198.51.100.0/30", "eth0")
    run("ip address add 169.254.7.7/16 dev eth0 scope link")
    assert netlink.uplinks()["eth0"].networks == {ip_network("198.51.100.0/30")}


def test_gateways_of_an_uplink() -> None:
    """These are the next hops of all routes by it, of either family, but not of podlane's own to other nodes' pods."""
    address("192.0.2.10/24", "eth0")
    address("2001:db8::10/64", "eth0")
    address("203.0.113.10/24", "eth1")
    run("ip route add default via 192.0.2.1")
    run("ip route add 198.51.100.0/24 nexthop via 192.0.2.2 nexthop via 203.0.113.1")
    run("ip route add 198.51.101.0/24 via inet6 2001:db8::3 dev eth0")
    run("ip -6 route add 2001:db8:1::/64 via 2001:db8::4")
    for number, protocol in enumerate((PROTOCOL, PEER_PROTOCOL)):
        run(f"ip route add 10.244.{number}.0/24 via 192.0.2.5 proto {protocol}")
    found = {name: {str(each) for each in uplink.gateways} for name, uplink in netlink.uplinks().items()}
    assert found == {"eth0": {"192.0.2.1", "192.0.2.2", "2001:db8::3", "2001:db8::4"}, "eth1": {"203.0.113.1"}}


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_default_routes_make_uplinks(family: str) -> None:
    """A device that a default route uses leads out, also as one of several next hops, and without an address."""
    gateways = {"-4": ("192.0.2.1", "192.0.2.2"), "-6": ("fe80::1", "fe80::2")}[family]
    hops = [f"nexthop via {gateway} dev eth{number} onlink" for number, gateway in enumerate(gateways)]
    run(f"ip {family} route add default {' '.join(hops)}")
    assert netlink.uplinks().keys() == {"eth0", "eth1"}
    assert netlink.uplinks()["eth0"].sources == Sources(None, None)


def test_bridges_of_other_networks() -> None:
    """A bridge with an address does not lead out, but one that has the default route does."""
    bridge("docker0")
    bridge("br0")
    run("ip route add default dev br0")
    assert netlink.uplinks().keys() == {"br0"}


def test_not_podlanes_own() -> None:
    """The host end of a pod's pair never leads out, whatever addresses and routes it has."""
    run("ip link add plone type veth peer name podpeer")
    run("ip link set plone alias podlane:test/one/eth0")
    run("ip link set plone up")
    address("192.0.2.10/24", "plone")
    run("ip route add default dev plone")
    assert netlink.uplinks() == {}
    assert netlink.uplinks(["pl*"]) == {}


def test_loopback_is_no_uplink() -> None:
    """Global addresses on the loopback device do not make it one, nor does its name among the patterns."""
    address("192.0.2.10/32", "lo")
    assert netlink.uplinks() == {}
    assert netlink.uplinks(["*"]).keys() == {"eth0", "eth1", "far0", "far1"}


def test_patterns_decide_alone() -> None:
    """With patterns, devices of those names lead out, and no others."""
    address("192.0.2.10/24", "eth0")
    run("ip route add default dev eth0")
    bridge("br0")
    assert netlink.uplinks(["eth1", "br?"]).keys() == {"eth1", "br0"}
    assert netlink.uplinks(["ETH*"]) == {}


def test_unfit_addresses() -> None:
    """Deprecated addresses and those whose uniqueness is not proved are not used to go out."""
    run("ip address add 2001:db8::1/64 dev eth0 preferred_lft 0 nodad")
    address("2001:db8::2/64", "eth0")
    assert netlink.uplinks()["eth0"].sources.ipv6 == ip_address("2001:db8::2")


def test_point_to_point_address() -> None:
    """Of an address with a peer, the device's own part is the node's."""
    run("ip address add 192.0.2.10 peer 192.0.2.20/32 dev eth0")
    assert netlink.uplinks()["eth0"].sources.ipv4 == ip_address("192.0.2.10")
    assert ip_address("192.0.2.20") not in netlink.node_addresses()


def test_node_addresses() -> None:
    """All addresses of all devices are the node's, whatever their scope."""
    bridge("br0")
    address("192.0.2.10/24", "eth0")
    address("2001:db8::10/64", "eth0")
    address("fe80::7/64", "eth1")
    shown = json.loads(run("ip -json address"))
    expected = {ip_address(each["local"]) for link in shown for each in link["addr_info"]}
    assert netlink.node_addresses() == expected
    assert {ip_address(each) for each in ("127.0.0.1", "::1", "172.17.0.1", "fe80::7")} < expected


def test_reserved_ports() -> None:
    """Ports are reserved once, beside those that somebody else has reserved."""
    assert netlink.reserve_ports(50000, 60000)
    assert not netlink.reserve_ports(50000, 60000)
    assert netlink.reserve_ports(8080, 8080)
    assert run("sysctl -n net.ipv4.ip_local_reserved_ports").strip() == "8080,50000-60000"


def test_mtu_of_new_pods() -> None:
    """It is the uplink's before the first look around, and from then on what the last look saw, or as configured."""
    address("192.0.2.1/24", "eth0")
    run("ip link set eth0 mtu 1400")
    around = Surroundings(Config(), HOST_MAC)
    assert around.mtu() == 1400
    around.outside(Cluster(), ())
    run("ip link set eth0 mtu 1300")
    assert around.mtu() == 1400
    assert around.outside(Cluster(), ()).mtu == 1300
    assert (around.mtu(), Surroundings(Config(mtu=9000), HOST_MAC).mtu()) == (1300, 9000)

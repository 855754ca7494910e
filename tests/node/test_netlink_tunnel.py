"""The tunnel's device and the routes to other nodes, in a namespace of the test's own."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent import netlink
from agent.state import HostRoute, PeerRoute, Prefix, TunnelDevice
from agent.wiring import HOST_MAC
from tests.node.namespaces import ip, run, two_host_ends
from tests.support import prefix

pytestmark = pytest.mark.root

NAME = "podlane.vx"
OWN = frozenset(map(ip_address, ("192.0.2.10", "2001:db8::10")))
DEVICE = TunnelDevice(4789, 1450, OWN)
NEAR, NEAR6 = ip_address("192.0.2.1"), ip_address("2001:db8::1")
V4, V6 = prefix("10.244.7.0/24"), prefix("fd00:7::/64")


@pytest.fixture(autouse=True)
def uplink() -> Iterator[int]:
    """Run the test on a host of its own, with the uplink eth0; yield its index."""
    with two_host_ends():
        run("ip link add eth0 type veth peer name far0")
        for device in ("eth0", "far0"):
            run(f"ip link set {device} up")
        run("ip address add 192.0.2.10/24 dev eth0")
        run("ip address add 2001:db8::10/64 dev eth0 nodad")
        number = netlink.index("eth0")
        assert number
        yield number


@pytest.fixture
def table() -> netlink.TunnelDeviceTable:
    """Return the table of devices."""
    return netlink.TunnelDeviceTable(HOST_MAC)


class TestDevice:
    """TunnelDeviceTable."""

    def test_made_and_deleted(self, table: netlink.TunnelDeviceTable) -> None:
        """It is made as it was asked for, and deleted; deleting it twice is fine."""
        assert table.read() == {}
        assert table.upsert({NAME: DEVICE}) == {}
        assert table.read() == {NAME: DEVICE}
        assert netlink.tunnel_index() == netlink.index(NAME)
        (device,) = ip(f"link show {NAME}")
        assert (device["mtu"], device["address"], device["ifalias"]) == (1450, HOST_MAC, "podlane:tunnel")
        assert {"UP", "NOARP"} <= set(device["flags"])
        data = device["linkinfo"]["info_data"]
        assert (data["external"], data["learning"], data["port"]) == (True, False, 4789)
        assert table.delete([NAME]) == {}
        assert table.delete([NAME]) == {}
        assert table.read() == {}
        assert netlink.tunnel_index() == 0

    def test_ready_to_route(self, table: netlink.TunnelDeviceTable) -> None:
        """It forwards whatever the defaults are, hears no router advertisements, and takes answers by another way."""
        table.upsert({NAME: DEVICE})
        settings = {
            "ipv4": {"forwarding": "1", "rp_filter": "2"},
            "ipv6": {"forwarding": "1", "accept_ra": "0", "disable_ipv6": "0"},
        }
        for family, wanted in settings.items():
            for name, value in wanted.items():
                assert Path(f"/proc/sys/net/{family}/conf/{NAME}/{name}").read_text().strip() == value, name

    def test_changed_in_place(self, table: netlink.TunnelDeviceTable) -> None:
        """MTU and addresses change without a new device."""
        table.upsert({NAME: DEVICE})
        number = netlink.index(NAME)
        for changed in (
            replace(DEVICE, mtu=1400),
            replace(DEVICE, addresses=frozenset({ip_address("192.0.2.11"), ip_address("2001:db8::11")})),
            replace(DEVICE, addresses=frozenset()),
        ):
            assert table.upsert({NAME: changed}) == {}
            assert table.read() == {NAME: changed}
        assert netlink.index(NAME) == number

    def test_made_anew(self, table: netlink.TunnelDeviceTable) -> None:
        """What cannot be changed in place, or is not as podlane makes it, leads to a new device."""
        table.upsert({NAME: DEVICE})
        assert table.upsert({NAME: replace(DEVICE, port=4790)}) == {}
        assert table.read() == {NAME: replace(DEVICE, port=4790)}
        for harm in ("down", "address 02:00:00:00:00:07", "arp on"):
            run(f"ip link set {NAME} {harm}")
            assert not table.read()[NAME].sound
            assert table.upsert({NAME: DEVICE}) == {}
            assert table.read() == {NAME: DEVICE}

    def test_port_in_use(self, table: netlink.TunnelDeviceTable) -> None:
        """If a program has the port, the failure says which port, and how to find the program; nothing is left."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", 4789))
            failures = table.upsert({NAME: DEVICE})
        assert "UDP port 4789 is in use, by a program, which `ss -ulnp` on the node names" in str(failures[NAME])
        assert netlink.index(NAME) is None

    @pytest.mark.parametrize("kind", ["id 5", "external"])
    def test_port_of_another_tunnel(self, table: netlink.TunnelDeviceTable, kind: str) -> None:
        """If another tunnel of the kernel's has it, of whatever kind, the failure names the device."""
        run(f"ip link add other up type vxlan {kind} dstport 4789 local 192.0.2.10")
        run("ip link add harmless up type vxlan id 6 dstport 4790")
        failures = table.upsert({NAME: DEVICE})
        assert "UDP port 4789 is in use, by the device other: " in str(failures[NAME])
        assert netlink.index(NAME) is None

    def test_its_maker_was_killed(self, table: netlink.TunnelDeviceTable) -> None:
        """A device that was made, and no more, when an agent was killed is podlane's, and not yet as it should be."""
        run(f"ip link add {NAME} address {HOST_MAC} type vxlan external nolearning dstport 4789")
        assert not table.read()[NAME].sound
        assert netlink.own_devices()[-1] == NAME
        assert table.upsert({NAME: DEVICE}) == {}
        assert table.read() == {NAME: DEVICE}

    def test_others_are_left_alone(self, table: netlink.TunnelDeviceTable) -> None:
        """A device of that name that is not podlane's is neither used nor changed."""
        run(f"ip link add {NAME} type vxlan external")
        assert table.read() == {}
        assert netlink.tunnel_index() == 0
        assert NAME in table.upsert({NAME: DEVICE})
        assert netlink.index(NAME)

    def test_its_addresses_are_no_uplinks(self, table: netlink.TunnelDeviceTable) -> None:
        """It leads nowhere by itself, and its addresses are the node's only where other devices have them, too."""
        table.upsert({NAME: replace(DEVICE, addresses=frozenset({ip_address("192.0.2.10"), ip_address("192.0.2.99")}))})
        assert NAME not in netlink.uplinks(["*"])
        assert ip_address("192.0.2.10") in netlink.node_addresses()
        assert ip_address("192.0.2.99") not in netlink.node_addresses()


class TestPeerRoutes:
    """PeerRouteTable."""

    def test_direct(self, uplink: int) -> None:
        """Routes by a next hop are read as they were written, IPv4 by way of IPv6 among them, and deleted."""
        routes = netlink.PeerRouteTable()
        wanted: dict[Prefix, PeerRoute] = {
            V4: PeerRoute(uplink, NEAR),
            V6: PeerRoute(uplink, NEAR6),
            prefix("10.244.8.0/24"): PeerRoute(uplink, NEAR6),
        }
        assert routes.upsert(wanted) == {}
        assert routes.read() == wanted
        assert run("ip route show 10.244.8.0/24 proto 111").strip() == "10.244.8.0/24 via inet6 2001:db8::1 dev eth0"
        assert routes.delete(wanted) == {}
        assert routes.delete(wanted) == {}
        assert routes.read() == {}

    def test_of_an_earlier_agent(self, table: netlink.TunnelDeviceTable, uplink: int) -> None:
        """Those that an earlier agent made under the number of routes to pods are taken over; pods' own are not."""
        table.upsert({NAME: DEVICE})
        run("ip route add 10.244.1.7 dev eth0 proto 112")
        run(f"ip route add {V4} dev {NAME} src 192.0.2.10 mtu lock 1350 proto 112")
        run(f"ip route add {V6} via {NEAR6} dev eth0 proto 112")
        routes = netlink.PeerRouteTable()
        netlink.adopt_peer_routes()
        by_tunnel = PeerRoute(netlink.tunnel_index(), source=ip_address("192.0.2.10"), mtu=1350)
        assert routes.read() == {V4: by_tunnel, V6: PeerRoute(uplink, NEAR6)}
        assert run("ip route show proto 112").split()[0] == "10.244.1.7"
        assert run("ip -6 route show proto 112") == ""
        netlink.adopt_peer_routes()
        assert routes.delete(routes.read()) == {}
        assert routes.read() == {}

    def test_by_the_tunnel(self, table: netlink.TunnelDeviceTable, uplink: int) -> None:
        """Routes by the tunnel have the node's address and a locked MTU; one moves to a next hop and back."""
        table.upsert({NAME: DEVICE})
        number, routes = netlink.tunnel_index(), netlink.PeerRouteTable()
        wanted: dict[Prefix, PeerRoute] = {
            V4: PeerRoute(number, source=ip_address("192.0.2.10"), mtu=1350),
            V6: PeerRoute(number, source=ip_address("2001:db8::10")),
        }
        assert routes.upsert(wanted) == {}
        assert routes.read() == wanted
        assert "src 192.0.2.10 mtu lock 1350" in run(f"ip route show {V4}")
        for moved in ({V4: PeerRoute(uplink, NEAR), V6: PeerRoute(uplink, NEAR6)}, wanted):
            assert routes.upsert(moved) == {}
            assert routes.read() == moved

    def test_memory_does_not_grow_with_what_was(self, uplink: int) -> None:
        """Routes by the same way share what was written, and what was read earlier is forgotten."""
        routes, many = (
            netlink.PeerRouteTable(),
            [prefix(f"10.{number >> 8}.{number & 255}.0/24") for number in range(1500)],
        )
        for gateway in (NEAR, NEAR6, NEAR, NEAR6):
            wanted: dict[Prefix, PeerRoute] = {network: PeerRoute(uplink, gateway) for network in many}
            assert routes.upsert(wanted) == {}
            found = routes.read()
            assert found == wanted
            assert {id(route) for route in found.values()} <= {id(route) for route in wanted.values()}
            assert len({id(route) for route in found.values()}) == 1
        del wanted, found
        gc.collect()
        assert sum(isinstance(each, PeerRoute) for each in gc.get_objects()) < 10
        assert routes.delete(many) == {}

    def test_one_address(self, table: netlink.TunnelDeviceTable, uplink: int) -> None:
        """A peer's prefix of one address is no local pod's, and the other way round."""
        table.upsert({NAME: DEVICE})
        peers, pods = netlink.PeerRouteTable(), netlink.RouteTable()
        host_end = netlink.index("plone")
        assert host_end
        wanted: dict[Prefix, PeerRoute] = {
            prefix("10.244.7.1/32"): PeerRoute(uplink, NEAR),
            prefix("fd00:7::1/128"): PeerRoute(netlink.tunnel_index()),
        }
        pod = ip_address("10.244.1.1")
        assert peers.upsert(wanted) == {}
        assert pods.upsert({pod: HostRoute(host_end)}) == {}
        assert peers.read() == wanted
        assert pods.read() == {pod: HostRoute(host_end)}

    def test_others_are_left_alone(self, uplink: int) -> None:
        """Somebody else's route to the same prefix stays, and the failure names it."""
        run(f"ip route add {V4} via 192.0.2.3")
        routes = netlink.PeerRouteTable()
        failures = routes.upsert({V4: PeerRoute(uplink, NEAR)})
        assert f"add route {V4} to another node via {NEAR}" in str(failures[V4])
        assert routes.read() == {}
        assert "via 192.0.2.3" in run(f"ip route show {V4}")

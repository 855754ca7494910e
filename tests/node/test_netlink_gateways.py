"""The node's addresses towards pods, and the MAC addresses at the other end, on real veth pairs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

import pytest

from agent import netlink
from agent.state import Address, Gateway, HostRoute
from tests.node.namespaces import ip, new_netns, run, two_host_ends

pytestmark = pytest.mark.root

FOUR, SIX = IPv4Address("10.77.0.1"), IPv6Address("fd77::1")
MAC, OTHER_MAC = "02:bb:00:00:00:01", "02:bb:00:00:00:02"


@pytest.fixture
def host_ends() -> Iterator[tuple[int, int]]:
    """Run the test on a host of its own with two host ends, plone and pltwo, up; yield their indexes."""
    with two_host_ends() as indexes:
        yield indexes


class TestGateways:
    """GatewayTable."""

    def test_round_trip(self, host_ends: tuple[int, int]) -> None:
        """The same address can be on several host ends; it is read back, and is gone after deletion."""
        table = netlink.GatewayTable()
        wanted = {Gateway(address, number): 1 for address in (FOUR, SIX) for number in host_ends}
        assert table.upsert(wanted) == {}
        assert table.upsert(wanted) == {}
        assert table.read() == wanted
        assert not {FOUR, SIX} & netlink.node_addresses()
        assert table.delete(wanted) == {}
        assert table.read() == {}
        assert table.delete(wanted) == {}

    def test_only_towards_its_pod(self, host_ends: tuple[int, int]) -> None:
        """The node has the address as its source towards the pod that it is meant for, and towards nobody else.

        Not even where it has no better one: on devices without addresses, as the host ends of other pods are.
        """
        run("ip address add 192.0.2.1/32 dev plonepeer")
        run("ip address add 2001:db8::1/128 dev plonepeer nodad")
        routes = netlink.RouteTable()
        others: list[Address] = [FOUR + 7, SIX + 7]
        assert routes.upsert(dict.fromkeys(others, HostRoute(host_ends[1]))) == {}
        before = [source(address) for address in others]
        netlink.GatewayTable().upsert({Gateway(address, host_ends[0]): 1 for address in (FOUR, SIX)})
        given: dict[Address, HostRoute] = {each + 8: HostRoute(host_ends[0], each) for each in (FOUR, SIX)}
        assert routes.upsert(given) == {}
        assert [source(address) for address in given] == [str(FOUR), str(SIX)]
        assert [source(address) for address in others] == before == ["192.0.2.1", "2001:db8::1"]
        assert netlink.uplink_mtu() == 1500

    def test_addresses_of_others_are_left_alone(self, host_ends: tuple[int, int]) -> None:
        """Addresses on other devices are not read, nor those of the link; the node may have the same one already."""
        run(f"ip address add {FOUR}/24 dev plonepeer")
        run("ip address add fe80::99/64 dev plone nodad")
        table, ours = netlink.GatewayTable(), Gateway(FOUR, host_ends[0])
        assert table.read() == {}
        assert table.upsert({ours: 1}) == {}
        assert table.read() == {ours: 1}
        assert table.delete([ours]) == {}
        assert [each["local"] for each in ip("-4 address show dev plonepeer")[0]["addr_info"]] == [str(FOUR)]
        assert ip(f"route get {FOUR}")[0]["dev"] == "lo"

    def test_vanished_device(self, host_ends: tuple[int, int]) -> None:
        """Deleting after the device has gone is fine; adding there is a failure that names both."""
        table, key = netlink.GatewayTable(), Gateway(FOUR, host_ends[0])
        table.upsert({key: 1})
        run("ip link delete plone")
        assert table.read() == {}
        assert table.delete([key]) == {}
        assert str(table.upsert({key: 1})[key]).startswith(f"add address {FOUR} to device {key.ifindex}: E")


def source(address: Address) -> str:
    """Return the source address that the host takes towards an address."""
    found: str = ip(f"route get {address}")[0]["prefsrc"]
    return found


def test_pod_macs(host_ends: tuple[int, int]) -> None:
    """The MAC address of each pair's other end is told as it is now, in whatever namespace that end is."""
    one, two = host_ends
    away = new_netns()
    try:
        run(f"ip link set pltwopeer netns /proc/{os.getpid()}/fd/{away}")
        for netns, name, mac in ((None, "plonepeer", MAC), (away, "pltwopeer", OTHER_MAC)):
            run(f"ip link set {name} address {mac}", netns=netns)
        assert netlink.pod_macs() == {one: MAC, two: OTHER_MAC}
    finally:
        os.close(away)

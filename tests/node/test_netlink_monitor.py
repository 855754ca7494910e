"""The news from the kernel that wake the loop."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

import pytest

from agent import netlink
from agent.netlink import monitor
from agent.netlink.channel import Message
from agent.state import HostRoute, Neighbour
from tests.node.namespaces import new_netns, run, two_host_ends

pytestmark = pytest.mark.root

FOUR, SIX = IPv4Address("10.77.0.1"), IPv6Address("fd77::1")
MAC = "02:bb:00:00:00:01"


@pytest.fixture
def host_ends() -> Iterator[tuple[int, int]]:
    """Run the test on a host of its own with two host ends, plone and pltwo, up; yield their indexes."""
    with two_host_ends() as indexes:
        yield indexes


class TestMonitor:
    """Monitor."""

    @pytest.mark.parametrize(
        "change",
        [
            "ip route delete 10.77.0.1",
            "ip route replace 10.77.0.1 dev pltwo proto 112",
            "ip -6 route delete fd77::1",
            "ip neighbour delete 10.77.0.1 dev plone",
            "ip neighbour replace fd77::1 lladdr 02:bb:00:00:00:09 dev plone nud permanent",
            "ip link set plone down",
            "ip link delete plone",
            "ip link set plonepeer name eth0",
            "ip address add 192.0.2.1/24 dev plonepeer",
            "ip -6 address add 2001:db8::1/64 dev plonepeer",
            "ip route add default dev plonepeer",
            "ip -6 route add default dev plonepeer",
            "tc qdisc add dev plone root handle 1: tbf rate 1mbit burst 10k latency 25ms",
        ],
    )
    def test_meddling_is_told(self, host_ends: tuple[int, int], change: str) -> None:
        """Whatever is done to podlane's objects behind its back wakes the loop, and what may change the uplinks."""
        put_everything(host_ends[0])
        told = threading.Event()
        with netlink.Monitor(told.set):
            run(change)
            assert told.wait(timeout=30)

    def test_foreign_changes_are_not_told(self, host_ends: tuple[int, int]) -> None:
        """Routes and neighbours of others wake nobody; the same news about podlane's does."""
        put_everything(host_ends[0])
        with monitor._subscribe() as news:
            run("ip route add 192.0.2.1 dev plone proto static")
            run("ip neighbour add 192.0.2.1 lladdr 02:cc:00:00:00:01 dev plone nud permanent")
            assert not monitor._drain(news, concerns_us)
            run("ip route delete 10.77.0.1")
            assert monitor._drain(news, concerns_us)
            assert not monitor._drain(news, concerns_us)

    @pytest.mark.usefixtures("host_ends")
    def test_pods_are_heard(self) -> None:
        """A pod's new MAC address is told, though it changes in another namespace; what else is there is not."""
        away = new_netns()
        try:
            run(f"ip link set plonepeer netns /proc/{os.getpid()}/fd/{away}")
            with monitor._subscribe_abroad() as news:
                run("ip link add other type veth peer name another", netns=away)
                assert not monitor._drain(news, monitor._is_pod_end)
                run(f"ip link set plonepeer address {MAC}", netns=away)
                assert monitor._drain(news, monitor._is_pod_end)
        finally:
            os.close(away)

    @pytest.mark.usefixtures("host_ends")
    def test_lost_news_count_as_a_change(self) -> None:
        """When more happens than the socket can hold, the loop is told to look for itself."""
        with monitor._subscribe() as news:
            news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel makes it the least it allows
            for number in range(20):
                run(f"ip route add 192.0.2.{number + 1} dev plone proto static")
            assert monitor._drain(news, monitor._concerns_us)

    @pytest.mark.usefixtures("host_ends")
    def test_stopping_leaves_nothing(self) -> None:
        """Leaving the context ends the thread and closes what it used."""
        before = (threading.active_count(), len(list(Path("/proc/self/fd").iterdir())))
        for _ in range(20):
            with netlink.Monitor(lambda: None):
                pass
        assert (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))) == before


def concerns_us(message: Message) -> bool:
    """Say what the monitor says, but of devices and addresses nothing: of the test's own, the kernel has late news."""
    return message.type not in monitor.ALWAYS and monitor._concerns_us(message)


def put_everything(number: int) -> None:
    """Add podlane's route and neighbour of both families on a device."""
    assert netlink.RouteTable().upsert(dict.fromkeys((FOUR, SIX), HostRoute(number))) == {}
    neighbours = {Neighbour(address, number): MAC for address in (FOUR, SIX)}
    assert netlink.NeighbourTable().upsert(neighbours) == {}

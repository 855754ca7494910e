"""Host routes, neighbours, clsact filters and news of their changes, in a namespace of the test's own."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Literal

import pytest

from agent import netlink
from agent.state import Address, Attached, Hook, HostRoute, KernelError, Neighbour, Network
from tests.node.namespaces import ip, run, two_host_ends

pytestmark = pytest.mark.root

FOUR, SIX = IPv4Address("10.77.0.1"), IPv6Address("fd77::1")
FOUR_NET, SIX_NET = IPv4Network("10.77.0.0/24"), IPv6Network("fd77::/64")
MAC, OTHER_MAC = "02:bb:00:00:00:01", "02:bb:00:00:00:02"


@pytest.fixture
def host_ends() -> Iterator[tuple[int, int]]:
    """Run the test on a host of its own with two host ends, plone and pltwo, up; yield their indexes."""
    with two_host_ends() as indexes:
        yield indexes


def many(count: int) -> list[Address]:
    """Return that many addresses, half of each family."""
    half = range(1, count // 2 + 1)
    return [*(FOUR + number for number in half), *(SIX + number for number in half)]


class TestRoutes:
    """RouteTable."""

    def test_round_trip(self, host_ends: tuple[int, int]) -> None:
        """What is put is read back, moves to another device, and is gone after deletion."""
        one, two = host_ends
        table = netlink.RouteTable()
        assert table.upsert({FOUR: HostRoute(one), SIX: HostRoute(one)}) == {}
        assert table.read() == {FOUR: HostRoute(one), SIX: HostRoute(one)}
        assert table.upsert({FOUR: HostRoute(two), SIX: HostRoute(two)}) == {}
        assert table.read() == {FOUR: HostRoute(two), SIX: HostRoute(two)}
        assert table.delete([FOUR, SIX]) == {}
        assert table.read() == {}
        assert table.delete([FOUR, SIX]) == {}

    def test_route_is_as_specified(self, host_ends: tuple[int, int]) -> None:
        """The route is ADDRESS dev DEVICE scope link proto 112, alone for its address."""
        netlink.RouteTable().upsert(dict.fromkeys((FOUR, SIX), HostRoute(host_ends[0])))
        for family, address in ((4, FOUR), (6, SIX)):
            (route,) = ip(f"-{family} route show table main proto 112")
            assert (route["dst"], route["dev"], "gateway" in route) == (str(address), "plone", False)
        assert ip("-4 route show proto 112")[0]["scope"] == "link"

    def test_foreign_routes_are_left_alone(self, host_ends: tuple[int, int]) -> None:
        """A route of someone else is not read, not replaced (that is a failure) and not deleted."""
        table = netlink.RouteTable()
        run(f"ip route add {FOUR} dev pltwo proto static")
        run(f"ip -6 route add {SIX} dev pltwo proto static")
        assert table.read() == {}
        failures = table.upsert(dict.fromkeys((FOUR, SIX, FOUR + 1), HostRoute(host_ends[0])))
        assert failures.keys() == {FOUR, SIX}
        assert str(failures[FOUR]).startswith(f"add route {FOUR} to device {host_ends[0]}: EEXIST")
        assert table.read() == {FOUR + 1: HostRoute(host_ends[0])}
        assert table.delete([FOUR, SIX]) == {}
        for family in (4, 6):
            assert [route["dev"] for route in ip(f"-{family} route show proto static")] == ["pltwo"]

    def test_one_failure_does_not_stop_the_others(self, host_ends: tuple[int, int]) -> None:
        """A route to a device that does not exist fails alone, and says so."""
        table = netlink.RouteTable()
        failures = table.upsert({FOUR: HostRoute(99999), SIX: HostRoute(host_ends[0])})
        assert failures.keys() == {FOUR}
        assert re.match(rf"add route {FOUR} to device 99999: E(NODEV|INVAL)", str(failures[FOUR]))
        assert table.read() == {SIX: HostRoute(host_ends[0])}

    def test_a_full_node(self, host_ends: tuple[int, int]) -> None:
        """A thousand routes go in, out and back in calls of one, however many datagrams they take."""
        table, wanted = netlink.RouteTable(), dict.fromkeys(many(1000), HostRoute(host_ends[0]))
        assert table.upsert(wanted) == {}
        assert table.read() == wanted
        assert table.delete(wanted) == {}
        assert table.read() == {}


class TestSubnets:
    """SubnetTable."""

    def test_round_trip(self, host_ends: tuple[int, int]) -> None:
        """What is put is read back, beside the routes of pods in it, and is gone after deletion."""
        table = netlink.SubnetTable()
        wanted: dict[Network, Literal["unreachable"]] = dict.fromkeys((FOUR_NET, SIX_NET), "unreachable")
        assert table.upsert(wanted) == {}
        netlink.RouteTable().upsert(dict.fromkeys((FOUR, SIX), HostRoute(host_ends[0])))
        assert table.read() == wanted
        assert netlink.RouteTable().read().keys() == {FOUR, SIX}
        assert table.delete(wanted) == {}
        assert table.read() == {}
        assert table.delete(wanted) == {}

    @pytest.mark.usefixtures("host_ends")
    @pytest.mark.parametrize("comes_later", [False, True])
    def test_foreign_routes_come_first(self, comes_later: bool) -> None:
        """A route of someone else to the same subnet counts, whichever was there first; it is neither read nor deleted.

        So does the one that the kernel makes for an address of the node's.
        """
        table, theirs = netlink.SubnetTable(), ("address add 10.77.0.99/24 dev pltwo", "route add fd77::/64 dev pltwo")
        wanted: dict[Network, Literal["unreachable"]] = dict.fromkeys((FOUR_NET, SIX_NET), "unreachable")
        if comes_later:
            assert table.upsert(wanted) == {}
        for command in theirs:
            run(f"ip {command}")
        if not comes_later:
            assert table.upsert(wanted) == {}
        assert table.read() == wanted
        for address in (FOUR, SIX):
            assert ip(f"route get {address}")[0]["dev"] == "pltwo"
        assert table.delete(wanted) == {}
        for address in (FOUR, SIX):
            assert ip(f"route get {address}")[0]["dev"] == "pltwo"


class TestNeighbours:
    """NeighbourTable."""

    def test_round_trip(self, host_ends: tuple[int, int]) -> None:
        """What is put is read back, changes its MAC, and is gone after deletion."""
        table = netlink.NeighbourTable()
        keys = [Neighbour(address, host_ends[0]) for address in (FOUR, SIX)]
        assert table.upsert(dict.fromkeys(keys, MAC)) == {}
        assert table.read() == dict.fromkeys(keys, MAC)
        (entry,) = ip(f"neighbour show {FOUR} dev plone")
        assert (entry["lladdr"], entry["state"], entry["protocol"]) == (MAC, ["PERMANENT"], "112")
        assert table.upsert(dict.fromkeys(keys, OTHER_MAC)) == {}
        assert table.read() == dict.fromkeys(keys, OTHER_MAC)
        assert table.delete(keys) == {}
        assert table.read() == {}
        assert table.delete(keys) == {}

    def test_foreign_neighbours_are_left_alone(self, host_ends: tuple[int, int]) -> None:
        """Permanent neighbours of someone else, and learned ones, are not read and stay."""
        table, ours = netlink.NeighbourTable(), Neighbour(FOUR, host_ends[0])
        run(f"ip neighbour add {FOUR + 1} lladdr {MAC} dev plone nud permanent")
        run(f"ip neighbour add {SIX} lladdr {MAC} dev plone nud reachable")
        assert table.upsert({ours: MAC}) == {}
        assert table.read() == {ours: MAC}
        assert table.delete([ours]) == {}
        assert {item["dst"] for item in ip("neighbour show dev plone")} >= {str(FOUR + 1), str(SIX)}

    def test_vanished_device(self, host_ends: tuple[int, int]) -> None:
        """Deleting after the device has gone is fine; adding there is a failure that names both."""
        table, key = netlink.NeighbourTable(), Neighbour(FOUR, host_ends[0])
        table.upsert({key: MAC})
        run("ip link delete plone")
        assert table.read() == {}
        assert table.delete([key]) == {}
        assert str(table.upsert({key: MAC})[key]).startswith(f"add neighbour {FOUR} on device {key.ifindex}: E")

    def test_a_full_node(self, host_ends: tuple[int, int]) -> None:
        """Five hundred neighbours go in and come back."""
        table = netlink.NeighbourTable()
        wanted = {Neighbour(address, host_ends[0]): MAC for address in many(500)}
        assert table.upsert(wanted) == {}
        assert table.read() == wanted


class TestClsact:
    """ClsactHooks."""

    @pytest.fixture
    def programs(self) -> Iterator[dict[str, int]]:
        """Load two programs that let every packet pass; yield their file descriptors."""
        loaded = {name: load_program() for name in ("from_pod", "to_pod")}
        yield loaded
        for fd in loaded.values():
            os.close(fd)

    def test_round_trip(self, host_ends: tuple[int, int], programs: dict[str, int]) -> None:
        """Both hooks of a device are attached, read back and detached; of a pod's device, the empty qdisc stays."""
        hooks = netlink.ClsactHooks(programs, {name: program_id(fd) for name, fd in programs.items()})
        ingress, egress = Hook("plone", "ingress"), Hook("plone", "egress")
        wanted = {ingress: Attached(host_ends[0], "from_pod"), egress: Attached(host_ends[0], "to_pod")}
        assert hooks.upsert(wanted) == {}
        assert hooks.read() == wanted
        shown = run("tc filter show dev plone ingress")
        assert "podlane_from_pod direct-action" in shown
        assert f"id {program_id(programs['from_pod'])} " in shown
        assert hooks.delete([ingress]) == {}
        assert hooks.read() == {egress: wanted[egress]}
        assert hooks.delete([egress]) == {}
        assert hooks.read() == {}
        assert "clsact" in run("tc qdisc show dev plone")
        assert hooks.delete([ingress, egress, Hook("plgone", "ingress")]) == {}

    @pytest.mark.parametrize("existed", [False, True])
    @pytest.mark.usefixtures("host_ends")
    def test_foreign_device(self, programs: dict[str, int], existed: bool) -> None:
        """On a device that is not podlane's, the qdisc goes with the last filter, if it came with the first."""
        if existed:
            run("tc qdisc add dev plonepeer clsact")
        hooks = netlink.ClsactHooks(programs, {name: program_id(fd) for name, fd in programs.items()})
        number = socket.if_nametoindex("plonepeer")
        ingress, egress = Hook("plonepeer", "ingress"), Hook("plonepeer", "egress")
        wanted = {ingress: Attached(number, "from_pod"), egress: Attached(number, "to_pod")}
        assert hooks.upsert(wanted) == {}
        assert hooks.read() == wanted
        assert hooks.delete([ingress]) == {}
        assert "clsact" in run("tc qdisc show dev plonepeer")
        assert hooks.delete([egress]) == {}
        assert ("clsact" in run("tc qdisc show dev plonepeer")) == existed
        assert hooks.read() == {}

    def test_restart(self, host_ends: tuple[int, int], programs: dict[str, int]) -> None:
        """Filters are found again by the agent's next life, and when somebody has removed one, that is seen."""
        ids = {name: program_id(fd) for name, fd in programs.items()}
        ingress, egress = Hook("plone", "ingress"), Hook("pltwo", "egress")
        wanted = {ingress: Attached(host_ends[0], "from_pod"), egress: Attached(host_ends[1], "to_pod")}
        assert netlink.ClsactHooks(programs, ids).upsert(wanted) == {}
        hooks = netlink.ClsactHooks(programs, ids)
        assert hooks.read() == wanted
        run("tc filter delete dev plone ingress")
        assert hooks.read() == {egress: wanted[egress]}
        assert hooks.upsert({ingress: wanted[ingress]}) == {}
        assert hooks.read() == wanted

    def test_gone_devices_are_forgotten(self, host_ends: tuple[int, int], programs: dict[str, int]) -> None:
        """Devices come and go for years: what is known of them goes with them."""
        hooks = netlink.ClsactHooks(programs, {name: program_id(fd) for name, fd in programs.items()})
        assert hooks.upsert({Hook("plone", "ingress"): Attached(host_ends[0], "from_pod")}) == {}
        run("ip link delete plone")
        assert hooks.read() == {}
        assert (hooks._made, hooks._held) == (set(), set())

    def test_replacement(self, host_ends: tuple[int, int], programs: dict[str, int]) -> None:
        """A program of an earlier agent is read as stale, and replaced without a second filter beside it."""
        hook, old = Hook("plone", "ingress"), load_program()
        wanted = {hook: Attached(host_ends[0], "from_pod")}
        try:
            assert netlink.ClsactHooks({"from_pod": old}, {"from_pod": program_id(old)}).upsert(wanted) == {}
            hooks = netlink.ClsactHooks(programs, {name: program_id(fd) for name, fd in programs.items()})
            assert hooks.read() == {hook: Attached(host_ends[0], f"stale:{program_id(old)}")}
        finally:
            os.close(old)
        assert hooks.upsert(wanted) == {}
        assert hooks.read() == wanted
        assert run("tc filter show dev plone ingress").count("podlane_") == 1

    def test_foreign_filters_are_left_alone(self, host_ends: tuple[int, int], programs: dict[str, int]) -> None:
        """A filter of someone else is not read, not deleted, and keeps the qdisc."""
        run("tc qdisc add dev plone clsact")
        run("tc filter add dev plone ingress prio 7 u32 match u32 0 0")
        hooks = netlink.ClsactHooks(programs, {name: program_id(fd) for name, fd in programs.items()})
        hook = Hook("plone", "ingress")
        assert hooks.read() == {}
        assert hooks.upsert({hook: Attached(host_ends[0], "from_pod")}) == {}
        assert hooks.delete([hook]) == {}
        assert "u32" in run("tc filter show dev plone ingress")

    def test_refusals(self, host_ends: tuple[int, int], programs: dict[str, int]) -> None:
        """Vanished devices and unknown programs are failures that say so."""
        hooks = netlink.ClsactHooks(programs, {name: program_id(fd) for name, fd in programs.items()})
        bad = {
            Hook("plgone", "ingress"): Attached(99999, "from_pod"),
            Hook("plone", "egress"): Attached(host_ends[0], "unheard_of"),
        }
        failures = hooks.upsert(bad)
        assert failures.keys() == bad.keys()
        reasons = {hook.device: str(failure) for hook, failure in failures.items()}
        assert re.match(r"attach from_pod at ingress of plgone: E(NODEV|INVAL)", reasons["plgone"])
        assert reasons["plone"] == "attach unheard_of at egress of plone: no such program is loaded"
        assert hooks.read() == {}


def load_program() -> int:
    """Load `return TC_ACT_UNSPEC` as a classifier; return its file descriptor."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    scheduler_classifier = 3  # linux/bpf.h: BPF_PROG_TYPE_SCHED_CLS
    instructions = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = -1; exit
    fd: int = libbpf.bpf_prog_load(scheduler_classifier, b"pass", b"GPL", instructions, ctypes.c_size_t(2), None)
    if fd < 0:
        raise KernelError(f"load the test's program: {os.strerror(ctypes.get_errno())}")
    return fd


def program_id(fd: int) -> int:
    """Return the kernel's id of a loaded program."""
    found = re.search(r"^prog_id:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    assert found
    return int(found[1])

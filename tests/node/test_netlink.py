"""Wiring pods: what the kernel really has after each call, in namespaces of the test's own."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from agent import netlink
from agent.state import HostRoute, KernelError
from tests.node.namespaces import answers, fresh_netns, ip, new_netns, own, run, sysctl, wait_up
from tests.node.wiring import GATEWAYS, MTU, Pod

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("host_netns")]

NODE4, NODE6 = "192.0.2.1", "2001:db8::1"

MakeNetns = Callable[[], int]


@pytest.fixture
def host_netns() -> Iterator[int]:
    """Run the test in a new network namespace, as if it were the node's; yield its file descriptor."""
    with fresh_netns() as netns:
        yield netns


@pytest.fixture
def make_netns(host_netns: int) -> Iterator[MakeNetns]:  # noqa: ARG001 - the pods go before the host does
    """Return a function that makes network namespaces, for pods."""
    with ExitStack() as opened:

        def make() -> int:
            netns = new_netns()
            opened.callback(os.close, netns)
            return netns

        yield make


@pytest.fixture
def pod(make_netns: MakeNetns) -> Pod:
    """Return a pod with nothing in its namespace yet."""
    return Pod(1, make_netns())


def test_pair_is_created_as_asked(pod: Pod) -> None:
    """Both ends have the given names, MACs and MTU, are down, and make up no IPv6 address on the host."""
    number = pod.create()
    host = ip(f"link show {pod.host}")[0]
    inner = ip("link show eth0", netns=pod.netns)[0]
    assert host["ifindex"] == number == netlink.index(pod.host)
    assert (host["address"], inner["address"]) == (pod.host_mac, pod.mac)
    assert (host["mtu"], inner["mtu"]) == (MTU, MTU)
    assert host["ifalias"] == "podlane:test/1/eth0"
    assert host["inet6_addr_gen_mode"] == "none"
    assert "UP" not in host["flags"]
    assert "UP" not in inner["flags"]


def test_given_mac_is_known_to_be_given(pod: Pod) -> None:
    """The kernel records that user space chose the MAC addresses, so systemd-udevd leaves them alone."""
    pod.create()
    # A fresh sysfs shows the devices of the namespace that it is mounted in.
    kind = f"mount -t sysfs sysfs /sys && cat /sys/class/net/{pod.host}/addr_assign_type"
    shown = subprocess.run(["unshare", "-m", "sh", "-c", kind], check=True, capture_output=True, text=True)
    assert shown.stdout.strip() == "3"  # NET_ADDR_SET, linux/netdevice.h


def test_pod_side_is_as_specified(pod: Pod) -> None:
    """Inside the pod: /32, /128 and one link-local address, permanent gateways, a default route per family."""
    pod.wire()
    eth0 = ip("address show eth0", netns=pod.netns)[0]
    found = {(item["local"], item["prefixlen"], item["scope"]) for item in eth0["addr_info"]}
    link_local = (str(pod.link_local), 64, "link")
    assert found == {("10.77.0.1", 32, "global"), ("fd77::1", 128, "global"), link_local}
    assert "UP" in eth0["flags"]
    assert ip("link show eth0", netns=pod.netns)[0]["inet6_addr_gen_mode"] == "none"
    neighbours = ip("neighbour show dev eth0", netns=pod.netns)
    assert {(item["dst"], item["lladdr"], *item["state"]) for item in neighbours} == {
        ("169.254.1.1", pod.host_mac, "PERMANENT"),
        ("fe80::1", pod.host_mac, "PERMANENT"),
    }
    for family, gateway in GATEWAYS.items():
        routes = ip(f"-{family} route show proto static", netns=pod.netns)
        assert {(item["dst"], item.get("gateway"), item["dev"]) for item in routes} == {
            (str(gateway), None, "eth0"),
            ("default", str(gateway), "eth0"),
        }
    assert sysctl("net/ipv6/conf/eth0/accept_ra", netns=pod.netns) == "0"


def test_no_duplicate_address_detection_and_no_resolution(pod: Pod) -> None:
    """No address is ever tentative, and neither side asks for a neighbour: not by DAD, not by ARP or NDP."""
    number = pod.create()
    netlink.raise_host(pod.host)
    own(NODE4, NODE6)
    every_protocol = socket.htons(3)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, every_protocol) as tap:
        tap.bind((pod.host, 3))
        pod.configure()
        flags = [item.keys() for item in ip("address show eth0", netns=pod.netns)[0]["addr_info"]]
        assert not [keys for keys in flags if keys & {"tentative", "dadfailed", "optimistic"}]
        pod.make_reachable(number)
        assert all(answers(node, netns=pod.netns) for node in (NODE4, NODE6))
        seen = _captured(tap)
    assert {("ipv6", 128), ("ipv6", 129)} <= seen  # echo and its reply: the tap does see packets
    assert not seen & {("arp", 0), ("ipv6", 135), ("ipv6", 136), ("ipv6", 133)}


def _captured(tap: socket.socket) -> set[tuple[str, int]]:
    """Return the kinds of packets in a tap: ("arp", 0), ("ipv4", protocol), ("ipv6", ICMPv6 type)."""
    tap.setblocking(False)
    seen: set[tuple[str, int]] = set()
    while True:
        try:
            packet, (_, protocol, *_) = tap.recvfrom(2048)
        except BlockingIOError:
            return seen
        if protocol == 0x0806:
            seen.add(("arp", 0))
        elif protocol == 0x86DD and packet[6] in (0, 58):  # 0: hop-by-hop options of MLD reports, 8 octets
            seen.add(("ipv6", packet[40 if packet[6] else 48]))
        elif protocol == 0x0800:
            seen.add(("ipv4", packet[9]))


def test_node_and_pods_reach_each_other(make_netns: MakeNetns) -> None:
    """Node to pod, pod to node and pod to pod answer the very first ping, over both families."""
    netlink.enable_forwarding()
    own(NODE4, NODE6)
    first, second = Pod(1, make_netns()), Pod(2, make_netns())
    first.wire()
    second.wire()
    wait_up(first.host, second.host)
    assert [answers(address) for address in first.addresses] == [True, True]
    assert [answers(node, netns=first.netns) for node in (NODE4, NODE6)] == [True, True]
    assert [answers(address, netns=first.netns) for address in second.addresses] == [True, True]


def test_order_of_the_ends_does_not_matter(pod: Pod) -> None:
    """A pod configured before its host end is up works all the same."""
    number = pod.create()
    pod.configure()
    netlink.raise_host(pod.host)
    own(NODE6)
    pod.make_reachable(number)
    wait_up(pod.host)
    wait_up("eth0", netns=pod.netns)
    assert answers(NODE6, netns=pod.netns)


def test_ipv4_only_pod_has_no_ipv6_address(pod: Pod) -> None:
    """A pod with IPv4 alone gets no IPv6 address of any kind, and no IPv6 route."""
    pod.create()
    netlink.raise_host(pod.host, ipv6=False)
    pod.configure([pod.addresses[0]])
    assert [item["family"] for item in ip("address show eth0", netns=pod.netns)[0]["addr_info"]] == ["inet"]
    assert ip("-6 route show default", netns=pod.netns) == []
    assert ip(f"address show {pod.host}")[0]["addr_info"] == []


def test_ipv6_works_where_it_is_off_by_default(pod: Pod) -> None:
    """A runtime and a node that switch IPv6 off for new devices do not keep a pod from its IPv6 address."""
    for netns in (pod.netns, None):
        run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1", netns=netns)
        run("sysctl -qw net.ipv6.conf.default.disable_ipv6=1", netns=netns)
    pod.wire()
    run("sysctl -qw net.ipv6.conf.lo.disable_ipv6=0")
    own(NODE6)
    wait_up(pod.host)
    assert answers(pod.addresses[1])
    assert answers(pod.addresses[1], netns=pod.netns)


def test_host_end_is_up_and_ready_to_route(pod: Pod) -> None:
    """The host end forwards both families, hears no router advertisements and has no address at all."""
    pod.create()
    netlink.raise_host(pod.host)
    host = ip(f"address show {pod.host}")[0]
    assert "UP" in host["flags"]
    assert host["addr_info"] == []
    settings = {
        name: Path("/proc/sys/net", *name).read_text().strip()
        for name in [("ipv4", "conf", pod.host, "forwarding"), ("ipv6", "conf", pod.host, "forwarding")]
    }
    assert set(settings.values()) == {"1"}
    assert Path("/proc/sys/net/ipv6/conf", pod.host, "accept_ra").read_text().strip() == "0"


def test_second_attachment_leaves_the_first_its_routes(pod: Pod) -> None:
    """Another interface in the same pod is wired too; its default routes stand behind, but for its own addresses."""
    pod.wire()
    second = Pod(2, pod.netns, "net1")
    second.wire()
    for family, address in zip(GATEWAYS, second.addresses, strict=True):
        assert [item["dev"] for item in ip(f"-{family} route show default", netns=pod.netns)] == ["eth0", "net1"]
        for source, device in (("", "eth0"), (f"from {address}", "net1")):
            far = {4: "192.0.2.1", 6: "2001:db8::1"}[family]
            assert ip(f"route get {far} {source}", netns=pod.netns)[0]["dev"] == device
    found = [item["local"] for item in ip("address show net1", netns=pod.netns)[0]["addr_info"]]
    assert set(found) == {"10.77.0.2", "fd77::2", "fe80::bb:2"}


def test_existing_interface_is_refused(pod: Pod) -> None:
    """A name that is taken inside the pod is InterfaceExists; what is there stays, nothing new is left."""
    run("ip link add eth0 type veth peer name other", netns=pod.netns)
    before = ip("link show", netns=pod.netns)
    with pytest.raises(netlink.InterfaceExists, match=r"create veth pl\w+ with eth0 in the pod"):
        pod.create()
    assert ip("link show", netns=pod.netns) == before
    assert netlink.index(pod.host) is None


def test_taken_host_name_is_not_touched(pod: Pod) -> None:
    """A host device that has the name already is an error naming it, and stays as it was."""
    run(f"ip link add {pod.host} type veth peer name other")
    before = ip(f"link show {pod.host}")
    with pytest.raises(KernelError, match=f"create veth {pod.host}.*EEXIST") as caught:
        pod.create()
    assert not isinstance(caught.value, netlink.InterfaceExists)
    assert ip(f"link show {pod.host}") == before
    assert len(ip("link show", netns=pod.netns)) == 1


def test_failure_after_creation_is_undone(pod: Pod) -> None:
    """If the pair exists but its alias is refused, the pair is removed again."""
    with pytest.raises(KernelError, match=pod.host):
        netlink.create_pair(pod.host, pod.host_mac, "eth0", pod.mac, MTU, "podlane:" + 300 * "x", pod.netns)
    assert netlink.index(pod.host) is None
    assert len(ip("link show", netns=pod.netns)) == 1


def test_refusals_name_operation_object_and_errno(pod: Pod) -> None:
    """What the kernel refuses says what was tried, on what, with which errno, and the kernel's own words."""
    with tempfile.TemporaryFile() as file, pytest.raises(KernelError, match=f"create veth {pod.host}.*EINVAL"):
        Pod(1, file.fileno()).create()
    with tempfile.TemporaryFile() as file, pytest.raises(KernelError, match="enter the pod's network namespace"):
        Pod(1, file.fileno()).configure()
    with pytest.raises(KernelError, match="set up eth0: there is no such device"):
        pod.configure()
    address = IPv4Address("10.77.0.9")
    failure = netlink.RouteTable().upsert({address: HostRoute(99999)})[address]
    assert str(failure).startswith("add route 10.77.0.9 to device 99999: ENODEV")


def test_delete_is_idempotent_and_takes_both_ends(pod: Pod) -> None:
    """Deleting the host end removes the pod's end with it; doing it again is fine."""
    pod.wire()
    netlink.delete_device(pod.host)
    assert netlink.index(pod.host) is None
    assert len(ip("link show", netns=pod.netns)) == 1
    netlink.delete_device(pod.host)


def test_devices_are_known_by_name_and_alias(pod: Pod) -> None:
    """Only a veth with both our name prefix and our alias counts as podlane's."""
    number = pod.create()
    run("ip link add plain type veth peer name other")
    run("ip link add foreign type veth peer name other2")
    run("ip link set foreign alias podlane:not")
    assert netlink.devices() == {pod.host: number}


def test_netns_are_recognised(pod: Pod, host_netns: int) -> None:
    """A namespace is told from a file and from another kind of namespace, and our own from a pod's."""
    kinds = [os.open(name, os.O_RDONLY) for name in ("/dev/null", "/proc/self/ns/uts")]
    try:
        assert [netlink.is_netns(fd) for fd in (pod.netns, host_netns, *kinds)] == [True, True, False, False]
    finally:
        for fd in kinds:
            os.close(fd)
    assert netlink.same_netns(host_netns)
    assert not netlink.same_netns(pod.netns)


def test_uplink_mtu_follows_the_default_route() -> None:
    """The smallest MTU of the default routes' devices; else of a device with a global address; else 1500."""
    assert netlink.uplink_mtu() == 1500
    for name, mtu in (("up0", 1400), ("up1", 1300), ("up2", 9000)):
        run(f"ip link add {name} mtu {mtu} type veth peer name {name}peer mtu {mtu}")
        run(f"ip link set {name} up")
        run(f"ip link set {name}peer up")
    run("ip address add 192.0.2.1/32 dev up2")
    assert netlink.uplink_mtu() == 9000
    run("ip route add default via 192.0.2.9 dev up0 onlink")
    assert netlink.uplink_mtu() == 1400
    hops = " ".join(f"nexthop via 192.0.2.9 dev {name} onlink" for name in ("up0", "up1"))
    run(f"ip route replace default {hops}")
    assert netlink.uplink_mtu() == 1300
    run("ip route delete default")
    run("ip -6 route add default via fe80::9 dev up1")
    assert netlink.uplink_mtu() == 1300


def test_forwarding_is_enabled(host_netns: int) -> None:
    """Both families are forwarded afterwards; asking twice is fine."""
    names = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding")
    netlink.enable_forwarding()
    netlink.enable_forwarding()
    assert [sysctl(name, netns=host_netns) for name in names] == ["1", "1"]


def test_router_advertisements_are_kept(host_netns: int) -> None:
    """A device that learns its routes from router advertisements goes on doing so; one that does not stays so."""
    run("ip link add learns type veth peer name deaf")
    Path("/proc/sys/net/ipv6/conf/deaf/accept_ra").write_text("0")
    netlink.enable_forwarding()
    shown = [sysctl(f"net/ipv6/conf/{name}/accept_ra", netns=host_netns) for name in ("learns", "deaf")]
    assert shown == ["2", "0"]


def test_fifty_pods_at_once(make_netns: MakeNetns) -> None:
    """Fifty threads wire fifty pods at the same time, and every one of them answers."""
    pods = [Pod(number, make_netns()) for number in range(1, 51)]
    # A new thread is born in its maker's namespace: the test's.
    with ThreadPoolExecutor(max_workers=50) as threads:
        indexes = list(threads.map(Pod.wire, pods))
    assert netlink.devices() == {pod.host: number for pod, number in zip(pods, indexes, strict=True)}
    routes = netlink.RouteTable().read()
    assert routes == {a: HostRoute(number) for pod, number in zip(pods, indexes, strict=True) for a in pod.addresses}
    own(NODE4, NODE6)
    wait_up(*netlink.devices())
    with ThreadPoolExecutor(max_workers=4) as threads:
        assert all(threads.map(answers, [address for pod in pods for address in pod.addresses]))


def test_wiring_leaks_no_descriptor_and_no_thread(make_netns: MakeNetns) -> None:
    """After 200 wirings, refused ones among them, the process has the descriptors and threads that it had."""
    pod = Pod(1, make_netns())
    other = Pod(2, pod.netns)
    before = (len(os.listdir("/proc/self/fd")), threading.active_count())  # noqa: PTH208
    for _ in range(200):
        pod.wire()
        with pytest.raises(netlink.InterfaceExists):
            other.create()
        netlink.delete_device(pod.host)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before  # noqa: PTH208
    assert netlink.RouteTable().read() == {}
    assert netlink.NeighbourTable().read() == {}

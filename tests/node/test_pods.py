"""Two pods on one node, wired by the real launcher and agent: who reaches whom, and how."""

from __future__ import annotations

import json
import re
import socket
import threading

import pytest

from tests.e2e import netfilter
from tests.node.machine import Machine, TestPod
from tests.node.programs import wait_settled

V4, V6 = 0, 1
OF_OTHER_PROGRAMS = re.compile(r"fwd_(from_stack|host|inbound|native|reply)|masq_|drop_masq_|punt_fragment")


@pytest.fixture
def pods(node: Machine) -> tuple[TestPod, TestPod]:
    """Two pods."""
    return node.make_pod("a"), node.make_pod("b")


@pytest.mark.parametrize("family", [V4, V6])
def test_pod_to_pod_is_one_hop(node: Machine, pods: tuple[TestPod, TestPod], family: int) -> None:
    """A ping from pod to pod arrives with its TTL reduced by exactly one, and every packet is counted once."""
    a, b = pods
    before = node.packets()
    done = a.netns.run("ping", "-c", "10", "-i", "0.01", b.addresses[family])
    assert re.findall(r"ttl=(\d+)", done.stdout) == ["63"] * 10
    after = node.packets()
    assert after["fwd_local"] - before["fwd_local"] == 20
    others = {name for name in after if after[name] != before[name]} - {"fwd_local"}
    # Both kernels' multicast listener reports, and what the node itself has to say at its uplink.
    assert others <= {"punt_options", "punt_multicast", "fwd_from_stack", "fwd_host_in", "fwd_host_out"}


def test_counters_account_for_every_packet(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """The outcome counters grow by exactly what the pods' devices counted, in packets and in bytes."""
    wait_settled(node, *pods)

    def counted() -> list[int]:
        totals = {"packets": 0, "bytes": 0}
        for (name, labels), value in node.metrics().items():
            for what in totals:
                if name == f"podlane_datapath_{what}_total" and not OF_OTHER_PROGRAMS.match(labels[0]):
                    totals[what] += int(value)
        return list(totals.values())

    def seen() -> list[int]:
        shown = [json.loads(node.netns.run("ip", "-j", "-s", "link", "show", pod.device).stdout) for pod in pods]
        return [sum(each[0]["stats64"]["rx"][what] for each in shown) for what in ("packets", "bytes")]

    def difference() -> list[int] | None:
        """Return by how much they differ, unless a pod sent something in between: it reports its multicast groups."""
        before, devices, after = counted(), seen(), counted()
        return [a - b for a, b in zip(after, devices, strict=True)] if before == after else None

    node.wait_for(lambda: difference() is not None, "a quiet moment")
    baseline, start = difference(), seen()
    for address in (*pods[1].addresses, "192.0.2.10", "2001:db8::10", "198.51.100.1", "224.0.0.1"):
        pods[0].netns.run("ping", "-c", "3", "-i", "0.01", "-W", "0.1", "-s", "2000", address, check=False)
    node.wait_for(lambda: difference() == baseline, "the same difference")
    assert seen()[0] - start[0] > 30


def test_new_pod_receives_at_once(node: Machine) -> None:
    """The first packet to a pod, sent as soon as ADD has answered, arrives, in both families."""
    first = node.make_pod("first")
    for _ in range(10):
        pod = node.make_pod("new")
        for address in pod.addresses:
            assert node.pings(first, address, count=1)


@pytest.mark.parametrize("size", [1, 56, 1472, 1473, 9000, 65000])
@pytest.mark.parametrize("family", [V4, V6])
def test_pings_of_any_size(node: Machine, pods: tuple[TestPod, TestPod], family: int, size: int) -> None:
    """Pings of 1 to 65,000 bytes are answered, fragmented or not."""
    a, b = pods
    assert node.pings(a, b.addresses[family], "-s", str(size))


@pytest.mark.parametrize("family", [V4, V6])
def test_node_and_pod_reach_each_other(node: Machine, pods: tuple[TestPod, TestPod], family: int) -> None:
    """The node reaches its pods, and its pods reach the node."""
    a, _ = pods
    assert node.netns.run("ping", "-c", "2", "-i", "0.01", a.addresses[family]).returncode == 0
    assert node.pings(a, ["192.0.2.10", "2001:db8::10"][family])


@pytest.mark.parametrize("family", [V4, V6])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_tcp_and_udp(pods: tuple[TestPod, TestPod], family: int, kind: socket.SocketKind) -> None:
    """A megabyte by TCP, and datagrams up to 60,000 bytes by UDP, arrive as they were sent."""
    a, b = pods
    chunks = [bytes([n % 251]) * size for n, size in enumerate((1, 100, 1472, 9000, 60000) * 15)]

    def listen() -> socket.socket:
        server = socket.socket([socket.AF_INET, socket.AF_INET6][family], kind)
        server.settimeout(10)
        server.bind((b.addresses[family], 8080))
        if kind == socket.SOCK_STREAM:
            server.listen()
        return server

    def send() -> None:
        with socket.socket([socket.AF_INET, socket.AF_INET6][family], kind) as client:
            client.settimeout(10)
            client.connect((b.addresses[family], 8080))
            for chunk in chunks:
                client.sendall(chunk)
                if kind == socket.SOCK_DGRAM:
                    assert client.recv(2) == b"ok"  # one at a time: the test is of content, not of buffers

    with b.netns.call(listen) as server:
        sender = threading.Thread(target=a.netns.call, args=(send,))
        sender.start()
        if kind == socket.SOCK_STREAM:
            connection, peer = server.accept()
            with connection:
                received = b"".join(iter(lambda: connection.recv(65536), b""))
            assert peer[0] == a.addresses[family]
            assert received == b"".join(chunks)
        else:
            for chunk in chunks:
                received, peer = server.recvfrom(65536)
                server.sendto(b"ok", peer)
                assert (received, peer[0]) == (chunk, a.addresses[family])
        sender.join()


def test_interface_is_as_designed(pods: tuple[TestPod, TestPod]) -> None:
    """The pod's interface has /32 and /128 addresses without DAD, the uplink's MTU, a fixed MAC, permanent gateways."""
    a, _ = pods
    (eth0,) = json.loads(a.netns.run("ip", "-j", "-d", "address", "show", "eth0").stdout)
    assert (eth0["mtu"], eth0["address"], eth0["operstate"]) == (1500, a.mac, "UP")
    shown = {(each["local"], each["prefixlen"], each["scope"]) for each in eth0["addr_info"]}
    assert {(a.addresses[V4], 32, "global"), (a.addresses[V6], 128, "global")} < shown
    assert len(shown) == 3
    assert [each for each in eth0["addr_info"] if each.get("tentative")] == []
    neighbours = {each["dst"]: each["state"] for each in json.loads(a.netns.run("ip", "-j", "neigh").stdout)}
    assert neighbours == {"169.254.1.1": ["PERMANENT"], "fe80::1": ["PERMANENT"]}


def test_result_names_what_exists(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """ADD's result agrees with the kernel: devices, MACs, MTU, sandbox, addresses."""
    a, _ = pods
    host, inside = a.result["interfaces"]
    (device,) = json.loads(node.netns.run("ip", "-j", "link", "show", a.device).stdout)
    assert (host["mac"], host["mtu"]) == (device["address"], device["mtu"])
    assert device["ifalias"] == f"podlane:podlane/{a.container_id}/eth0"
    assert (inside["name"], inside["sandbox"]) == ("eth0", str(a.netns.path))
    assert [each["interface"] for each in a.result["ips"]] == [1, 1]


def test_nothing_is_dropped_or_repaired_in_normal_life(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """Wiring, pinging and unwiring pods drops no packet and needs no repair."""
    a, b = pods
    for family in (V4, V6):
        assert node.pings(a, b.addresses[family])
    node.delete_pod(b)
    assert [name for name, count in node.packets().items() if name.startswith("drop_") and count] == []
    assert [key for key, value in node.metrics().items() if key[0] == "podlane_repairs_total" and value] == []


@pytest.mark.usefixtures("pods")
def test_no_bridge_no_iptables(node: Machine) -> None:
    """There is no bridge, and no iptables or nftables rule."""
    assert node.netns.run("ip", "-o", "link", "show", "type", "bridge").stdout == ""
    assert node.netns.call(netfilter.tables) == []

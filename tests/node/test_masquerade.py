"""Pods and the world: under whose address packets go out, and that answers come back."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from scapy.layers.sctp import SCTP as SCTPHeader

from tests.node.echo import ESP, GRE, SCTP, TCP, UDP, client, raw_exchange, raw_socket, sctp, server, transfer, who
from tests.node.machine import Machine, Netns, TestPod, machine

V4, V6 = 0, 1
NODE = ["192.0.2.10", "2001:db8::10"]
NEIGHBOUR = ["192.0.2.1", "2001:db8::1"]
FAR = ["198.51.100.1", "2001:db8:f::1"]  # behind the neighbour
FIRST_PORT = 49152

families = pytest.mark.parametrize("family", [V4, V6])
kinds = pytest.mark.parametrize("kind", [TCP, UDP])
hooks = pytest.mark.parametrize("node", ["auto", "clsact"], indirect=True)


@pytest.fixture(scope="module", params=["auto"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that tests share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node"), hooks=request.param, resync_seconds=0.25) as it:
        it.add_world()
        it.start_agent()
        yield it


@pytest.fixture(scope="module")
def pod(node: Machine) -> TestPod:
    """Make a pod."""
    return node.make_pod("a")


@pytest.fixture
def world(node: Machine) -> Netns:
    """Return what is at the other end of the uplink."""
    return node.world


@contextmanager
def counted(node: Machine, **expected: int) -> Iterator[None]:
    """Assert that these outcomes grow by at least so many packets, and none of the drops."""
    before = node.packets()
    yield
    grown = {name: count - before[name] for name, count in node.packets().items() if count != before[name]}
    assert {name: min(grown.get(name, 0), count) for name, count in expected.items()} == expected, grown
    assert [name for name in grown if name.startswith("drop_")] == []


@hooks
@families
@kinds
def test_world_sees_the_node(node: Machine, pod: TestPod, world: Netns, family: int, kind: socket.SocketKind) -> None:
    """A pod's TCP and UDP reach the world under the node's address, by a port of the range, and are answered."""
    with server(world, kind, FAR[family], 7) as far, counted(node, fwd_uplink=1, masq_out=1, masq_in=1):
        address, port = who(pod.netns, far)
    assert address == NODE[family]
    assert FIRST_PORT <= port <= 65535


@hooks
@families
def test_ping(node: Machine, pod: TestPod, world: Netns, family: int) -> None:
    """Pings of the world are answered, each counted once in each direction, with a TTL as after one router."""
    with counted(node, masq_out=5, masq_in=5):
        assert node.pings(pod, FAR[family], "-t", "2", count=5)
    assert world.run("ping", "-c", "1", "-W", "2", NODE[family]).returncode == 0


@families
def test_own_port_is_kept(pod: TestPod, world: Netns, family: int) -> None:
    """A source port of the range stays as it is while it is free, and a second pod's flow gets another one."""
    with server(world, UDP, FAR[family], 7) as far, client(pod.netns, far, port=50000) as it:
        assert it.ask() == it.ask() == (NODE[family], 50000)


@families
def test_two_pods_with_one_port(node: Machine, pod: TestPod, world: Netns, family: int) -> None:
    """Two pods that use one source port to one destination are told apart by their ports outside."""
    other = node.make_pod("b")
    with (
        server(world, UDP, FAR[family], 7) as far,
        client(pod.netns, far, port=50001) as one,
        client(other.netns, far, port=50001) as two,
    ):
        asked = [one.ask(), two.ask(), one.ask(), two.ask()]
    assert asked[0] == asked[2] == (NODE[family], 50001)
    assert asked[1] == asked[3]
    assert asked[1] != asked[0]
    node.delete_pod(other)


def test_many_flows(node: Machine, pod: TestPod, world: Netns) -> None:
    """A thousand flows to one destination have a thousand ports outside, and all of them are answered."""
    with server(world, UDP, FAR[V4], 7) as far, ExitStack() as stack, counted(node, masq_out=2000, masq_in=2000):
        flows = [stack.enter_context(client(pod.netns, far)) for _ in range(1000)]
        first = [flow.ask() for flow in flows]
        assert [flow.ask() for flow in flows] == first
    assert len(set(first)) == 1000


@families
@kinds
def test_world_opens(node: Machine, pod: TestPod, world: Netns, family: int, kind: socket.SocketKind) -> None:
    """Who knows the way reaches a pod at its own address, and is answered from it."""
    with server(pod.netns, kind, pod.addresses[family], 7) as inside, counted(node, fwd_inbound=1, fwd_reply=1):
        assert who(world, inside)[0] in (NEIGHBOUR[family], FAR[family])


@families
def test_world_pings_pod(node: Machine, pod: TestPod, world: Netns, family: int) -> None:
    """The world's pings of a pod's own address are answered from it."""
    with counted(node, fwd_inbound=2, fwd_reply=2):
        done = world.run("ping", "-c", "2", "-i", "0.01", "-W", "2", pod.addresses[family])
    assert done.stdout.count(f"from {pod.addresses[family]}") == 2


@families
def test_node_itself(node: Machine, world: Netns, family: int) -> None:
    """The node's own connections are left alone."""
    with (
        server(world, TCP, FAR[family], 7) as far,
        counted(node, fwd_host_out=3, fwd_host_in=2),
        client(node.netns, far, port=20000) as it,
    ):
        assert it.ask() == (NODE[family], 20000)


@families
@kinds
def test_host_port_is_not_taken(
    node: Machine, pod: TestPod, world: Netns, family: int, kind: socket.SocketKind
) -> None:
    """A connection of the node's own, from a port of the range, is not disturbed by a pod that would like the port."""
    with server(world, kind, FAR[family], 7) as far, client(node.netns, far, port=50002) as own:
        assert own.ask() == (NODE[family], 50002)
        with client(pod.netns, far, port=50002) as other:
            assert other.ask()[1] != 50002
            assert own.ask() == (NODE[family], 50002)
            assert other.ask()[1] != 50002


@families
@pytest.mark.parametrize("protocol", [GRE, ESP, SCTP])
@pytest.mark.parametrize("size", [100, 4000])
def test_other_protocols(node: Machine, pod: TestPod, world: Netns, family: int, protocol: int, size: int) -> None:
    """Tunnels and SCTP, in fragments too, reach the world under the node's address, and are answered."""
    question, answer = (bytes(SCTPHeader(sport=here, dport=there)) + bytes(size) for here, there in ((5, 6), (6, 5)))
    with counted(node, fwd_uplink=1, masq_out=1, masq_in=1):
        assert raw_exchange(pod.netns, world, FAR[family], protocol, question, answer) == NODE[family]


@families
def test_sctp_of_two_pods(node: Machine, pod: TestPod, world: Netns, family: int) -> None:
    """Two pods that want one port have two, and the answers to both find them, all with the right CRC."""
    other = node.make_pod("b")
    with raw_socket(world, FAR[family], SCTP) as far:
        far.bind((FAR[family], 0))
        for here, port in ((pod.netns, {5}), (other.netns, range(FIRST_PORT, 65536))):
            with raw_socket(here, FAR[family], SCTP) as ours:
                ours.sendto(sctp(5, 6), (FAR[family], 0))
                heard, peer = far.recvfrom(65536)
                seen = int.from_bytes(heard[-len(sctp(5, 6)) :][:2], "big")
                assert seen in port
                assert heard.endswith(sctp(seen, 6))
                assert peer[0] == NODE[family]
                far.sendto(sctp(6, seen), (peer[0], 0))
                assert ours.recv(65536).endswith(sctp(6, 5))
    node.delete_pod(other)


@families
@pytest.mark.parametrize("direction", ["out", "in"])
def test_bulk(node: Machine, pod: TestPod, world: Netns, family: int, direction: str) -> None:
    """A hundred megabytes arrive as they were sent, in large (GSO) packets, and hardly any leaves the fast path."""
    before = node.packets()
    size = 100 << 20
    if direction == "out":
        sent, received, peer = transfer(pod.netns, world, FAR[family], size)
        assert peer == NODE[family]
    else:
        sent, received, peer = transfer(world, pod.netns, pod.addresses[family], size)
    after = node.packets()
    assert received == sent
    carried = "masq_out" if direction == "out" else "fwd_inbound"
    assert after[carried] - before[carried] < size / 1500  # so there were large ones
    assert after["punt_too_big"] - before["punt_too_big"] < 10


def test_port_range_is_reserved(node: Machine) -> None:
    """The node itself picks no port of the range (cilium#23539)."""
    reserved = node.netns.run("cat", "/proc/sys/net/ipv4/ip_local_reserved_ports").stdout.strip()
    assert reserved == f"{FIRST_PORT}-65535"

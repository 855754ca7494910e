"""Host ports for the node's own processes: they reach the pod as everybody else does, by any address of the node's."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.node.echo import TCP, UDP, bound, client, server, who
from tests.node.machine import Machine, Netns, TestPod, machine
from tests.node.test_host_ports import BOTH, OWN, PORT, answers, at, mapping, publish
from tests.node.test_masquerade import NEIGHBOUR, NODE, V4, families, kinds

LOOPBACK = ["127.0.0.1", "::1"]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that tests share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node"), resync_seconds=0.25) as it:
        it.add_world()
        it.start_agent()
        yield it


@pytest.fixture
def pod(node: Machine) -> Iterator[TestPod]:
    """Make a pod with a host port for TCP and UDP."""
    it = publish(node, *BOTH)
    yield it
    node.delete_pod(it)


@families
@kinds
@pytest.mark.parametrize("addresses", [NODE, LOOPBACK], ids=["own", "loopback"])
def test_the_node_asks(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind, addresses: list[str]) -> None:
    """The node reaches the pod by its own addresses and by loopback, under an address that the pod can answer."""
    place = at(addresses[family], kind)
    with server(pod.netns, kind, pod.addresses[family], OWN), client(node.netns, place) as it:
        address, port = it.ask()
        assert (address, port) == it.socket.getsockname()[:2]
        assert address not in LOOPBACK
        assert it.socket.getpeername()[:2] == (place.address, PORT)


@families
def test_unconnected(node: Machine, pod: TestPod, family: int) -> None:
    """A socket that only sends and receives datagrams hears from where it has sent them to."""
    here = "0.0.0.0" if family == V4 else "::"  # noqa: S104
    with (
        server(pod.netns, UDP, pod.addresses[family], OWN) as inside,
        bound(node.netns, UDP, here) as ours,
        server(node.netns, UDP, NODE[family], 7) as other,
    ):
        for place in (at(NODE[family], UDP), at(LOOPBACK[family], UDP), other):
            ours.sendto(b"?", (place.address, place.port))
            assert ours.recvfrom(1024)[1][:2] == (place.address, place.port)
        ours.sendto(b"?", (inside.address, inside.port))
        ours.recvfrom(1024)


@kinds
def test_ipv4_by_ipv6_sockets(node: Machine, pod: TestPod, kind: socket.SocketKind) -> None:
    """A socket for both families reaches it by the mapped form of an IPv4 address."""
    with server(pod.netns, kind, pod.addresses[V4], OWN), bound(node.netns, kind, "::") as ours:
        ours.connect((f"::ffff:{LOOPBACK[V4]}", PORT))
        ours.send(b"?")
        assert ours.recv(1024)
        assert ours.getpeername()[:2] == (f"::ffff:{LOOPBACK[V4]}", PORT)


@pytest.mark.usefixtures("pod")
@families
@kinds
def test_what_is_no_host_port(node: Machine, family: int, kind: socket.SocketKind) -> None:
    """Servers of the node's own at other ports, and at another machine's port of that number, are left alone."""
    with (
        server(node.netns, kind, NODE[family], PORT + 1) as own,
        server(node.world, kind, NEIGHBOUR[family], PORT) as theirs,
    ):
        for place in (own, theirs):
            assert who(node.netns, place)[0] == NODE[family]


@pytest.fixture
def bystander() -> Iterator[Netns]:
    """Make a network namespace that has the node's addresses, and is not the node."""
    it = Netns("bystander")
    for address in NODE:
        it.run("ip", "address", "add", address, "dev", "lo")
    yield it
    it.delete()


@families
@kinds
def test_others_on_this_kernel(pod: TestPod, bystander: Netns, family: int, kind: socket.SocketKind) -> None:
    """Another node or pod on the same kernel is not led astray, although its sockets pass the same programs."""
    with server(pod.netns, kind, pod.addresses[family], OWN):
        for address in (NODE[family], LOOPBACK[family]):
            with server(bystander, kind, address, PORT):
                assert who(bystander, at(address, kind))[0] == address
            with server(pod.netns, kind, LOOPBACK[family], PORT):
                assert who(pod.netns, at(LOOPBACK[family], kind))[0] == LOOPBACK[family]


@families
def test_at_one_address(node: Machine, family: int) -> None:
    """A host port at one address is not at the others, and one at a loopback address is the node's alone."""
    pod, own = publish(node, mapping(hostIP=NODE[family])), publish(node, mapping(hostIP=LOOPBACK[family]))
    for each, address, other, is_ours in ((pod, NODE, LOOPBACK, False), (own, LOOPBACK, NODE, True)):
        with server(each.netns, TCP, each.addresses[family], OWN):
            assert answers(node.netns, at(address[family], TCP))
            assert not answers(node.netns, at(other[family], TCP))
            assert answers(node.world, at(NODE[family], TCP)) is not is_ours
    for each in (pod, own):
        node.delete_pod(each)


@families
def test_the_agent_restarts(node: Machine, pod: TestPod, family: int) -> None:
    """The node reaches the pod while the agent is dead; a new one finds all as it was, and repairs it."""
    place = at(LOOPBACK[family], TCP)
    with server(pod.netns, TCP, pod.addresses[family], OWN):
        node.kill_agent()
        assert who(node.netns, place)
        node.start_agent()
        assert node.repairs() == {}
        assert who(node.netns, place)
        for pin in (node.bpffs / "sockets").iterdir():
            pin.unlink()
        node.wait_for(lambda: "sockets" in node.repairs(), "a repair")
        assert who(node.netns, place)

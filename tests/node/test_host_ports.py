"""Host ports on a real node: who reaches a pod by them, under which address it answers, and when they end."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import pytest

from tests.node.echo import SCTP, TCP, Server, bound, client, raw_socket, sctp, server, who
from tests.node.machine import Machine, Netns, Outcome, TestPod, machine
from tests.node.test_masquerade import NEIGHBOUR, NODE, V4, counted, families, kinds

PORT, OWN = 8080, 80


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that tests share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node"), resync_seconds=0.25) as it:
        it.add_world()
        it.start_agent()
        yield it


def mapping(protocol: str = "tcp", port: int = PORT, **more: object) -> dict[str, object]:
    """Return a mapping as runtimes write it."""
    return {"hostPort": port, "containerPort": OWN, "protocol": protocol, **more}


BOTH = (mapping("tcp"), mapping("udp"))
UNLIMITED: Mapping[str, int] = {}
RATE, BURST = 800_000_000, 1_600_000
LIMITED = {"ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE, "egressBurst": BURST}
"""Little enough that what is sent at once has to wait."""


def ask(node: Machine, netns: Netns, *mappings: dict[str, object], limits: Mapping[str, int] = UNLIMITED) -> Outcome:
    """ADD with these mappings, and limits of bandwidth."""
    config = {"runtimeConfig": {"portMappings": list(mappings), "bandwidth": limits}}
    return node.cni("ADD", container_id=netns.name, netns=str(netns.path), config=config)


def publish(node: Machine, *mappings: dict[str, object], limits: Mapping[str, int] = UNLIMITED) -> TestPod:
    """Make a pod with these mappings and limits."""
    netns = node.add_netns("served")
    outcome = ask(node, netns, *mappings, limits=limits)
    assert outcome.exit_code == 0, f"{outcome.stdout}\n{node.log_tail()}"
    return TestPod(netns, netns.name, outcome.json())


@pytest.fixture
def pod(node: Machine) -> Iterator[TestPod]:
    """Make a pod with a host port for TCP and UDP."""
    it = publish(node, *BOTH)
    yield it
    node.delete_pod(it)


def refused(outcome: Outcome, code: int, *words: str) -> None:
    """Check that ADD was refused with this code and words."""
    assert outcome.exit_code == 1, outcome.stdout
    error = outcome.json()
    assert error["code"] == code
    for word in words:
        assert word in error["msg"], error


def at(address: str, kind: socket.SocketKind, port: int = PORT) -> Server:
    """Return the place that clients ask: nothing runs there but a host port."""
    return Server(address, port, kind)


@families
@kinds
def test_from_the_world(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind) -> None:
    """The world asks the node's port and hears from there, and the pod sees who asks."""
    with server(pod.netns, kind, pod.addresses[family], OWN), counted(node, port_in=1, port_out=1):
        assert who(node.world, at(NODE[family], kind))[0] == NEIGHBOUR[family]


@families
@kinds
def test_from_a_pod(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind) -> None:
    """Another pod asks the node's port and hears from there; asked directly, the pod answers too."""
    other = node.make_pod("asking")
    with server(pod.netns, kind, pod.addresses[family], OWN) as inside, counted(node, port_local=2):
        assert who(other.netns, at(NODE[family], kind))[0] == other.addresses[family]
        assert who(other.netns, at(NODE[family], kind), port=5555)[0] == other.addresses[family]
        assert who(other.netns, inside, port=5555)[0] == other.addresses[family]
    node.delete_pod(other)


@families
@kinds
def test_from_itself(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind) -> None:
    """A pod that asks its own host port is answered, and takes the node for its client."""
    with server(pod.netns, kind, pod.addresses[family], OWN), counted(node, port_local=2):
        assert who(pod.netns, at(NODE[family], kind))[0] == NODE[family]


@families
@kinds
def test_own_flows_stay_masqueraded(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind) -> None:
    """A pod with host ports opens connections as any other: under the node's address."""
    with server(node.world, kind, NEIGHBOUR[family], 7) as far:
        assert who(pod.netns, far)[0] == NODE[family]


@families
@kinds
@pytest.mark.parametrize(("theirs", "ours"), [(LIMITED, UNLIMITED), (UNLIMITED, LIMITED), (LIMITED, LIMITED)])
def test_limited_pods(
    node: Machine, family: int, kind: socket.SocketKind, theirs: Mapping[str, int], ours: Mapping[str, int]
) -> None:
    """The same where the pod that serves, the one that asks, or both have limits: what waits is translated, too."""
    pod, other = publish(node, *BOTH, limits=theirs), publish(node, limits=ours)
    with server(pod.netns, kind, pod.addresses[family], OWN) as inside:
        assert who(node.world, at(NODE[family], kind))[0] == NEIGHBOUR[family]
        for port in (0, 5555):
            assert who(other.netns, at(NODE[family], kind), port=port)[0] == other.addresses[family]
            assert who(pod.netns, at(NODE[family], kind), port=port)[0] == NODE[family]
        assert who(other.netns, inside, port=5555)[0] == other.addresses[family]
        assert who(node.netns, inside, port=5555)
    for each in (pod, other):
        node.delete_pod(each)


@contextmanager
def invalid_dropped(node: Machine) -> Iterator[None]:
    """Let a node's firewall drop what conntrack calls invalid, as kube-proxy's rules do, for the duration."""
    rule = ("FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    for command in ("iptables", "ip6tables"):
        node.netns.run(command, "-A", *rule)
    try:
        yield
    finally:
        for command in ("iptables", "ip6tables"):
            node.netns.run(command, "-D", *rule)


@pytest.fixture
def strict(node: Machine) -> Iterator[None]:
    """Let the node have such a firewall."""
    with invalid_dropped(node):
        yield


@families
@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(("theirs", "ours"), [(LIMITED, UNLIMITED), (UNLIMITED, LIMITED)])
def test_limited_pods_and_conntrack(
    node: Machine, family: int, theirs: Mapping[str, int], ours: Mapping[str, int]
) -> None:
    """What goes through the stack for the sake of a limit does so both ways: no packet is invalid to conntrack."""
    pod, other = publish(node, *BOTH, limits=theirs), publish(node, limits=ours)
    with server(pod.netns, TCP, pod.addresses[family], OWN) as inside:
        by_port = at(NODE[family], TCP)
        for asker, place in (
            (node.world, by_port),
            (other.netns, by_port),
            (other.netns, inside),
            (pod.netns, by_port),
        ):
            with client(asker, place) as it:
                assert it.ask() == it.ask()
    for each in (pod, other):
        node.delete_pod(each)


def test_two_pods(node: Machine) -> None:
    """Two pods have ports of their own, and the same one at two addresses of the node's: each hears what is its own."""
    node.netns.run("ip", "address", "add", "192.0.2.11/24", "dev", "uplink")
    wanted = {"192.0.2.10": PORT, "192.0.2.11": PORT + 1}
    pods = [publish(node, mapping(port=port), mapping(port=1000, hostIP=ip)) for ip, port in wanted.items()]
    for pod, (address, port) in zip(pods, wanted.items(), strict=True):
        with server(pod.netns, TCP, pod.addresses[V4], OWN) as inside:
            for place in (at(NODE[V4], TCP, port), at(address, TCP, 1000)):
                node.wait_for(partial(answers, node.world, place), f"an answer from {place}")
            assert len(inside.peers) == 2
        node.delete_pod(pod)
    node.netns.run("ip", "address", "delete", "192.0.2.11/24", "dev", "uplink")


def answers(netns: Netns, place: Server) -> bool:
    """Say whether somebody answers there."""
    try:
        who(netns, place)
    except OSError:
        return False
    return True


def test_a_conflict_is_refused(node: Machine, pod: TestPod) -> None:
    """A host port that another pod has is refused with the pod's name, also at one address, and nothing is left."""
    before, netns = node.traces(), node.add_netns("late")
    refused(ask(node, netns, mapping("udp")), 105, "0.0.0.0:8080/udp", pod.container_id)
    refused(ask(node, netns, mapping("tcp", hostIP="2001:db8::10")), 105, "[2001:db8::10]:8080/tcp", pod.container_id)
    assert node.traces() == before
    node.delete_pod(publish(node, mapping("tcp", port=PORT + 1)))


@pytest.mark.parametrize(
    ("wanted", "code", "words"),
    [
        (mapping(port=50000), 7, "host port 50000 is one of those for masquerading (49152-65535)"),
        (mapping("dccp"), 2, '"dccp"'),
        (mapping("sctp", port=50000), 7, "host port 50000 is one of those for masquerading (49152-65535)"),
        (mapping("sctp", hostIP="::1"), 2, '"::1"'),
        (mapping(hostIP="fe80::1"), 2, '"fe80::1"'),
        (mapping(hostIP="nowhere"), 7, "hostIP"),
    ],
)
def test_refused_by_name(node: Machine, wanted: dict[str, object], code: int, words: str) -> None:
    """What cannot be is refused, with the reason, and leaves nothing."""
    before = node.traces()
    refused(ask(node, node.add_netns("refused"), wanted), code, words)
    assert node.traces() == before


@families
def test_sctp(node: Machine, family: int) -> None:
    """The world asks an SCTP port of the node's and hears from there, with the right CRC; a second pod has no such."""
    pod, theirs = publish(node, mapping("sctp")), NEIGHBOUR[family]
    refused(ask(node, node.add_netns("late"), mapping("sctp")), 105, "8080/sctp", pod.container_id)
    with raw_socket(node.world, theirs, SCTP) as outside, raw_socket(pod.netns, theirs, SCTP) as inside:
        outside.sendto(sctp(5, PORT), (NODE[family], 0))
        heard, peer = inside.recvfrom(65536)
        assert heard.endswith(sctp(5, OWN))
        inside.sendto(sctp(OWN, 5), (peer[0], 0))
        heard, peer = outside.recvfrom(65536)
        assert heard.endswith(sctp(PORT, 5))
        assert peer[0] == NODE[family]
    node.delete_pod(pod)


@families
def test_the_agent_restarts(node: Machine, pod: TestPod, family: int) -> None:
    """A connection by a host port goes on while the agent is dead, and after it; so does the port."""
    with (
        server(pod.netns, TCP, pod.addresses[family], OWN),
        client(node.world, at(NODE[family], TCP)) as it,
    ):
        assert it.ask()[0] == NEIGHBOUR[family]
        node.kill_agent()
        assert it.ask() == it.ask()
        assert who(node.world, at(NODE[family], TCP))[0] == NEIGHBOUR[family]
        node.start_agent()
        assert it.ask() == it.ask()
        assert who(node.world, at(NODE[family], TCP))[0] == NEIGHBOUR[family]


def test_del_ends_it(node: Machine) -> None:
    """With the pod its host port goes: the node answers for itself, and another pod may have the port."""
    first = publish(node, *BOTH)
    with server(first.netns, TCP, first.addresses[V4], OWN):
        assert answers(node.world, at(NODE[V4], TCP))
        node.delete_pod(first)
        assert not answers(node.world, at(NODE[V4], TCP))
    second = publish(node, *BOTH)
    with server(second.netns, TCP, second.addresses[V4], OWN):
        assert answers(node.world, at(NODE[V4], TCP))
    node.delete_pod(second)


@families
@pytest.mark.parametrize("limits", [UNLIMITED, LIMITED], ids=["unlimited", "limited"])
@pytest.mark.parametrize("asker", ["world", "pod", "itself"])
def test_bulk(node: Machine, family: int, asker: str, limits: Mapping[str, int]) -> None:
    """Megabytes arrive as they were sent, in both directions, whoever asks: in large (GSO) packets, too."""
    pod, other = publish(node, *BOTH, limits=limits), publish(node, limits=limits)
    place = {"world": node.world, "pod": other.netns, "itself": pod.netns}[asker]
    exchange(place, pod, NODE[family], PORT, hashlib.shake_128(asker.encode()).digest(20 << 20))
    for each in (pod, other):
        node.delete_pod(each)


def exchange(asker: Netns, pod: TestPod, address: str, port: int, data: bytes) -> None:
    """Connect to a pod by a host port, and assert that the data arrives as it was sent, in both directions."""
    (inside,) = (each for each in pod.addresses if (":" in each) == (":" in address))
    here = "::" if ":" in address else "0.0.0.0"  # noqa: S104
    with bound(pod.netns, TCP, inside, OWN) as listener, bound(asker, TCP, here) as ours:
        listener.listen()
        ours.connect((address, port))
        theirs, _ = listener.accept()
        with theirs:
            for sender, receiver in ((ours, theirs), (theirs, ours)):
                thread = threading.Thread(target=sender.sendall, args=(data,))
                thread.start()
                received = bytearray()
                while len(received) < len(data):
                    received += receiver.recv(1 << 20)
                thread.join()
                assert received == data

"""Host ports in a cluster, in every lane: pods of other nodes, those nodes themselves and the world reach them."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest

from tests.node.echo import UDP, Server, bound, server, who
from tests.node.internet import datagram_server
from tests.node.machine import Netns, TestPod
from tests.node.mesh import KINDS, Party
from tests.node.nodes import BOTH as FAMILIES
from tests.node.nodes import FAR, FIRST, PLACES, SECOND, WORLD, Member, Nodes, nodes
from tests.node.test_host_ports import BOTH, LIMITED, OWN, PORT, at, exchange, invalid_dropped, mapping, publish

LIMITED_PORT = PORT + 1
BULK = 4 << 20
BIGGEST = (65507, 65487)
"""Bytes of a datagram, by family: 64 KB less the headers."""

families = pytest.mark.parametrize("family", FAMILIES)


@dataclass
class Ports:
    """A cluster whose nodes have three pods each: one without, one with a host port, and a limited one with another."""

    nodes: Nodes
    plain: list[TestPod]
    served: list[TestPod]
    limited: list[TestPod]

    @property
    def hosts(self) -> list[Party]:
        """The nodes themselves."""
        return [Party.of(member.name, member.netns, member.addresses) for member in self.nodes.members]

    @property
    def world(self) -> Party:
        """The world behind the router."""
        return Party.of("world", self.nodes.world, WORLD)

    def parties(self, pods: Iterable[TestPod], what: str) -> list[Party]:
        """Return one kind of the pods as those who ask."""
        named = zip(self.nodes.members, pods, strict=True)
        return [Party.of(f"{what} pod on {member.name}", pod.netns, pod.addresses) for member, pod in named]

    def others(self, place: int) -> list[Party]:
        """Return all that are not on a node, but the limited pods."""
        each = (self.parties(self.plain, "plain"), self.parties(self.served, "served"), self.hosts)
        return [*(party for some in each for party in _but(place, some)), self.world]


def _but(place: int, parties: list[Party]) -> list[Party]:
    return parties[:place] + parties[place + 1 :]


@pytest.fixture(scope="module", params=["vxlan", "auto"])
def it(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ports]:
    """Yield a cluster of each kind; with `auto`, the second node is reached directly and the third one is not."""
    routing = str(request.param)
    limited = [mapping(kind, port=LIMITED_PORT) for kind in ("tcp", "udp")]
    with nodes(tmp_path_factory.mktemp("ports"), routing=routing) as made:
        made.start()
        yield Ports(
            made,
            made.make_pods(),
            [publish(member, *BOTH) for member in made.members],
            [publish(member, *limited, limits=LIMITED) for member in made.members],
        )


@contextmanager
def serving(pods: Iterable[TestPod]) -> Iterator[None]:
    """Run a server of each kind in these pods."""
    with ExitStack() as stack:
        for pod in pods:
            for address in pod.addresses:
                for kind in KINDS:
                    stack.enter_context(server(pod.netns, kind, address, OWN))
        yield


def said(asker: Party, to: Server) -> str:
    """Return whom a server takes somebody for, or what went wrong. Sockets are connected: they hear nobody else."""
    try:
        return who(asker.netns, to)[0]
    except OSError as error:
        return type(error).__name__


def check(ports: Ports, port: int, meetings: Iterable[tuple[Party, int]], wanted: str = "") -> None:
    """Assert of each (asker, place): the pod of that node that has the host port answers from there, and sees who asks.

    Or else all hear what is `wanted`.
    """
    wrong = {}
    for asker, place in meetings:
        for family, address in ports.hosts[place].addresses.items():
            for kind, name in KINDS.items():
                heard = said(asker, at(address, kind, port))
                if heard != (wanted or asker.addresses[family]):
                    wrong[f"{asker.name} → {address}, {name}"] = heard
    assert wrong == {}


@contextmanager
def strictest(node: Member) -> Iterator[None]:
    """Have a node filter by reverse path at the tunnel, too, for the duration: as if somebody had set all devices."""
    setting = "net/ipv4/conf/podlane.vx/rp_filter"
    before = node.netns.run("sysctl", "-ne", setting).stdout.strip()
    if before:
        node.netns.run("sysctl", "-qw", f"{setting}=1")
    try:
        yield
    finally:
        if before:
            node.netns.run("sysctl", "-qw", f"{setting}={before}")


def test_everybody(it: Ports) -> None:
    """Pods of other nodes, with and without host ports, those nodes and the world are answered, and seen as themselves.

    One of the nodes filters by reverse path: nodes that have called past the tunnel are answered past it.
    """
    with strictest(it.nodes.members[SECOND]), serving(it.served):
        check(it, PORT, ((asker, place) for place in PLACES for asker in it.others(place)))


def test_limited(it: Ports) -> None:
    """So are they by a limited pod, and limited pods by others; to a firewall no packet of theirs is invalid."""
    limited = it.parties(it.limited, "limited")
    with ExitStack() as stack:
        for member in it.nodes.members:
            stack.enter_context(invalid_dropped(member))
        with serving(it.limited), serving(it.served):
            for port in (LIMITED_PORT, PORT):
                check(it, port, ((asker, place) for place in PLACES for asker in _but(place, limited)))
            check(it, LIMITED_PORT, ((asker, place) for place in PLACES for asker in it.others(place)))


def test_the_node_itself(it: Ports) -> None:
    """A node reaches its own pod by its own port, under its own address."""
    with serving(it.served):
        check(it, PORT, ((host, place) for place, host in enumerate(it.hosts)))


@families
@pytest.mark.parametrize("kind", KINDS, ids=KINDS.values())
def test_both_ways(it: Ports, family: int, kind: socket.SocketKind) -> None:
    """Who asks a host port and then the pod itself from the same port, or the other way round, hears whom it asked."""
    for place, here in ((FAR, FIRST), (SECOND, FAR)):
        pod, asker = it.served[place], it.plain[here]
        ways = (at(it.hosts[place].addresses[family], kind), Server(pod.addresses[family], OWN, kind))
        with server(pod.netns, kind, pod.addresses[family], OWN):
            for port, order in ((5555, ways), (5556, ways[::-1])):
                assert [who(asker.netns, to, port=port)[0] for to in order] == [asker.addresses[family]] * 2


def test_nobody_listens(it: Ports) -> None:
    """Where no process has the pod's port, all are told so at once: also by UDP, with an error about what they sent."""
    check(it, PORT, ((asker, place) for place in PLACES for asker in it.others(place)), "ConnectionRefusedError")


@families
def test_bulk(it: Ports, family: int) -> None:
    """Megabytes arrive as they were sent, in both directions, whoever asks, and nothing is dropped."""
    data = hashlib.shake_128(bytes([family])).digest(BULK)
    before = [dropped(member.packets()) for member in it.nodes.members]
    for asker, place, pods, port in (
        (it.plain[FIRST].netns, FAR, it.served, PORT),
        (it.plain[FAR].netns, SECOND, it.served, PORT),
        (it.hosts[SECOND].netns, FAR, it.served, PORT),
        (it.nodes.world, FAR, it.served, PORT),
        (it.plain[FIRST].netns, FAR, it.limited, LIMITED_PORT),
        (it.limited[SECOND].netns, FAR, it.served, PORT),
    ):
        exchange(asker, pods[place], it.hosts[place].addresses[family], port, data)
    assert [dropped(member.packets()) for member in it.nodes.members] == before


def dropped(packets: dict[str, int]) -> dict[str, int]:
    """Return what was dropped, by outcome."""
    return {name: count for name, count in packets.items() if name.startswith("drop_")}


@families
def test_fragments(it: Ports, family: int) -> None:
    """The largest datagram arrives in fragments, and so does the answer, whoever asks."""
    question = hashlib.shake_128(bytes([family])).digest(BIGGEST[family])
    wrong = []
    for place in PLACES:
        pod = it.served[place]
        address = it.hosts[place].addresses[family]
        with datagram_server(pod.netns, pod.addresses[family], OWN, lambda heard: heard[::-1]):
            for asker in it.others(place):
                if asked(asker.netns, address, family, question) != question[::-1]:
                    wrong.append(f"{asker.name} → {address}")
    assert wrong == []


def asked(netns: Netns, address: str, family: int, question: bytes) -> bytes:
    """Return the answer to a datagram, or nothing if there is none."""
    with bound(netns, UDP, "0.0.0.0" if family == FAMILIES[0] else "::") as ours:  # noqa: S104
        ours.connect((address, PORT))
        ours.send(question)
        try:
            return ours.recv(65536)
        except TimeoutError:
            return b""

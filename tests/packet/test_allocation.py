"""How good ports are chosen when many are in use, under churn.

Statistics are compared with what chance allows at six standard deviations: once in 500,000,000 runs they fail for
nothing. Others retry one port further, or by a function that soon circles among a few ports (cilium#42870): at 75 % in
use they lose a third of the new flows.
"""

from __future__ import annotations

import math
import random
import socket
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import pairwise

import pytest

from agent.datapath.object import Object

from .harness import A, B, Pod
from .nat_frames import Body, frame, source_port
from .nat_talk import mac
from .nat_words import UDP, Message
from .world import NODE, ROUTER_MAC, SETTINGS, UPLINK_MAC, WORLD, Node, loaded_node, word

pytestmark = pytest.mark.root

PORTS = range(SETTINGS["first_port"], SETTINGS["last_port"] + 1)
OUTSIDE = range(1024, PORTS[0])
"""Ports of a pod's that it cannot keep."""

FLOWS = 1 << 15
SIGMAS = 6
TRIES = 10_000


class Destination:
    """A node and the UDP flows to one destination, by their pod's port: the node's port."""

    def __init__(self, node: Node, port: int = 53) -> None:
        self.node = node
        self.port = port
        self.flows: dict[tuple[Pod, int], int] = {}

    def open(self, pod: Pod, port: int) -> int | None:
        """Open a flow; return the node's port for it, which nobody else may have, or None if none was found."""
        ends = ip_address(pod.ipv4).packed, ip_address(WORLD[4]).packed
        message = Message(UDP, ends[0], port, ends[1], self.port)
        ran = self.node.out(frame(message, Body(b"?"), mac(UPLINK_MAC), mac(ROUTER_MAC)))
        if ran.outcome == "drop_masq_exhausted":
            return None
        assert ran.outcome == "masq_out"
        taken = source_port(ran.packet, message)
        assert taken in PORTS
        self.flows[pod, port] = taken
        return taken

    def close(self, pod: Pod, port: int) -> int:
        """End a flow, as the collector does; return the port that is free now."""
        taken = self.flows.pop((pod, port))
        maps = self.node.datapath.maps
        outside = {"destination": word(WORLD[4]), "destination_port": socket.htons(self.port), "protocol": UDP}
        answer = {"source": word(WORLD[4]), "source_port": socket.htons(self.port), "protocol": UDP}
        assert maps["flows"].delete({"source": word(pod.ipv4), "source_port": socket.htons(port), **outside})
        assert maps["owners"].delete({"destination": word(NODE[4]), "destination_port": socket.htons(taken), **answer})
        return taken

    def fill(self, share: float) -> Iterator[tuple[Pod, int]]:
        """Open flows until that share of the ports is in use; return source ports that are left, in random order."""
        sources = random.sample([(pod, port) for pod in (A, B) for port in OUTSIDE], 2 * len(OUTSIDE))
        left = iter(sources)
        while len(self.flows) < share * len(PORTS):
            self.open(*next(left))
        return left


@pytest.fixture(scope="module")
def large_node(datapath_object: Object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Load the real datapath with room for more flows than there are ports."""
    with loaded_node(datapath_object, tmp_path_factory.mktemp("large"), {"flows": FLOWS, "owners": FLOWS}) as node:
        yield node


@pytest.fixture
def node(large_node: Node) -> Node:
    """Provide the node without any flow."""
    large_node.reset()
    return large_node


def test_three_quarters_in_use(node: Node) -> None:
    """With 75 % of the ports to one destination in use, under churn, less than 0.1 % of 10,000 new flows fail.

    No two flows have one port, and those in use are scattered as chance would have it: probes do not die in clusters
    (cilium#42870).
    """
    destination = Destination(node)
    left = destination.fill(0.75)
    alive, failed = list(destination.flows), 0
    for _ in range(10_000):
        at = random.randrange(len(alive))
        destination.close(*alive[at])
        alive[at] = next(left)
        while destination.open(*alive[at]) is None:
            failed += 1
            alive[at] = next(left)
    assert failed < 10
    used = set(destination.flows.values())
    assert len(used) == len(alive) == 0.75 * len(PORTS)
    is_used = [port in used for port in PORTS]
    runs = 1 + sum(one != other for one, other in pairwise(is_used))
    # Wald and Wolfowitz: as many runs as in a random order of so many used and unused ports.
    mean = 2 * len(used) * (len(PORTS) - len(used)) / len(PORTS) + 1
    assert abs(runs - mean) < SIGMAS * math.sqrt((mean - 1) * (mean - 2) / (len(PORTS) - 1))


def test_every_port_is_as_likely(node: Node) -> None:
    """Ports are chosen evenly over the whole range, no less and no more so than by chance (chi-square)."""
    bins = Counter[int]()
    for port in range(1, 10_001):
        taken = Destination(node, port).open(A, 1024)
        assert taken
        bins[(taken - PORTS[0]) * 128 // len(PORTS)] += 1
    expected = bins.total() / 128
    statistic = sum((bins[number] - expected) ** 2 / expected for number in range(128))
    least, most = (chi_square(127, sigmas) for sigmas in (-SIGMAS, SIGMAS))
    assert least < statistic < most


def chi_square(freedom: int, sigmas: float) -> float:
    """Return the value that lies so far from the mean (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * freedom)
    return float(freedom * (1 - spread + sigmas * math.sqrt(spread)) ** 3)


def test_the_pods_own_port_is_kept(node: Node) -> None:
    """Though 75 % of the ports are in use, a pod's own port is kept if it is free, and is another one if it is not."""
    destination = Destination(node)
    destination.fill(0.75)
    used = set(destination.flows.values())
    for port in random.sample(PORTS, 1000):
        taken = destination.open(A, port)
        assert (taken == port) == (port not in used)
        if taken is not None:
            used.add(taken)


def test_the_number_of_probes(node: Node) -> None:
    """A flow fails after 32 random probes: with one free port of 64, that one is found as often as 32 tries would."""
    node.configure(first_port=PORTS[0], last_port=PORTS[0] + 63)
    destination = Destination(node)
    for port in PORTS[:64]:
        assert destination.open(B, port) == port
    free = destination.close(B, PORTS[7])
    found = 0
    for number in range(TRIES):
        source = OUTSIDE[number]
        if destination.open(A, source) is not None:
            assert destination.close(A, source) == free
            found += 1
    chance = 1 - (63 / 64) ** node.datapath.constants["PORT_PROBES"]
    assert node.datapath.constants["PORT_PROBES"] == 32
    assert abs(found - TRIES * chance) < SIGMAS * math.sqrt(TRIES * chance * (1 - chance))


def test_no_port_is_left(node: Node) -> None:
    """When every port is in use the next flow fails; the first that ends gives its port to the next that finds it."""
    node.configure(first_port=PORTS[0], last_port=PORTS[0] + 63)
    destination = Destination(node)
    for port in PORTS[:64]:
        assert destination.open(B, port) == port
    assert [destination.open(A, OUTSIDE[number]) for number in range(100)] == [None] * 100
    assert len(node.entries("owners")) == len(node.entries("flows")) == 64
    free = destination.close(B, PORTS[0])
    assert destination.open(A, free) == free

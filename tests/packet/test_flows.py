"""The life of masqueraded flows: ports, their two halves, exhaustion, TCP's states.

The numbers in brackets are failures that others reported; the test would show that one here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from scapy.all import TCP

from .cases import BELOW, BY_FAMILY, EACH, IN_RANGE, WITH_SOCKETS, back, opened, out
from .harness import PASS, A, B
from .world import (
    NODE,
    OTHER,
    Node,
    address_of,
    answer,
    arriving,
    built,
    delivered,
    leaving,
    request,
    source_port,
    word,
)

pytestmark = pytest.mark.root

REPLIED, FIN_OUT, FIN_IN, RESET = 1, 2, 4, 8
LONG_AGO = 1  # ns after boot, or the tick of that time


def state(node: Node) -> int:
    """Return the state of the only flow."""
    (flow,) = node.entries("flows").values()
    return int(flow["state"])


# ---- The two halves


@EACH
def test_a_lost_answers_half_is_put_back(node: Node, kind: str, family: int) -> None:
    """If the answers' half is lost, the flow keeps its port, and answers arrive again.

    cilium#29305, #34833, #35304: a map that evicts lost one half of a pair, and answers were dropped.
    """
    port = opened(node, kind, family, BELOW)
    node.alter("owners")
    assert back(node, kind, family, port).outcome == "fwd_host_in"
    node.alter("flows", checked=LONG_AGO)  # the other half is looked for once a second
    assert opened(node, kind, family, BELOW) == port
    assert back(node, kind, family, port).outcome == "masq_in"


@EACH
def test_a_lost_pods_half_is_put_back(node: Node, kind: str, family: int) -> None:
    """If the pod's half is lost, an answer puts it back, and so does a packet of the pod's: the port is the same.

    cilium#36572, #37747: the flow got another port, and the other side reset the connection.
    """
    port = opened(node, kind, family, BELOW)
    before = node.entries("flows").keys()
    node.alter("flows")
    assert back(node, kind, family, port).outcome == "masq_in"
    assert node.entries("flows").keys() == before
    assert opened(node, kind, family, BELOW) == port


@BY_FAMILY
def test_a_pod_finds_its_lost_half(node: Node, family: int) -> None:
    """Without its own half a pod gets its chosen port again, not another: it is still the owner of that one."""
    assert opened(node, "udp", family) == IN_RANGE
    node.alter("flows")
    assert opened(node, "udp", family) == IN_RANGE
    assert len(node.entries("owners")) == 1


@EACH
def test_a_port_lost_to_another(node: Node, kind: str, family: int) -> None:
    """A flow whose port was given to another pod meanwhile takes a new one: answers never go to the wrong pod."""
    assert opened(node, kind, family) == IN_RANGE
    node.alter("owners")
    assert opened(node, kind, family, pod=B) == IN_RANGE
    node.alter("flows", checked=LONG_AGO)
    port = opened(node, kind, family)
    assert port != IN_RANGE
    for pod, its_port in ((A, port), (B, IN_RANGE)):
        expected = built(delivered(family, pod) / answer(kind, family, IN_RANGE))
        assert back(node, kind, family, its_port).packet == expected
    assert len(node.entries("flows")) == len(node.entries("owners")) == 2


@EACH
def test_the_node_changes_its_address(node: Node, kind: str, family: int) -> None:
    """A flow under an address that is no longer the node's goes on under the new one, and gives its port back."""
    former = {4: "192.0.2.99", 6: "2001:db8:1::99"}[family]
    out(node, kind, family)
    ((key, owner),) = node.datapath.maps["owners"].items()
    node.alter("owners")
    node.datapath.maps["owners"].update({**key, "destination": word(former)}, owner)
    node.alter("flows", checked=LONG_AGO, address=word(former))
    ran = out(node, kind, family)
    assert ran.packet == built(leaving(family, NODE[family]) / request(kind, family, IN_RANGE))
    assert [owner[2] for owner in node.entries("owners")] == [NODE[family]]


# ---- Ports


@EACH
def test_exhaustion(node: Node, kind: str, family: int) -> None:
    """When no port is left to a destination, only the new flow is dropped; others go on (cilium#33074, #23604)."""
    node.configure(first_port=60000, last_port=60003)
    ports: dict[int, int] = {}
    for wanted in range(1000, 1100):
        ran = out(node, kind, family, wanted)
        if ran.outcome == "masq_out":
            ports[wanted] = source_port(kind, ran.packet, family)
        if len(ports) == 4:
            break
        assert ran.outcome in ("masq_out", "drop_masq_exhausted")
    assert sorted(ports.values()) == [60000, 60001, 60002, 60003]
    assert out(node, kind, family, 2000).outcome == "drop_masq_exhausted"
    assert len(node.entries("flows")) == len(node.entries("owners")) == 4
    for wanted, port in ports.items():
        assert opened(node, kind, family, wanted) == port
        assert back(node, kind, family, port).outcome == "masq_in"
    elsewhere = leaving(family, address_of(A, family), OTHER[family]) / request(kind, family, 2000)
    assert node.out(elsewhere).outcome == "masq_out"


def test_probes_are_random(node: Node) -> None:
    """Nearly all ports can be used before one flow fails: probes do not die in runs of used ports (cilium#42870)."""
    node.configure(first_port=60000, last_port=60199)
    outcomes = [out(node, "udp", 4, port).outcome for port in range(1000, 1150)]  # 75 % of the ports
    assert outcomes.count("masq_out") >= 148  # each of the last fails with a probability of 0.75 ** 32


@BY_FAMILY
def test_a_full_map(node: Node, family: int) -> None:
    """When the maps are full a new flow is dropped, counted apart, without leaving half a flow; others go on."""
    limit = node.datapath.maps["flows"].spec.max_entries
    first = opened(node, "udp", family, 20000)
    for port in range(20001, 20000 + limit):
        assert out(node, "udp", family, port).outcome == "masq_out"
    assert out(node, "udp", family, 40000).outcome == "drop_masq_full"
    assert len(node.entries("flows")) == len(node.entries("owners")) == limit
    assert opened(node, "udp", family, 20000) == first


@contextmanager
def host_socket(kind: str, family: int, port: int) -> Iterator[socket.socket]:
    """Open a socket of the host's on the node's address."""
    address_family = socket.AF_INET if family == 4 else socket.AF_INET6
    with socket.socket(address_family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as it:
        it.bind((NODE[family], port))
        if kind == "tcp":
            it.listen()
        yield it


@WITH_SOCKETS
def test_a_port_of_the_hosts(node: Node, kind: str, family: int) -> None:
    """A port on which the host has a socket is never taken, though the pod wants it (cilium#23604)."""
    with host_socket(kind, family, IN_RANGE):
        assert opened(node, kind, family) != IN_RANGE
        assert back(node, kind, family, IN_RANGE).outcome == "fwd_host_in"
    assert opened(node, kind, family, pod=B) == IN_RANGE


@EACH
def test_the_host_comes_later(node: Node, kind: str, family: int) -> None:
    """If the node itself sends from a port that a pod has, the port is the node's at once; the pod gets another."""
    assert opened(node, kind, family) == IN_RANGE
    hosts = leaving(family, NODE[family]) / request(kind, family, IN_RANGE)
    assert node.out(hosts, fast=False).outcome == "fwd_host_out"
    assert back(node, kind, family).outcome == "fwd_host_in"
    node.alter("flows", checked=LONG_AGO)
    port = opened(node, kind, family)
    assert port != IN_RANGE
    assert back(node, kind, family, port).outcome == "masq_in"
    assert back(node, kind, family).outcome == "fwd_host_in"


@BY_FAMILY
def test_the_nodes_pings(node: Node, family: int) -> None:
    """An identifier with which the node pings a host is not a pod's for that host, though no socket tells of it."""
    node.out(leaving(family, NODE[family]) / request("echo", family, IN_RANGE), fast=False)
    assert opened(node, "echo", family) != IN_RANGE
    assert back(node, "echo", family).outcome == "fwd_host_in"
    assert len(node.entries("flows")) == 1  # the node's own answers make none


@WITH_SOCKETS
def test_answers_of_the_nodes_take_no_ports(node: Node, kind: str, family: int) -> None:
    """What the node answers to outsiders leaves no trace, so that no flood from outside fills the map."""
    for port in range(60000, 60010):
        answer = request(kind, family, port)
        if kind == "tcp":
            answer[TCP].flags = "SA"
        node.out(leaving(family, NODE[family]) / answer, fast=False)
    assert node.entries("owners") == {}


@EACH
@pytest.mark.parametrize("port", [1, 22, 30000, 30880, 32767, 49151])
def test_ports_of_services(node: Node, kind: str, family: int, port: int) -> None:
    """Outside the range, where NodePorts, host ports and the node's own connections are, no flow ever has a port.

    cilium#16827, #33723, kubernetes#139276: answers went to the service that has the port.
    """
    assert opened(node, kind, family, port) in range(49152, 65536)
    assert back(node, kind, family, port).outcome == "fwd_host_in"


@BY_FAMILY
@pytest.mark.parametrize("port", [4789, 8472, 6081])
def test_tunnels_are_not_tracked(node: Node, family: int, port: int) -> None:
    """A tunnel's packets, whose source ports are hashes and whose answers never come there, leave no trace.

    cilium#26908: they did, and ports ran out.
    """
    for source in range(60000, 60100):
        ran = node.out(leaving(family, NODE[family]) / request("udp", family, source, to_port=port), fast=False)
        assert ran.outcome == "fwd_host_out"
        assert node.into(arriving(family, NODE[family]) / request("udp", family, source, to_port=port)).verdict == PASS
    for name in ("flows", "owners", "inbound", "conversations", "stack_flows"):
        assert node.entries(name) == {}


# ---- TCP


@BY_FAMILY
def test_states_of_a_connection(node: Node, family: int) -> None:
    """A connection's state follows its packets: answered, closed by one side, closed by both."""
    out(node, "tcp", family)
    assert state(node) == 0
    back(node, "tcp", family)
    assert state(node) == REPLIED
    out(node, "tcp", family, flags="A")
    assert state(node) == REPLIED
    out(node, "tcp", family, flags="FA")
    assert state(node) == REPLIED | FIN_OUT
    back(node, "tcp", family, flags="A")
    assert state(node) == REPLIED | FIN_OUT
    back(node, "tcp", family, flags="FA")
    assert state(node) == REPLIED | FIN_OUT | FIN_IN


@BY_FAMILY
def test_simultaneous_close(node: Node, family: int) -> None:
    """Two FINs that cross close the connection as well."""
    out(node, "tcp", family)
    back(node, "tcp", family)
    back(node, "tcp", family, flags="FA")
    assert state(node) == REPLIED | FIN_IN
    out(node, "tcp", family, flags="FA")
    assert state(node) == REPLIED | FIN_OUT | FIN_IN


@BY_FAMILY
@pytest.mark.parametrize("by_pod", [True, False])
def test_reset(node: Node, family: int, by_pod: bool) -> None:
    """A reset by either side closes the connection."""
    out(node, "tcp", family)
    if by_pod:
        out(node, "tcp", family, flags="R")
        assert state(node) == RESET
    else:
        back(node, "tcp", family, flags="RA")
        assert state(node) == REPLIED | RESET


@BY_FAMILY
def test_a_closed_connection_is_opened_again(node: Node, family: int) -> None:
    """A SYN opens a closed connection anew under the same port; an answer's SYN does not."""
    port = opened(node, "tcp", family, BELOW)
    for flags in ("FA", "R"):
        out(node, "tcp", family, BELOW, flags=flags)
        back(node, "tcp", family, port, flags="FA")
        closed = state(node)
        back(node, "tcp", family, port, flags="SA")
        assert state(node) == closed
        assert opened(node, "tcp", family, BELOW) == port
        assert state(node) == 0


@EACH
def test_every_packet_keeps_a_flow_alive(node: Node, kind: str, family: int) -> None:
    """Packets in both directions renew the time by which a flow is judged; only an answer makes it an answered one."""
    for send, expected in ((out, 0), (back, REPLIED)):
        node.alter("flows", seen=LONG_AGO)
        send(node, kind, family, flags="A")
        ((flow),) = node.entries("flows").values()
        assert flow["seen"] > LONG_AGO
        assert flow["state"] == expected


@BY_FAMILY
def test_protocols_do_not_mix(node: Node, family: int) -> None:
    """The same numbers in another protocol are another flow: it may have the same port, and answers tell them apart."""
    assert opened(node, "tcp", family) == IN_RANGE
    assert back(node, "udp", family).outcome == "fwd_host_in"
    assert opened(node, "udp", family, pod=B) == IN_RANGE
    assert back(node, "udp", family).packet == built(delivered(family, B) / answer("udp", family, IN_RANGE))
    assert back(node, "tcp", family).packet == built(delivered(family, A) / answer("tcp", family, IN_RANGE))

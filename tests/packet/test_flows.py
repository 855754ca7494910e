"""The life of masqueraded flows: ports, their two halves, exhaustion, TCP's states, notes of who opened what.

The numbers in brackets are failures that others reported; the test would show that one here.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product

import pytest

from .harness import A, B, Pod, Ran
from .world import (
    FAMILIES,
    KINDS,
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

EACH = pytest.mark.parametrize(("kind", "family"), list(product(KINDS, FAMILIES)))
BY_FAMILY = pytest.mark.parametrize("family", FAMILIES)

PORT = 50000
REPLIED, FIN_OUT, FIN_IN, RESET = 1, 2, 4, 8
LONG_AGO = 1  # ns after boot, or the tick of that time


def out(node: Node, kind: str, family: int, port: int = PORT, *, pod: Pod = A, flags: str = "S") -> Ran:
    """Send a packet of a pod's to the world."""
    return node.out(leaving(family, address_of(pod, family)) / request(kind, family, port, flags=flags))


def back(node: Node, kind: str, family: int, port: int = PORT, *, flags: str = "SA") -> Ran:
    """Send an answer to a port of the node's."""
    return node.into(arriving(family, NODE[family]) / answer(kind, family, port, flags=flags))


def moved(ran: Ran, kind: str, family: int) -> int:
    """Return the port with which a packet left."""
    assert ran.outcome == "masq_out"
    return source_port(kind, ran.packet, family)


def state(node: Node) -> int:
    """Return the state of the only flow."""
    (flow,) = node.entries("flows").values()
    return int(flow["state"])


# ---- The two halves


@EACH
def test_a_lost_answers_half_is_put_back(node: Node, kind: str, family: int) -> None:
    """If the answers' half is lost, the flow keeps its port, and answers arrive again (cilium#29305, #37747)."""
    port = moved(out(node, kind, family, 1234), kind, family)
    node.alter("owners")
    assert back(node, kind, family, port).outcome == "fwd_host_in"
    node.alter("flows", checked=LONG_AGO)  # the other half is looked for once a second
    assert moved(out(node, kind, family, 1234), kind, family) == port
    assert back(node, kind, family, port).outcome == "masq_in"


@EACH
def test_a_lost_pods_half_is_put_back(node: Node, kind: str, family: int) -> None:
    """If the pod's half is lost, an answer puts it back, and so does a packet of the pod's: the port is the same."""
    port = moved(out(node, kind, family, 1234), kind, family)
    before = node.entries("flows").keys()
    node.alter("flows")
    assert back(node, kind, family, port).outcome == "masq_in"
    assert node.entries("flows").keys() == before
    assert moved(out(node, kind, family, 1234), kind, family) == port


@BY_FAMILY
def test_a_pod_finds_its_lost_half(node: Node, family: int) -> None:
    """Without its own half a pod gets its chosen port again, not another: it is still the owner of that one."""
    assert moved(out(node, "udp", family), "udp", family) == PORT
    node.alter("flows")
    assert moved(out(node, "udp", family), "udp", family) == PORT
    assert len(node.entries("owners")) == 1


@EACH
def test_a_port_lost_to_another(node: Node, kind: str, family: int) -> None:
    """A flow whose port was given to another pod meanwhile takes a new one: answers never go to the wrong pod."""
    assert moved(out(node, kind, family), kind, family) == PORT
    node.alter("owners")
    assert moved(out(node, kind, family, pod=B), kind, family) == PORT
    node.alter("flows", checked=LONG_AGO)
    port = moved(out(node, kind, family), kind, family)
    assert port != PORT
    for pod, its_port in ((A, port), (B, PORT)):
        expected = built(delivered(family, pod) / answer(kind, family, PORT))
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
    assert ran.packet == built(leaving(family, NODE[family]) / request(kind, family, PORT))
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
        assert moved(out(node, kind, family, wanted), kind, family) == port
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
    first = moved(out(node, "udp", family, 20000), "udp", family)
    for port in range(20001, 20000 + limit):
        assert out(node, "udp", family, port).outcome == "masq_out"
    assert out(node, "udp", family, 40000).outcome == "drop_masq_full"
    assert len(node.entries("flows")) == len(node.entries("owners")) == limit
    assert moved(out(node, "udp", family, 20000), "udp", family) == first


@contextmanager
def host_socket(kind: str, family: int, port: int) -> Iterator[socket.socket]:
    """Open a socket of the host's on the node's address."""
    address_family = socket.AF_INET if family == 4 else socket.AF_INET6
    with socket.socket(address_family, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as it:
        it.bind((NODE[family], port))
        if kind == "tcp":
            it.listen()
        yield it


@pytest.mark.parametrize(("kind", "family"), list(product(("tcp", "udp"), FAMILIES)))
def test_a_port_of_the_hosts(node: Node, kind: str, family: int) -> None:
    """A port on which the host has a socket is never taken, though the pod wants it (cilium#16827, #34041)."""
    with host_socket(kind, family, PORT):
        assert moved(out(node, kind, family), kind, family) != PORT
        assert back(node, kind, family, PORT).outcome == "fwd_host_in"
    assert moved(out(node, kind, family, pod=B), kind, family) == PORT


@EACH
def test_the_host_comes_later(node: Node, kind: str, family: int) -> None:
    """If the node itself sends from a port that a pod has, the port is the node's at once; the pod gets another."""
    assert moved(out(node, kind, family), kind, family) == PORT
    hosts = leaving(family, NODE[family]) / request(kind, family, PORT)
    assert node.out(hosts, fast=False).outcome == "fwd_host_out"
    assert back(node, kind, family).outcome == "fwd_host_in"
    node.alter("flows", checked=LONG_AGO)
    port = moved(out(node, kind, family), kind, family)
    assert port != PORT
    assert back(node, kind, family, port).outcome == "masq_in"
    assert back(node, kind, family).outcome == "fwd_host_in"


@BY_FAMILY
def test_the_nodes_pings(node: Node, family: int) -> None:
    """An identifier with which the node pings a host is not a pod's for that host, though no socket tells of it."""
    node.out(leaving(family, NODE[family]) / request("echo", family, PORT), fast=False)
    assert moved(out(node, "echo", family), "echo", family) != PORT
    assert back(node, "echo", family).outcome == "fwd_host_in"
    assert len(node.entries("flows")) == 1  # the node's own answers make none


@pytest.mark.parametrize(("kind", "family"), list(product(("tcp", "udp"), FAMILIES)))
def test_answers_of_the_nodes_take_no_ports(node: Node, kind: str, family: int) -> None:
    """What the node answers to outsiders leaves no trace, so that no flood from outside fills the map."""
    for port in range(60000, 60010):
        node.out(leaving(family, NODE[family]) / request(kind, family, port), fast=False)
    assert node.entries("owners") == {}


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
    port = moved(out(node, "tcp", family, 1234), "tcp", family)
    for flags in ("FA", "R"):
        out(node, "tcp", family, 1234, flags=flags)
        back(node, "tcp", family, port, flags="FA")
        closed = state(node)
        back(node, "tcp", family, port, flags="SA")
        assert state(node) == closed
        assert moved(out(node, "tcp", family, 1234), "tcp", family) == port
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


# ---- Flows that outsiders open


@EACH
def test_inbound_flows_keep_the_pods_address(node: Node, kind: str, family: int) -> None:
    """An outsider reaches a pod under its own address, and the answer has that address and no port of the node's."""
    pod = address_of(A, family)
    came = node.into(arriving(family, pod) / request(kind, family, 5000))
    assert came.outcome == "fwd_inbound"
    assert came.packet == built(delivered(family, A) / request(kind, family, 5000))
    replied = leaving(family, pod) / answer(kind, family, 5000)
    assert node.out(replied).outcome == "fwd_reply"
    assert node.entries("flows") == node.entries("owners") == {}


@EACH
def test_a_forged_note_opens_nothing_to_others(node: Node, kind: str, family: int) -> None:
    """A packet from outside lets the pod answer its sender, from that port: nobody else, and from no other."""
    pod = address_of(A, family)
    node.into(arriving(family, pod) / request(kind, family, 5000))
    elsewhere = leaving(family, pod, OTHER[family]) / answer(kind, family, 5000)
    assert node.out(elsewhere).outcome in ("masq_out", "drop_masq_unsupported")
    assert node.out(leaving(family, pod) / answer(kind, family, 5001)).outcome in ("masq_out", "drop_masq_unsupported")


@BY_FAMILY
def test_a_forged_note_does_not_expose_a_connection(node: Node, family: int) -> None:
    """Whatever an outsider sent before, a connection that the pod opens is masqueraded, all of it (cilium#47425)."""
    pod = address_of(A, family)
    for flags in ("S", "SA", "A", "RA"):
        node.into(arriving(family, pod) / answer("tcp", family, PORT, flags=flags))
    assert len(node.entries("inbound")) == 1
    for flags in ("S", "A", "PA", "FA"):
        assert out(node, "tcp", family, flags=flags).outcome == "masq_out"


@pytest.mark.parametrize(("kind", "family"), list(product(("udp", "tcp"), FAMILIES)))
def test_no_note_about_a_pods_own_flow(node: Node, kind: str, family: int) -> None:
    """What comes to the pod's address in a flow that the pod has opened itself does not end its masquerading."""
    out(node, kind, family)
    assert node.into(arriving(family, address_of(A, family)) / answer(kind, family, PORT)).outcome == "fwd_inbound"
    assert node.entries("inbound") == {}
    assert out(node, kind, family, flags="A").outcome == "masq_out"


@BY_FAMILY
def test_a_stale_note(node: Node, family: int) -> None:
    """A note that was quiet for longer than UDP flows live does not let a new flow out as it is (cilium#47425)."""
    pod = address_of(A, family)
    node.into(arriving(family, pod) / answer("udp", family, PORT))
    (note,) = node.entries("inbound").values()
    second = 1_000_000_000
    node.alter_values("inbound", note - 290 * second)
    assert out(node, "udp", family).outcome == "fwd_reply"
    node.alter_values("inbound", note - 310 * second)
    assert out(node, "udp", family).outcome == "masq_out"


@BY_FAMILY
def test_notes_are_renewed(node: Node, family: int) -> None:
    """Packets in either direction keep a note alive, so that an inbound flow lasts as long as it is used."""
    pod = address_of(A, family)
    node.into(arriving(family, pod) / answer("udp", family, PORT))
    (note,) = node.entries("inbound").values()
    older = note - 200 * 1_000_000_000
    node.alter_values("inbound", older)
    node.into(arriving(family, pod) / answer("udp", family, PORT))
    assert next(iter(node.entries("inbound").values())) >= note
    node.alter_values("inbound", older)
    assert out(node, "udp", family).outcome == "fwd_reply"
    assert next(iter(node.entries("inbound").values())) >= note


@BY_FAMILY
def test_a_quiet_connection_from_outside(node: Node, family: int) -> None:
    """A connection that an outsider opened may be quiet for any time: TCP tells a new one by its SYN."""
    pod = address_of(A, family)
    node.into(arriving(family, pod) / request("tcp", family, 5000))
    node.alter_values("inbound", LONG_AGO)
    assert node.out(leaving(family, pod) / answer("tcp", family, 5000, flags="PA")).outcome == "fwd_reply"


def test_a_flood_from_outside(node: Node) -> None:
    """Any number of outsiders' flows leave masqueraded ones alone: theirs are elsewhere, and push out each other."""
    port = moved(out(node, "tcp", 4), "tcp", 4)
    for number in range(2000):
        node.into(arriving(4, A.ipv4, OTHER[4]) / request("tcp", 4, 1024 + number, data=b""))
    assert len(node.entries("inbound")) <= node.datapath.maps["inbound"].spec.max_entries
    assert back(node, "tcp", 4, port).outcome == "masq_in"
    assert out(node, "tcp", 4, 1234).outcome == "masq_out"
    assert len(node.entries("flows")) == 2


@BY_FAMILY
def test_protocols_do_not_mix(node: Node, family: int) -> None:
    """The same numbers in another protocol are another flow: it may have the same port, and answers tell them apart."""
    assert moved(out(node, "tcp", family), "tcp", family) == PORT
    assert back(node, "udp", family).outcome == "fwd_host_in"
    assert moved(out(node, "udp", family, pod=B), "udp", family) == PORT
    assert back(node, "udp", family).packet == built(delivered(family, B) / answer("udp", family, PORT))
    assert back(node, "tcp", family).packet == built(delivered(family, A) / answer("tcp", family, PORT))

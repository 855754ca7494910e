"""Host ports: what comes to the node's port goes to the pod, and its answers come from the node's port. Byte-exact."""

from __future__ import annotations

import socket
from typing import Any

import pytest
from scapy.all import ICMP, IP, UDP, ICMPv6PacketTooBig, Packet

from .cases import BY_FAMILY, IN_RANGE, WITH_PORTS, out
from .harness import PASS, REDIRECT, A, B, Pod
from .world import (
    NODE,
    WORLD,
    Node,
    address_of,
    answer,
    arriving,
    built,
    delivered,
    from_pod,
    leaving,
    request,
    word,
)

pytestmark = pytest.mark.root

CLIENT = 5000
HOST, OWN = 8080, 80
"""The port of the node's, and the pod's."""


def error(family: int, about: Packet) -> Packet:
    """Return an ICMP error, "too big", about the IP packet of a frame."""
    start = ICMP(type=3, code=4, nexthopmtu=1280) if family == 4 else ICMPv6PacketTooBig(mtu=1280)
    return start / built(about)[14:]


ANY = {4: "0.0.0.0", 6: "::"}  # noqa: S104
NUMBER = {"tcp": 6, "udp": 17, "sctp": 132}


def publish(
    node: Node, kind: str, family: int, *, pod: Pod = A, at: str = "", port: int = HOST, own: int = OWN
) -> None:
    """Make a port of the node's lead to a pod's: at that address, by default at any."""
    key = {"address": word(at or ANY[family]), "port": socket.htons(port), "protocol": NUMBER[kind]}
    node.datapath.maps["host_ports"].update(key, {"address": word(address_of(pod, family)), "port": socket.htons(own)})
    node.alter_endpoints(pod, serves=1)


def call(kind: str, family: int, *, flags: str = "S", port: int = HOST, data: bytes = b"payload") -> Packet:
    """Return what an outsider sends to the node's port."""
    return arriving(family, NODE[family]) / request(kind, family, CLIENT, to_port=port, flags=flags, data=data)


@WITH_PORTS
def test_from_outside_and_back(node: Node, kind: str, family: int) -> None:
    """An outsider's packet to the node's port reaches the pod's, and the pod's answer comes from the node's port."""
    publish(node, kind, family)
    came = node.into(call(kind, family))
    assert (came.outcome, came.verdict) == ("port_in", REDIRECT)
    assert came.packet == built(delivered(family, A) / request(kind, family, CLIENT, to_port=OWN))
    replied = node.out(leaving(family, address_of(A, family)) / answer(kind, family, CLIENT, to_port=OWN))
    assert replied.outcome == "port_out"
    assert replied.packet == built(leaving(family, NODE[family]) / answer(kind, family, CLIENT, to_port=HOST))
    assert node.entries("flows") == node.entries("owners") == {}


@WITH_PORTS
def test_what_is_no_host_port(node: Node, kind: str, family: int) -> None:
    """Another port, another protocol, and the port at another address than the one it was given stay the node's."""
    other = {"tcp": "udp", "udp": "sctp", "sctp": "tcp"}[kind]
    publish(node, kind, family)
    assert node.into(call(kind, family, port=HOST + 1)).outcome == "fwd_host_in"
    assert node.into(call(other, family)).outcome == "fwd_host_in"
    publish(node, other, family, at=WORLD[family])
    assert node.into(call(other, family)).outcome == "fwd_host_in"
    publish(node, other, family, at=NODE[family])
    assert node.into(call(other, family)).outcome == "port_in"


@WITH_PORTS
def test_one_address_counts_before_any(node: Node, kind: str, family: int) -> None:
    """A port that leads elsewhere at one address of the node's leads there."""
    publish(node, kind, family, pod=A)
    publish(node, kind, family, pod=B, at=NODE[family])
    assert node.into(call(kind, family)).packet == built(
        delivered(family, B) / request(kind, family, CLIENT, to_port=OWN)
    )


@WITH_PORTS
def test_a_conversation_keeps_its_name(node: Node, kind: str, family: int) -> None:
    """Once answered and carried on, the flow is noted among the conversations, with the node's port."""
    publish(node, kind, family)
    answered = leaving(family, address_of(A, family)) / answer(kind, family, CLIENT, to_port=OWN)
    node.into(call(kind, family))
    node.out(answered)
    assert node.into(call(kind, family, flags="A")).outcome == "port_in"
    assert node.entries("inbound") == {}
    ((_, note),) = node.entries("conversations").items()
    assert note["port"] == socket.htons(HOST)
    assert node.out(answered).outcome == "port_out"


@WITH_PORTS
def test_the_pods_own_address_is_another_way(node: Node, kind: str, family: int) -> None:
    """Who calls the pod itself, with ports that a flow to the node's port had, hears from the pod itself."""
    publish(node, kind, family)
    pod = address_of(A, family)
    replied = leaving(family, pod) / answer(kind, family, CLIENT, to_port=OWN)
    node.into(call(kind, family))
    direct = arriving(family, pod) / request(kind, family, CLIENT, to_port=OWN)
    assert node.into(direct).outcome == "fwd_inbound"
    assert node.out(replied).outcome == "fwd_reply"
    node.into(call(kind, family))
    assert node.out(replied).outcome == "port_out"


@WITH_PORTS
def test_between_pods(node: Node, kind: str, family: int) -> None:
    """A pod reaches another by the node's port, and hears from there; past the host stack, in both directions."""
    publish(node, kind, family, pod=B)
    came = node.leave(from_pod(family, A, NODE[family]) / request(kind, family, CLIENT, to_port=HOST))
    assert came.outcome == "port_local"
    assert came.packet == built(
        _handed(family, A, B, address_of(A, family), address_of(B, family)) / request(kind, family, CLIENT, to_port=OWN)
    )
    replied = from_pod(family, B, address_of(A, family)) / answer(kind, family, CLIENT, to_port=OWN)
    back = node.leave(replied, pod=B)
    assert back.outcome == "port_local"
    assert back.packet == built(
        _handed(family, B, A, NODE[family], address_of(A, family)) / answer(kind, family, CLIENT, to_port=HOST)
    )


@WITH_PORTS
def test_directly_between_pods(node: Node, kind: str, family: int) -> None:
    """A flow to the other pod's own address, with the ports that one to the node's port had, is left as it is."""
    publish(node, kind, family, pod=B)
    node.leave(from_pod(family, A, NODE[family]) / request(kind, family, CLIENT, to_port=HOST))
    direct = from_pod(family, A, address_of(B, family)) / request(kind, family, CLIENT, to_port=OWN)
    assert node.leave(direct).outcome == "fwd_local"
    replied = from_pod(family, B, address_of(A, family)) / answer(kind, family, CLIENT, to_port=OWN)
    assert node.leave(replied, pod=B).outcome == "fwd_local"


@WITH_PORTS
def test_a_pod_calls_itself(node: Node, kind: str, family: int) -> None:
    """A pod that calls its own host port hears the node, on both sides."""
    publish(node, kind, family)
    pod = address_of(A, family)
    came = node.leave(from_pod(family, A, NODE[family]) / request(kind, family, CLIENT, to_port=HOST))
    assert came.outcome == "port_local"
    assert came.packet == built(_handed(family, A, A, NODE[family], pod) / request(kind, family, CLIENT, to_port=OWN))
    replied = from_pod(family, A, NODE[family]) / answer(kind, family, CLIENT, to_port=OWN)
    back = node.leave(replied)
    assert back.outcome == "port_local"
    assert back.packet == built(_handed(family, A, A, NODE[family], pod) / answer(kind, family, CLIENT, to_port=HOST))


@WITH_PORTS
def test_the_node_calls_the_pod(node: Node, kind: str, family: int) -> None:
    """The node's own flow to a pod is not taken for one that the pod had with itself."""
    publish(node, kind, family)
    node.leave(from_pod(family, A, NODE[family]) / request(kind, family, CLIENT, to_port=HOST))
    node.to_pod(arriving(family, address_of(A, family), NODE[family]) / request(kind, family, CLIENT, to_port=OWN))
    replied = from_pod(family, A, NODE[family]) / answer(kind, family, CLIENT, to_port=OWN)
    assert node.leave(replied).outcome == "punt_host"


@WITH_PORTS
def test_pods_own_flows_stay_masqueraded(node: Node, kind: str, family: int) -> None:
    """What a pod with host ports opens itself leaves as ever, and what comes back is given back."""
    publish(node, kind, family)
    assert out(node, kind, family, IN_RANGE).outcome == "masq_out"
    assert node.into(arriving(family, NODE[family]) / answer(kind, family, IN_RANGE)).outcome == "masq_in"


@WITH_PORTS
def test_errors_on_the_way_back(node: Node, kind: str, family: int) -> None:
    """An error of a router's about what the pod answered reaches the pod, about what the pod has sent."""
    publish(node, kind, family)
    node.into(call(kind, family))
    seen = leaving(family, NODE[family]) / answer(kind, family, CLIENT, to_port=HOST)
    sent = leaving(family, address_of(A, family)) / answer(kind, family, CLIENT, to_port=OWN)
    came = node.into(arriving(family, NODE[family], WORLD[family]) / error(family, seen))
    assert came.outcome == "port_in"
    assert came.packet == built(delivered(family, A, WORLD[family]) / error(family, sent))


@WITH_PORTS
def test_errors_of_the_pod(node: Node, kind: str, family: int) -> None:
    """An error of the pod's, or of the node's in its place, is about what the outsider has sent."""
    publish(node, kind, family)
    node.into(call(kind, family))
    got = arriving(family, address_of(A, family), ttl=63) / request(kind, family, CLIENT, to_port=OWN)
    sent = arriving(family, NODE[family], ttl=63) / request(kind, family, CLIENT, to_port=HOST)
    for source in (address_of(A, family), NODE[family]):
        told = node.out(leaving(family, source) / error(family, got))
        assert told.outcome == "port_out"
        assert told.packet == built(leaving(family, NODE[family]) / error(family, sent))


def test_fragments(node: Node) -> None:
    """All fragments of a datagram to a host port reach the pod, and those of its answer come from the node's port."""
    publish(node, "udp", 4)
    payload = bytes(range(200))
    whole = bytes(UDP(sport=CLIENT, dport=HOST, chksum=0) / payload)
    for number, (start, end) in enumerate([(0, 104), (104, 208)]):
        fields: dict[str, Any] = {"id": 7, "frag": start // 8, "flags": "" if number else "MF", "proto": 17}
        came = node.into(arriving(4, NODE[4], **fields) / whole[start:end])
        assert came.outcome == "port_in"
        assert IP(came.packet[14:]).dst == A.ipv4
    whole = bytes(UDP(sport=OWN, dport=CLIENT, chksum=0) / payload)
    for number, (start, end) in enumerate([(0, 104), (104, 208)]):
        fields = {"id": 8, "frag": start // 8, "flags": "" if number else "MF", "proto": 17}
        left = node.out(leaving(4, A.ipv4, **fields) / whole[start:end])
        assert left.outcome == "port_out"
        assert IP(left.packet[14:]).src == NODE[4]


def test_fragments_between_pods(node: Node) -> None:
    """All fragments of a datagram by a host port reach the pod, and those of its answer come from the node's port."""
    publish(node, "udp", 4, pod=B)
    there = bytes(UDP(sport=CLIENT, dport=HOST, chksum=0) / bytes(200))
    back = bytes(UDP(sport=OWN, dport=CLIENT, chksum=0) / bytes(200))
    for sender, target, source, destination, whole in (
        (A, NODE[4], A.ipv4, B.ipv4, there),
        (B, A.ipv4, NODE[4], A.ipv4, back),
    ):
        for start, end in ((0, 104), (104, 208)):
            fields: dict[str, Any] = {"id": 7, "frag": start // 8, "flags": "" if start else "MF", "proto": 17}
            ran = node.leave(from_pod(4, sender, target, **fields) / whole[start:end], pod=sender)
            assert ran.outcome == "port_local"
            assert (IP(ran.packet[14:]).src, IP(ran.packet[14:]).dst) == (source, destination)


@BY_FAMILY
def test_other_networks(node: Node, family: int) -> None:
    """A pod of a network of its own does not reach others by a host port either: it is the stack's."""
    publish(node, "udp", family, pod=B)
    node.alter_endpoints(A, network=1)
    called = from_pod(family, A, NODE[family]) / request("udp", family, CLIENT, to_port=HOST)
    assert node.leave(called).outcome == "punt_host"


@WITH_PORTS
def test_unmasqueraded_pods_answer_too(node: Node, kind: str, family: int) -> None:
    """A pod that is never masqueraded answers from the host port by which it was called."""
    publish(node, kind, family)
    node.alter_endpoints(A, native=1)
    node.into(call(kind, family))
    replied = node.out(leaving(family, address_of(A, family)) / answer(kind, family, CLIENT, to_port=OWN))
    assert replied.outcome == "port_out"


@WITH_PORTS
def test_a_spent_ttl_is_the_stacks(node: Node, kind: str, family: int) -> None:
    """What must not go on is left to the stack, addressed to the pod: so its error, too, finds the way back."""
    publish(node, kind, family)
    came = node.into(arriving(family, NODE[family], ttl=1) / request(kind, family, CLIENT, to_port=HOST))
    assert (came.outcome, came.verdict) == ("port_in", PASS)


def test_the_nodes_own_connection_wins(node: Node) -> None:
    """Answers to a connection that the node itself has opened from the port are the node's."""
    publish(node, "udp", 4)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind((NODE[4], HOST))
        assert node.into(call("udp", 4)).outcome == "port_in"
        node.reset()
        publish(node, "udp", 4)
        own.connect((WORLD[4], CLIENT))
        assert node.into(call("udp", 4)).outcome == "fwd_host_in"


def _handed(family: int, sender: Pod, receiver: Pod, source: str, destination: str) -> Packet:
    """Return the headers of what a pod of this node gets, with one hop less than it came with."""
    packet = from_pod(family, sender, destination, ttl=63)
    packet.src, packet.dst = packet.dst, receiver.mac
    packet.payload.src = source
    return packet

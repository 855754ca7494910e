"""Fragments: ports come from the first one, and the others follow it.

Others lost them by this rule's edges. What happens at each is stated here, with the number of the report.
"""

from __future__ import annotations

import pytest
from scapy.all import IP, IPv6, IPv6ExtHdrFragment, Packet, Raw, fragment

from .cases import BELOW, EACH
from .harness import PASS, REDIRECT, A, B
from .world import (
    KINDS,
    NATIVE,
    NODE,
    OTHER,
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
    source_port,
)

pytestmark = pytest.mark.root

DATA = bytes(number % 251 for number in range(4000))
LARGE = bytes(number % 251 for number in range(65000))


def fragments(packet: Packet, *, size: int = 1200, identification: int = 7) -> list[bytes]:
    """Cut a packet into fragments, the transport checksum computed over the whole."""
    whole = type(packet)(built(packet))
    if isinstance(whole.payload, IP):
        whole[IP].id = identification
        del whole[IP].chksum
        return [built(piece) for piece in fragment(whole, fragsize=size)]
    ip = whole[IPv6]
    content, following = built(packet)[14 + 40 :], ip.nh
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    headers = whole.copy()
    headers[IPv6].remove_payload()
    return [
        built(
            headers.__class__(built(headers)[:14])
            / IPv6(src=ip.src, dst=ip.dst, hlim=ip.hlim)
            / IPv6ExtHdrFragment(nh=following, offset=number * size // 8, m=number < len(pieces) - 1, id=identification)
            / Raw(piece)
        )
        for number, piece in enumerate(pieces)
    ]


def sent(kind: str, family: int, source: str, port: int, *, data: bytes = DATA, identification: int = 7) -> list[bytes]:
    """Return the fragments of a datagram that leaves."""
    return fragments(leaving(family, source) / request(kind, family, port, data=data), identification=identification)


def came(kind: str, family: int, destination: str, port: int, *, identification: int = 7) -> list[bytes]:
    """Return the fragments of an answer that arrives."""
    return fragments(
        arriving(family, destination) / answer(kind, family, port, data=DATA), identification=identification
    )


def first_port(node: Node, kind: str, family: int, frames: list[bytes]) -> int:
    """Send the first of some fragments; return the port that it left with."""
    ran = node.out(frames[0])
    assert ran.outcome == "masq_out"
    return int.from_bytes(ran.packet[port_at(kind, family) :][:2], "big")


def port_at(kind: str, family: int) -> int:
    """Return where the source port is, or an echo's identifier."""
    return 14 + (20 if family == 4 else 48) + (4 if kind == "echo" else 0)


@EACH
@pytest.mark.parametrize("data", [DATA, LARGE])
def test_out(node: Node, kind: str, family: int, data: bytes) -> None:
    """All fragments of a datagram leave under the node's address; together they are that datagram, and valid.

    cilium#22624, #25085, #32427: others dropped them.
    """
    frames = sent(kind, family, address_of(A, family), BELOW, data=data)
    ran = [node.out(frame) for frame in frames]
    assert {each.outcome for each in ran} == {"masq_out"}
    port = int.from_bytes(ran[0].packet[port_at(kind, family) :][:2], "big")
    assert [each.packet for each in ran] == sent(kind, family, NODE[family], port, data=data)


@EACH
def test_back(node: Node, kind: str, family: int) -> None:
    """All fragments of an answer reach the pod, past the stack."""
    port = first_port(node, kind, family, sent(kind, family, address_of(A, family), BELOW))
    ran = [node.into(frame) for frame in came(kind, family, NODE[family], port)]
    assert {(each.verdict, each.outcome) for each in ran} == {(REDIRECT, "masq_in")}
    expected = delivered(family, A) / answer(kind, family, BELOW, data=DATA)
    assert [each.packet for each in ran] == fragments(expected)


@EACH
def test_later_fragments_in_any_order(node: Node, kind: str, family: int) -> None:
    """Only the first fragment must come first; the order of the others, and how often they come, does not matter.

    cilium#25709
    """
    frames = sent(kind, family, address_of(A, family), BELOW)
    port = first_port(node, kind, family, frames)
    expected = sent(kind, family, NODE[family], port)
    for number in (3, 1, 2, 1, 0, 3):
        assert node.out(frames[number]).packet == expected[number]


@EACH
def test_without_the_first_from_a_pod(node: Node, kind: str, family: int) -> None:
    """A pod's later fragment without the first does not leave: it would show the pod's address, and be of no use."""
    first_port(node, kind, family, sent(kind, family, address_of(A, family), BELOW))
    for frame in sent(kind, family, address_of(A, family), BELOW, identification=8)[1:]:
        assert node.out(frame).outcome == "drop_masq_fragment"


@EACH
def test_without_the_first_from_outside(node: Node, kind: str, family: int) -> None:
    """A later fragment from outside without the first may be the node's: the stack has it (cilium#25709, #46100)."""
    port = first_port(node, kind, family, sent(kind, family, address_of(A, family), BELOW))
    for frame in came(kind, family, NODE[family], port, identification=8)[1:]:
        assert node.into(frame).outcome == "punt_fragment"


@EACH
def test_datagrams_do_not_mix(node: Node, kind: str, family: int) -> None:
    """Fragments with one identification, between other addresses or of another protocol, are another datagram's."""
    pod = address_of(A, family)
    first_port(node, kind, family, sent(kind, family, pod, BELOW))
    other = fragments(leaving(family, pod, OTHER[family]) / request(kind, family, BELOW, data=DATA))
    assert node.out(other[1]).outcome == "drop_masq_fragment"
    assert node.out(sent(kind, family, address_of(B, family), BELOW)[1]).outcome == "drop_masq_fragment"
    for another in set(KINDS) - {kind}:
        assert node.out(sent(another, family, pod, BELOW)[1]).outcome == "drop_masq_fragment"


@EACH
def test_an_identification_comes_again(node: Node, kind: str, family: int) -> None:
    """When an identification is used again, the new first fragment's ports count for what follows."""
    pod = address_of(A, family)
    former = first_port(node, kind, family, sent(kind, family, pod, BELOW))
    port = first_port(node, kind, family, sent(kind, family, address_of(B, family), BELOW))
    node.into(came(kind, family, NODE[family], former)[0])
    assert node.into(came(kind, family, NODE[family], former)[1]).packet[:6] == bytes.fromhex(A.mac.replace(":", ""))
    node.into(came(kind, family, NODE[family], port)[0])
    assert node.into(came(kind, family, NODE[family], port)[1]).packet[:6] == bytes.fromhex(B.mac.replace(":", ""))
    node.into(came(kind, family, NODE[family], 1)[0])  # the node's
    assert node.into(came(kind, family, NODE[family], 1)[1]).outcome == "punt_fragment"


@EACH
def test_a_flood_of_fragments(node: Node, kind: str, family: int) -> None:
    """First fragments from outside that answer no pod are not remembered: no flood pushes out what pods need."""
    for identification in range(5):
        frame = came(kind, family, NODE[family], 60000, identification=identification)[0]
        assert node.into(frame).outcome == "fwd_host_in"
    assert list(node.datapath.maps["fragments"].items()) == []


@EACH
def test_native(node: Node, kind: str, family: int) -> None:
    """Where masquerading does not apply, fragments leave as they are, in any order."""
    node.prefix(f"{WORLD[family]}/{32 if family == 4 else 128}", NATIVE)
    for frame in reversed(sent(kind, family, address_of(A, family), BELOW)):
        assert node.out(frame).outcome == "fwd_native"


@EACH
def test_inbound_and_reply(node: Node, kind: str, family: int) -> None:
    """An outsider's fragments reach the pod's own address in any order, and the pod's answer keeps that address.

    cilium#25709, #46100: whatever came before the first fragment was dropped.
    """
    pod = address_of(A, family)
    frames = fragments(arriving(family, pod) / request(kind, family, 5000, data=DATA))
    assert {node.into(frame).outcome for frame in reversed(frames)} == {"fwd_inbound"}
    replies = fragments(leaving(family, pod) / answer(kind, family, 5000, data=DATA))
    assert {node.out(frame).outcome for frame in replies} == {"fwd_reply"}


@EACH
def test_the_stacks_pods(node: Node, kind: str, family: int) -> None:
    """Of a pod that the stack has flows with, all fragments take the stack's way: conntrack needs all of a datagram."""
    pod = address_of(A, family)
    out = fragments(from_pod(family) / request(kind, family, BELOW, data=DATA), size=1200)
    assert {node.leave(frame).outcome for frame in out} == {"fwd_uplink"}
    port = first_port(node, kind, family, sent(kind, family, pod, BELOW))
    node.to_pod(arriving(family, pod) / request("udp", family, 5000))
    assert {node.leave(frame).outcome for frame in out} == {"punt_reply"}
    ran = [node.into(frame) for frame in came(kind, family, NODE[family], port)]
    assert {(each.verdict, each.outcome) for each in ran} == {(PASS, "masq_in")}


@EACH
def test_a_first_fragment_too_short(node: Node, kind: str, family: int) -> None:
    """A first fragment that hides part of the transport header (RFC 1858) is masqueraded no more than what follows."""
    frames = fragments(leaving(family, address_of(A, family)) / request(kind, family, BELOW, data=DATA), size=8)
    if kind != "tcp":  # whose eight bytes are all that is needed
        assert node.out(frames[0]).outcome == "masq_out"
        return
    assert node.out(frames[0]).outcome == "drop_masq_unsupported"
    assert node.out(frames[1]).outcome == "drop_masq_fragment"
    assert node.entries("flows") == {}


@pytest.mark.parametrize("kind", KINDS)
def test_atomic_fragment(node: Node, kind: str) -> None:
    """An IPv6 packet that is one fragment (RFC 6946) is masqueraded both ways."""
    whole = fragments(leaving(6, A.ipv6) / request(kind, 6, BELOW), size=4096)
    assert len(whole) == 1
    port = first_port(node, kind, 6, whole)
    assert source_port(kind, node.out(whole[0]).packet[8:], 6) == port
    (back,) = fragments(arriving(6, NODE[6]) / answer(kind, 6, port), size=4096)
    ran = node.into(back)
    assert ran.outcome == "masq_in"
    assert [ran.packet] == fragments(delivered(6, A) / answer(kind, 6, BELOW), size=4096)

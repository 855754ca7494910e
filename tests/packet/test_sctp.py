"""SCTP at an uplink, byte for byte: it keeps its port where it can; where not, its CRC32c is right again.

What is expected has its CRC computed by scapy over the whole packet.
"""

from __future__ import annotations

import socket

import pytest
from scapy.all import SCTP, Packet, Raw, SCTPChunkData
from scapy.layers.sctp import crc32c

from .cases import BELOW, BY_FAMILY, IN_RANGE
from .harness import REDIRECT, A, B, random_source
from .other_cases import LONG, NUMBERS, came, content, given, out, sent
from .test_fragments import fragments
from .test_icmp_errors import ERRORS, HEADER, quote
from .world import NODE, ROUTER, Node, address_of, arriving, built, carrying, delivered, from_pod, leaving, word

pytestmark = pytest.mark.root

FIELD = carrying(NUMBERS["sctp"], 4), carrying(NUMBERS["sctp"], 6)
BY_ERROR = pytest.mark.parametrize(
    ("family", "name"),
    [(4, "port unreachable"), (4, "fragmentation needed"), (6, "port unreachable"), (6, "packet too big")],
)


def has_right_crc(packet: bytes, family: int) -> bool:
    """Say whether the CRC32c of SCTP is right (RFC 9260 section 6.8)."""
    data = packet[14 + HEADER[family] :]
    return bool(crc32c(data[:8] + bytes(4) + data[12:]) == int.from_bytes(data[8:12], "big"))


def port_of(packet: bytes, family: int) -> int:
    """Return the source port."""
    start = 14 + HEADER[family]
    return int.from_bytes(packet[start : start + 2], "big")


def second(node: Node, family: int) -> int:
    """Let two pods want the same port, and return that which the second one got."""
    assert out(node, "sctp", family).outcome == "masq_out"
    ran = out(node, "sctp", family, B)
    assert ran.outcome == "masq_out"
    return port_of(ran.packet, family)


def with_port(packet: Packet, **ports: int) -> bytes:
    """Return a packet with another port, and the CRC that belongs to it."""
    other = packet.copy()
    other[SCTP].chksum = None
    for name, port in ports.items():
        setattr(other[SCTP], name, port)
    return built(other)


@BY_FAMILY
def test_two_pods_want_the_same_port(node: Node, family: int) -> None:
    """The second one gets another port of the range, answers find each of them, and all CRCs are right."""
    port = second(node, family)
    assert port >= 49152
    assert out(node, "sctp", family, B).packet == built(sent("sctp", family, NODE[family], port=port))
    back = node.into(came("sctp", family, NODE[family], port=port))
    assert (back.verdict, back.outcome) == (REDIRECT, "masq_in")
    assert back.packet == given("sctp", family, B)
    assert has_right_crc(back.packet, family)
    assert node.into(came("sctp", family, NODE[family])).packet == given("sctp", family, A)


@BY_FAMILY
def test_associations_of_two_pods(node: Node, family: int) -> None:
    """Associations of two pods with one remote are told apart by their ports, in the range or not."""
    ports = {A: BELOW, B: IN_RANGE}
    for pod, port in ports.items():
        ran = out(node, "sctp", family, pod, port=port)
        assert ran.packet == built(sent("sctp", family, NODE[family], port=port))
        assert has_right_crc(ran.packet, family)
    for pod, port in ports.items():
        ran = node.into(came("sctp", family, NODE[family], port=port))
        assert ran.packet == given("sctp", family, pod, port=port)
    assert node.into(came("sctp", family, NODE[family], port=4321)).outcome == "fwd_host_in"


@BY_FAMILY
def test_any_packet(node: Node, family: int) -> None:
    """The CRC is right whatever the packet holds and however long it is, both ways; padding is not in it."""
    choose, port, pod = random_source(), second(node, family), address_of(B, family)
    for _ in range(60):
        data, padding = Raw(choose.randbytes(choose.randrange(2500))), choose.randbytes(choose.randrange(10))
        header = SCTP(sport=BELOW, dport=443, tag=choose.randrange(1 << 32)) / data
        ran = node.out(built(leaving(family, pod, **FIELD[family == 6]) / header) + padding)
        assert (
            ran.packet == with_port(leaving(family, NODE[family], **FIELD[family == 6]) / header, sport=port) + padding
        )
        header = SCTP(sport=443, dport=port, tag=choose.randrange(1 << 32)) / data
        ran = node.into(built(arriving(family, NODE[family], **FIELD[family == 6]) / header) + padding)
        assert ran.packet == with_port(delivered(family, B, **FIELD[family == 6]) / header, dport=BELOW) + padding


@BY_FAMILY
def test_no_crc(node: Node, family: int) -> None:
    """A CRC of 0 stays: the kernel fills it in where the packet leaves, or both ends do without."""
    port = second(node, family)
    packet = sent("sctp", family, address_of(B, family))
    packet[SCTP].chksum = 0
    expected = sent("sctp", family, NODE[family], port=port)
    expected[SCTP].chksum = 0
    assert node.out(packet).packet == built(expected)


@BY_FAMILY
def test_a_wrong_crc_stays_wrong(node: Node, family: int) -> None:
    """What was damaged on its way to the node is not made good: the same bits of the CRC are wrong afterwards."""
    port, at = second(node, family), 14 + HEADER[family] + 8
    good = built(came("sctp", family, NODE[family], port=port))
    for bit in range(32):
        damage = (1 << bit).to_bytes(4, "big")
        wrong = good[:at] + bytes(a ^ b for a, b in zip(good[at : at + 4], damage, strict=True)) + good[at + 4 :]
        right, ran = given("sctp", family, B), node.into(wrong)
        assert ran.packet[:at] == right[:at]
        assert bytes(a ^ b for a, b in zip(ran.packet[at:], right[at:], strict=True)) == damage.ljust(
            len(right) - at, b"\0"
        )


# ---- Errors


@BY_ERROR
@pytest.mark.parametrize("beyond", [8, 11, 12, 1000])
def test_errors(node: Node, beyond: int, family: int, name: str) -> None:
    """Both ways errors quote the packet as its sender knows it: with the port, and the CRC if all of it is there."""
    port, size, pod = second(node, family), HEADER[family] + beyond, address_of(B, family)
    cut = HEADER[family] + (8 if beyond < 12 else beyond)
    seen, meant = quote(sent("sctp", family, NODE[family], port=port), size), quote(sent("sctp", family, pod), cut)
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / ERRORS[family][name] / Raw(seen))
    assert (ran.verdict, ran.outcome) == (REDIRECT, "masq_in")
    assert ran.packet == built(delivered(family, B, ROUTER[family]) / ERRORS[family][name] / Raw(meant + seen[cut:]))
    got, meant = quote(came("sctp", family, pod), size), quote(came("sctp", family, NODE[family], port=port), cut)
    ran = node.out(leaving(family, pod) / ERRORS[family][name] / Raw(got))
    assert ran.outcome == "masq_out"
    assert ran.packet == built(leaving(family, NODE[family]) / ERRORS[family][name] / Raw(meant + got[cut:]))


@BY_FAMILY
def test_errors_of_the_node(node: Node, family: int) -> None:
    """So does an error of the node's about an answer that it could not give to the pod."""
    port, error = second(node, family), ERRORS[family]["port unreachable"]
    got, meant = (
        quote(came("sctp", family, address_of(B, family))),
        quote(came("sctp", family, NODE[family], port=port)),
    )
    ran = node.out(leaving(family, NODE[family]) / error / Raw(got), fast=False)
    assert ran.outcome == "masq_out"
    assert ran.packet == built(leaving(family, NODE[family]) / error / Raw(meant))


@BY_FAMILY
@pytest.mark.parametrize("size", [12 + (1 << bit) for bit in range(2, 16)] + [65515 - 12])
def test_errors_about_large_packets(node: Node, family: int, size: int) -> None:
    """The CRC that is quoted follows the port however long the packet was, of which only the beginning is there."""
    port, data = second(node, family), Raw(random_source().randbytes(size))

    def beginning(source: str, number: int) -> Raw:
        packet = leaving(family, source, **FIELD[family == 6]) / SCTP(sport=number, dport=443) / data
        return Raw(quote(packet, HEADER[family] + 40))

    error = ERRORS[family]["fragmentation needed" if family == 4 else "packet too big"]
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / error / beginning(NODE[family], port))
    expected = delivered(family, B, ROUTER[family]) / error / beginning(address_of(B, family), BELOW)
    assert ran.packet == built(expected)


# ---- Fragments


def long_fragments(header: Packet, port: int = BELOW) -> list[bytes]:
    """Return the fragments of a long packet."""
    return fragments(header / content("sctp", port, is_answer=False, data=LONG))


@BY_FAMILY
def test_fragments(node: Node, family: int) -> None:
    """The first fragment has the ports, and must come first; with the port it keeps its CRC, which is right."""
    frames = long_fragments(leaving(family, address_of(A, family), **FIELD[family == 6]))
    assert node.out(frames[1]).outcome == "drop_masq_fragment"
    expected = long_fragments(leaving(family, NODE[family], **FIELD[family == 6]))
    assert [node.out(frame).packet for frame in frames] == expected


@BY_FAMILY
def test_fragments_with_another_port(node: Node, family: int) -> None:
    """All fragments go on, but the CRC is not changed: nobody knows how long the datagram is, and it is discarded."""
    port, at = second(node, family), 14 + HEADER[family] + (8 if family == 6 else 0)
    frames = long_fragments(leaving(family, address_of(B, family), **FIELD[family == 6]))
    expected = long_fragments(leaving(family, NODE[family], **FIELD[family == 6]), port)
    expected[0] = expected[0][: at + 8] + frames[0][at + 8 : at + 12] + expected[0][at + 12 :]
    assert [node.out(frame).packet for frame in frames] == expected


@BY_FAMILY
def test_errors_about_fragments(node: Node, family: int) -> None:
    """Nor is the CRC changed of a fragment that an error quotes; its port is."""
    port, at = second(node, family), HEADER[family] + (8 if family == 6 else 0)
    error = ERRORS[family]["fragmentation needed" if family == 4 else "packet too big"]
    seen, meant = (
        long_fragments(leaving(family, source, **FIELD[family == 6]), number)[0][14 : 14 + at + 40]
        for source, number in ((NODE[family], port), (address_of(B, family), BELOW))
    )
    meant = meant[: at + 8] + seen[at + 8 : at + 12] + meant[at + 12 :]
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / error / Raw(seen))
    assert ran.packet == built(delivered(family, B, ROUTER[family]) / error / Raw(meant))


@BY_FAMILY
def test_large_packets_of_a_pods_kernel(node: Node, family: int) -> None:
    """What is cut into packets of unknown sizes (GSO_BY_FRAGS) is left to the stack, if they may be too large."""
    packet = from_pod(family, **FIELD[family == 6]) / SCTP(chksum=0) / SCTPChunkData(data=LONG)
    assert node.leave(packet, gso_size=0xFFFF).outcome == "punt_too_big"


# ---- Whose the port is


@BY_FAMILY
def test_the_node_comes_later(node: Node, family: int) -> None:
    """If the node sends from the port that a pod's flow has, it is the node's at once, and the pod gets another."""
    out(node, "sctp", family)
    assert node.out(sent("sctp", family, NODE[family]), fast=False).outcome == "fwd_host_out"
    assert node.into(came("sctp", family, NODE[family])).outcome == "fwd_host_in"
    ran = out(node, "sctp", family)
    assert ran.packet == built(sent("sctp", family, NODE[family], port=port_of(ran.packet, family)))
    assert port_of(ran.packet, family) >= 49152


@BY_FAMILY
def test_another_pods_host_port(node: Node, family: int) -> None:
    """A flow keeps its port if that is a host port of the same port of the pod's own, and not if it is another's."""
    for address in ("0.0.0.0" if family == 4 else "::", NODE[family]):  # noqa: S104
        node.reset()
        at = {"address": word(address), "port": socket.htons(BELOW), "protocol": NUMBERS["sctp"]}
        leads = {"address": word(address_of(A, family)), "port": socket.htons(BELOW)}
        node.datapath.maps["host_ports"].update(at, leads)
        assert port_of(out(node, "sctp", family, B).packet, family) >= 49152
        assert port_of(out(node, "sctp", family, A).packet, family) == BELOW
        node.datapath.maps["host_ports"].update(at, {**leads, "port": socket.htons(BELOW + 1)})
        node.reset()
        node.datapath.maps["host_ports"].update(at, {**leads, "port": socket.htons(BELOW + 1)})
        assert port_of(out(node, "sctp", family, A).packet, family) >= 49152

"""Masquerading, packet by packet, byte for byte. Expected packets are scapy's, every checksum computed anew."""

from __future__ import annotations

import pytest
from scapy.all import ICMP, UDP, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop, Packet, Raw

from .cases import BELOW, BY_FAMILY, EACH, IN_RANGE, WITH_SOCKETS, opened
from .harness import PASS, REDIRECT, A, B, arp, each
from .world import (
    KINDS,
    NODE,
    OTHER,
    WORLD,
    Node,
    address_of,
    answer,
    arriving,
    built,
    carrying,
    delivered,
    leaving,
    request,
    source_port,
)

pytestmark = pytest.mark.root


CHECKSUM = {"tcp": 16, "udp": 6, "echo": 2}
"""Where the checksum stands in the transport header."""


@EACH
def test_out_and_back(node: Node, kind: str, family: int) -> None:
    """A request leaves under the node's address and a free port of the pod's own choice, and its answer comes back."""
    sent = request(kind, family, IN_RANGE)
    ran = node.out(leaving(family, address_of(A, family)) / sent)
    assert (ran.verdict, ran.outcome, ran.mark) == (PASS, "masq_out", 0)
    assert ran.packet == built(leaving(family, NODE[family]) / sent)
    back = answer(kind, family, IN_RANGE)
    ran = node.into(arriving(family, NODE[family]) / back)
    assert (ran.verdict, ran.outcome) == (REDIRECT, "masq_in")
    assert ran.packet == built(delivered(family, A) / back)


@EACH
@pytest.mark.parametrize("data", [b"", b"1", bytes(range(256)) * 5 + b"!"])
def test_port_moved(node: Node, kind: str, family: int, data: bytes) -> None:
    """A port out of the range is moved into it; whatever the payload's size, only addresses and ports change."""
    sent = request(kind, family, BELOW, data=data)
    ran = node.out(leaving(family, address_of(A, family)) / sent)
    port = source_port(kind, ran.packet, family)
    assert 49152 <= port <= 65535
    assert ran.packet == built(leaving(family, NODE[family]) / request(kind, family, port, data=data))
    ran = node.into(arriving(family, NODE[family]) / answer(kind, family, port, data=data))
    assert ran.outcome == "masq_in"
    assert ran.packet == built(delivered(family, A) / answer(kind, family, BELOW, data=data))


@EACH
def test_every_packet_of_a_flow_has_its_port(node: Node, kind: str, family: int) -> None:
    """Later packets of a flow leave by the first one's port, and answers find their way at any time."""
    first = opened(node, kind, family, BELOW)
    assert [opened(node, kind, family, BELOW, data=bytes(size), flags="A") for size in range(5)] == [first] * 5
    for _ in range(3):
        back = answer(kind, family, first, flags="A")
        assert node.into(arriving(family, NODE[family]) / back).outcome == "masq_in"
    assert len(node.entries("flows")) == len(node.entries("owners")) == 1


@EACH
@pytest.mark.parametrize("port", [IN_RANGE, BELOW])
def test_pods_with_the_same_port(node: Node, kind: str, family: int, port: int) -> None:
    """Two pods that use one source port to one destination get different ports, and each its own answers."""
    ports = {pod: opened(node, kind, family, port, pod=pod) for pod in (A, B)}
    assert ports[A] != ports[B]
    for pod, moved in ports.items():
        ran = node.into(arriving(family, NODE[family]) / answer(kind, family, moved))
        assert ran.packet == built(delivered(family, pod) / answer(kind, family, port))


@EACH
def test_a_port_serves_many_destinations(node: Node, kind: str, family: int) -> None:
    """One port of the node's is used towards any number of destinations: only there must it be unique."""
    sent = request(kind, family, IN_RANGE)
    assert opened(node, kind, family, IN_RANGE) == IN_RANGE
    elsewhere = node.out(leaving(family, address_of(B, family), OTHER[family]) / sent)
    assert elsewhere.packet == built(leaving(family, NODE[family], OTHER[family]) / sent)


@EACH
def test_answers_from_others(node: Node, kind: str, family: int) -> None:
    """Whom the pod did not speak to gets nothing through: another address, or another port, is the node's affair."""
    port = opened(node, kind, family, IN_RANGE)
    assert (
        node.into(arriving(family, NODE[family], OTHER[family]) / answer(kind, family, port)).outcome == "fwd_host_in"
    )
    assert node.into(arriving(family, NODE[family]) / answer(kind, family, port + 1)).outcome == "fwd_host_in"
    if kind != "echo":
        other = answer(kind, family, port, to_port=444)
        assert node.into(arriving(family, NODE[family]) / other).outcome == "fwd_host_in"


@EACH
@pytest.mark.parametrize("error", [0x0001, 0x0100, 0xFF00])
def test_a_wrong_checksum_stays_wrong(node: Node, kind: str, family: int, error: int) -> None:
    """A damaged packet is not given a valid checksum on the way, in or out: its receiver must be able to tell."""
    at = 14 + (20 if family == 4 else 40) + CHECKSUM[kind]

    def damaged(frame: bytes) -> bytes:
        wrong = (int.from_bytes(frame[at : at + 2], "big") + error) % 0xFFFF or 1
        return frame[:at] + wrong.to_bytes(2, "big") + frame[at + 2 :]

    def off_by(frame: bytes, right: bytes) -> int:
        assert frame[:at] + frame[at + 2 :] == right[:at] + right[at + 2 :]
        return (int.from_bytes(frame[at : at + 2], "big") - int.from_bytes(right[at : at + 2], "big")) % 0xFFFF

    port = opened(node, kind, family, BELOW)
    out, back = leaving(family, address_of(A, family)), arriving(family, NODE[family])
    sent = node.out(damaged(built(out / request(kind, family, BELOW)))).packet
    assert off_by(sent, built(leaving(family, NODE[family]) / request(kind, family, port))) == error
    came = node.into(damaged(built(back / answer(kind, family, port)))).packet
    assert off_by(came, built(delivered(family, A) / answer(kind, family, BELOW))) == error


def test_no_udp_checksum(node: Node) -> None:
    """A UDP checksum of 0, "none", stays 0 both ways (RFC 768)."""
    ran = node.out(leaving(4, A.ipv4) / UDP(sport=BELOW, dport=53, chksum=0) / b"?")
    port = source_port("udp", ran.packet, 4)
    assert ran.packet == built(leaving(4, NODE[4]) / UDP(sport=port, dport=53, chksum=0) / b"?")
    ran = node.into(arriving(4, NODE[4]) / UDP(sport=53, dport=port, chksum=0) / b"!")
    assert ran.packet == built(delivered(4, A) / UDP(sport=53, dport=BELOW, chksum=0) / b"!")


@EACH
def test_a_checksum_that_comes_to_be_0(node: Node, kind: str, family: int) -> None:
    """A UDP checksum that would be 0 is written 0xffff, both ways, as 0 means none; others may be 0."""
    at = 14 + (20 if family == 4 else 40) + CHECKSUM[kind]

    def completing(packet: Packet) -> bytes:
        """Return two bytes that, instead of the zeros at its end, bring the checksum to zero."""
        return built(packet)[at : at + 2]

    port = opened(node, kind, family, BELOW)
    data = completing(leaving(family, NODE[family]) / request(kind, family, port, data=bytes(2)))
    ran = node.out(leaving(family, address_of(A, family)) / request(kind, family, BELOW, data=data))
    expected = built(leaving(family, NODE[family]) / request(kind, family, port, data=data))
    assert ran.packet[at : at + 2] == expected[at : at + 2] == (b"\xff\xff" if kind == "udp" else bytes(2))
    assert ran.packet == expected

    data = completing(delivered(family, A) / answer(kind, family, BELOW, data=bytes(2)))
    ran = node.into(arriving(family, NODE[family]) / answer(kind, family, port, data=data))
    assert ran.packet == built(delivered(family, A) / answer(kind, family, BELOW, data=data))


@BY_FAMILY
def test_pings_both_ways_do_not_mix(node: Node, family: int) -> None:
    """An echo request from outside is no answer to a pod's, though it has the same identifier: it is the node's."""
    opened(node, "echo", family, IN_RANGE)
    assert node.into(arriving(family, NODE[family]) / request("echo", family, IN_RANGE)).outcome == "fwd_host_in"


@BY_FAMILY
def test_an_echo_reply_opens_nothing(node: Node, family: int) -> None:
    """A pod's echo reply that answers no request does not leave, and takes no port."""
    ran = node.out(leaving(family, address_of(A, family)) / answer("echo", family, IN_RANGE))
    assert ran.outcome == "drop_masq_unsupported"
    assert node.entries("flows") == node.entries("owners") == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [b"\x01\x01\x01\x00", b"\x01" * 40])
def test_ip_options(node: Node, kind: str, options: bytes) -> None:
    """IPv4 options, for which the packet has come through the stack, are carried and change nothing."""
    sent, back = request(kind, 4, IN_RANGE), answer(kind, 4, IN_RANGE)
    ran = node.out(leaving(4, A.ipv4, options=[options]) / sent, fast=False)
    assert ran.packet == built(leaving(4, NODE[4], options=[options]) / sent)
    ran = node.into(arriving(4, NODE[4], options=[options]) / back)
    assert (ran.verdict, ran.outcome) == (PASS, "masq_in")
    assert ran.packet == built(arriving(4, A.ipv4, options=[options]) / back)


@WITH_SOCKETS
def test_padding(node: Node, kind: str, family: int) -> None:
    """Bytes behind the IP packet are carried and belong to no checksum; ports that would stand there do not exist."""
    whole = built(leaving(family, address_of(A, family)) / request(kind, family, IN_RANGE, data=b""))
    ran = node.out(whole + b"\xaa" * 7)
    assert ran.packet == built(leaving(family, NODE[family]) / request(kind, family, IN_RANGE, data=b"")) + b"\xaa" * 7
    protocol = 6 if kind == "tcp" else 17
    empty = carrying(protocol, family) | ({"len": 20} if family == 4 else {"plen": 0})
    pretended = leaving(family, address_of(A, family), **empty) / Raw(bytes(40))
    assert node.out(pretended).outcome == "drop_masq_unsupported"
    assert node.into(arriving(family, NODE[family], **empty) / Raw(bytes(40))).outcome == "fwd_host_in"


@EACH
def test_cut_short(node: Node, kind: str, family: int) -> None:
    """A header that is not all there is never masqueraded: no port is read or written beyond the packet."""
    header = 14 + (20 if family == 4 else 40)
    full = {"tcp": 20, "udp": 8, "echo": 8}[kind]
    protocol = {"tcp": 6, "udp": 17, "echo": 1 if family == 4 else 58}[kind]
    part = built(leaving(family, address_of(A, family)) / request(kind, family, IN_RANGE))[header:]
    fields = carrying(protocol, family)
    for size in range(full):
        packet = leaving(family, address_of(A, family), **fields) / Raw(part[:size])
        assert node.out(packet).outcome == "drop_masq_unsupported"
        assert node.into(arriving(family, NODE[family], **fields) / Raw(part[:size])).outcome == "fwd_host_in"
    assert node.entries("owners") == {}


@each(
    {
        "timestamp request": leaving(4, A.ipv4) / ICMP(type=13),
        "behind destination options": leaving(6, A.ipv6) / IPv6ExtHdrDestOpt() / UDP(sport=IN_RANGE),
        "behind hop-by-hop options": leaving(6, A.ipv6) / IPv6ExtHdrHopByHop() / UDP(sport=IN_RANGE),
    }
)
def test_what_hides_its_ports(node: Node, packet: Packet) -> None:
    """What cannot be told apart does not leave: it would show the pod's address, and get no answer."""
    assert node.out(packet).outcome == "drop_masq_unsupported"


@EACH
def test_what_is_not_a_pods(node: Node, kind: str, family: int) -> None:
    """What the node itself sends, or forwards for others, leaves as it is; so does what is not IP.

    submariner#3541: others were masqueraded as well, cilium#36631: what iptables had masqueraded was so once more.
    """
    for source in (NODE[family], OTHER[family]):
        assert node.out(leaving(family, source) / request(kind, family, BELOW), fast=False).outcome == "fwd_host_out"
        assert node.out(leaving(family, source) / request(kind, family, IN_RANGE), fast=False).outcome == "fwd_host_out"
    assert node.out(arp(), fast=False).outcome == "fwd_host_out"
    assert node.entries("flows") == {}


@pytest.mark.parametrize("field", ["source", "destination"])
def test_mapped_addresses(node: Node, field: str) -> None:
    """An IPv6 packet with v4-mapped addresses can never pass for an IPv4 one, in which form the maps hold those."""
    opened(node, "udp", 4, IN_RANGE)
    ends = {"source": WORLD[6], "destination": NODE[6]}
    ends[field] = f"::ffff:{WORLD[4] if field == 'source' else A.ipv4}"
    back = answer("udp", 6, IN_RANGE)
    assert node.into(arriving(6, ends["destination"], ends["source"]) / back).outcome == "fwd_host_in"
    both = arriving(6, f"::ffff:{NODE[4]}", f"::ffff:{WORLD[4]}")
    assert node.into(both / back).outcome == "fwd_host_in"
    assert node.out(leaving(6, f"::ffff:{A.ipv4}") / request("udp", 6, IN_RANGE)).outcome == "fwd_host_out"


@EACH
def test_for_another_mac(node: Node, kind: str, family: int) -> None:
    """What the uplink sees but is not sent to it is not given to a pod, nor does it touch the flow."""
    port = opened(node, kind, family, IN_RANGE)
    packet = arriving(family, NODE[family]) / answer(kind, family, port)
    packet.dst = "02:00:00:00:99:99"
    before = node.entries("flows")
    assert node.into(packet).outcome == "fwd_host_in"
    assert node.entries("flows") == before


@EACH
def test_an_answer_with_a_spent_ttl(node: Node, kind: str, family: int) -> None:
    """An answer with TTL 1 is the pod's, but the stack's to discard and to tell of."""
    port = opened(node, kind, family, IN_RANGE)
    ran = node.into(arriving(family, NODE[family], ttl=1) / answer(kind, family, port))
    assert (ran.verdict, ran.outcome) == (PASS, "masq_in")
    assert ran.packet == built(arriving(family, address_of(A, family), ttl=1) / answer(kind, family, port))

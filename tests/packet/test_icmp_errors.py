"""ICMP and ICMPv6 errors about masqueraded flows (RFC 5508 section 4), byte for byte, inside and out.

Path-MTU discovery depends on them: others dropped them or got their checksums wrong.
"""

from __future__ import annotations

import pytest
from scapy.all import (
    ICMP,
    TCP,
    UDP,
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6ExtHdrFragment,
    Packet,
    Raw,
)

from .cases import BELOW, BY_FAMILY, EACH, opened
from .harness import PASS, REDIRECT, A, B, Ran
from .world import (
    FAMILIES,
    KINDS,
    NODE,
    OTHER,
    ROUTER,
    WORLD,
    Node,
    address_of,
    answer,
    arriving,
    built,
    carrying,
    delivered,
    from_pod,
    leaving,
    request,
    source_port,
    word,
)

pytestmark = pytest.mark.root

OUTSIDE = 443

ERRORS: dict[int, dict[str, Packet]] = {
    4: {
        "net unreachable": ICMP(type=3, code=0),
        "port unreachable": ICMP(type=3, code=3),
        "fragmentation needed": ICMP(type=3, code=4, nexthopmtu=1280),
        "prohibited": ICMP(type=3, code=13),
        "time exceeded": ICMP(type=11, code=0),
        "reassembly time exceeded": ICMP(type=11, code=1),
        "parameter problem": ICMP(type=12, code=0, ptr=20),
    },
    6: {
        "no route": ICMPv6DestUnreach(code=0),
        "port unreachable": ICMPv6DestUnreach(code=4),
        "packet too big": ICMPv6PacketTooBig(mtu=1280),
        "time exceeded": ICMPv6TimeExceeded(code=0),
        "parameter problem": ICMPv6ParamProblem(code=1, ptr=6),
    },
}
EVERY_ERROR = pytest.mark.parametrize(
    ("family", "error"),
    [(family, error) for family in FAMILIES for error in ERRORS[family].values()],
    ids=[f"{family} {name}" for family in FAMILIES for name in ERRORS[family]],
)
HEADER = {4: 20, 6: 40}


def quote(packet: Packet, size: int = 1000) -> bytes:
    """Return the beginning of an IP packet, without its Ethernet header, as an error has it."""
    return built(packet)[14 : 14 + size]


def some(family: int) -> Packet:
    """Return an error that matters: the one of path-MTU discovery."""
    return ERRORS[family]["fragmentation needed" if family == 4 else "packet too big"].copy()


def is_given_back(ran: Ran, expected: Packet) -> None:
    """Check that an error was delivered to the pod, like this."""
    assert (ran.verdict, ran.outcome) == (REDIRECT, "masq_in")
    assert ran.packet == built(expected)


# ---- From outside, about what a pod sent


@EVERY_ERROR
@pytest.mark.parametrize("kind", KINDS)
def test_to_the_pod(node: Node, kind: str, family: int, error: Packet) -> None:
    """A router's error reaches the pod, and quotes the packet that the pod knows: its own address and port.

    cilium#12968, #33844: "fragmentation needed" was dropped, #40827: its checksum was wrong.
    """
    port = opened(node, kind, family, BELOW)
    seen = quote(leaving(family, NODE[family], ttl=9) / request(kind, family, port))
    meant = quote(leaving(family, address_of(A, family), ttl=9) / request(kind, family, BELOW))
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / error / Raw(seen))
    is_given_back(ran, delivered(family, A, ROUTER[family]) / error / Raw(meant))


@EACH
@pytest.mark.parametrize("beyond", [8, 9, 15, 16, 17, 18, 19, 20, 21, 25])
def test_quoting_little(node: Node, kind: str, family: int, beyond: int) -> None:
    """Eight bytes behind the IP header are enough (RFC 792), without TCP's checksum; more is changed if it is there."""
    port = opened(node, kind, family, BELOW)
    size = HEADER[family] + beyond
    seen = quote(leaving(family, NODE[family]) / request(kind, family, port), size)
    meant = quote(leaving(family, address_of(A, family)) / request(kind, family, BELOW), size)
    if beyond == 17 and kind == "tcp":  # half a checksum cannot be changed
        meant = meant[:-1] + seen[-1:]
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / some(family) / Raw(seen))
    is_given_back(ran, delivered(family, A, ROUTER[family]) / some(family) / Raw(meant))


@EACH
@pytest.mark.parametrize("beyond", range(8))
def test_quoting_too_little(node: Node, kind: str, family: int, beyond: int) -> None:
    """Without the ports nobody can tell whom it concerns: the stack has it."""
    port = opened(node, kind, family, BELOW)
    seen = quote(leaving(family, NODE[family]) / request(kind, family, port), HEADER[family] + beyond)
    error = arriving(family, NODE[family], ROUTER[family]) / some(family)
    assert node.into(error / Raw(seen)).outcome == "fwd_host_in"
    # Padding is not part of the packet.
    assert node.into(built(error / Raw(seen)) + bytes(40)).outcome == "fwd_host_in"


@BY_FAMILY
def test_padding_is_not_quoted(node: Node, family: int) -> None:
    """Bytes behind the error's IP packet are no part of the quoted one: a checksum there is left alone."""
    port = opened(node, "tcp", family, BELOW)
    seen = quote(leaving(family, NODE[family]) / request("tcp", family, port), HEADER[family] + 8)
    meant = quote(leaving(family, address_of(A, family)) / request("tcp", family, BELOW), HEADER[family] + 8)
    ran = node.into(built(arriving(family, NODE[family], ROUTER[family]) / some(family) / Raw(seen)) + b"\xaa" * 30)
    assert ran.packet == built(delivered(family, A, ROUTER[family]) / some(family) / Raw(meant)) + b"\xaa" * 30


def test_quoted_options(node: Node) -> None:
    """The quoted packet's own IPv4 options are skipped."""
    port = opened(node, "udp", 4, BELOW)
    options = [b"\x01" * 12]
    seen = quote(leaving(4, NODE[4], options=options) / request("udp", 4, port))
    meant = quote(leaving(4, A.ipv4, options=options) / request("udp", 4, BELOW))
    ran = node.into(arriving(4, NODE[4], ROUTER[4]) / some(4) / Raw(seen))
    is_given_back(ran, delivered(4, A, ROUTER[4]) / some(4) / Raw(meant))


@BY_FAMILY
def test_quoted_fragment(node: Node, family: int) -> None:
    """An error about a first fragment is given back; one about a later fragment has no ports, and is the stack's."""
    port = opened(node, "udp", family, BELOW)

    def fragment(address: str, source: int, *, first: bool) -> Packet:
        content = UDP(sport=source, dport=OUTSIDE, len=3008, chksum=0x1234) if first else Raw(bytes(64))
        if family == 4:
            return leaving(4, address, flags="MF", frag=0 if first else 100, id=7, proto=17) / content
        return leaving(6, address) / IPv6ExtHdrFragment(m=1, offset=0 if first else 100, id=7, nh=17) / content

    seen, meant = fragment(NODE[family], port, first=True), fragment(address_of(A, family), BELOW, first=True)
    expected = checksum_moved(built(meant), built(seen), family, port)
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / some(family) / Raw(quote(seen)))
    is_given_back(ran, delivered(family, A, ROUTER[family]) / some(family) / Raw(expected[14:]))
    later = quote(fragment(NODE[family], port, first=False))
    assert node.into(arriving(family, NODE[family]) / some(family) / Raw(later)).outcome == "fwd_host_in"


def checksum_moved(meant: bytes, seen: bytes, family: int, port: int) -> bytes:
    """Return the pod's fragment with a UDP checksum that is as wrong as the one that was seen.

    Only the whole datagram's checksum can be right. What may change it is the addresses and ports.
    """
    at = 14 + (20 if family == 4 else 48) + 6
    pod, node = (word(address)["word"] for address in (address_of(A, family), NODE[family]))
    words = sum(int.from_bytes(node[i : i + 2], "big") - int.from_bytes(pod[i : i + 2], "big") for i in range(0, 16, 2))
    checksum = (int.from_bytes(seen[at : at + 2], "big") + words + port - BELOW) % 0xFFFF
    return meant[:at] + checksum.to_bytes(2, "big") + meant[at + 2 :]


def test_quoted_udp_without_checksum(node: Node) -> None:
    """A quoted UDP checksum of 0 stays 0."""
    port = opened(node, "udp", 4, BELOW)
    seen = quote(leaving(4, NODE[4]) / UDP(sport=port, dport=OUTSIDE, chksum=0) / b"payload")
    meant = quote(leaving(4, A.ipv4) / UDP(sport=BELOW, dport=OUTSIDE, chksum=0) / b"payload")
    ran = node.into(arriving(4, NODE[4], ROUTER[4]) / some(4) / Raw(seen))
    is_given_back(ran, delivered(4, A, ROUTER[4]) / some(4) / Raw(meant))


@EACH
@pytest.mark.parametrize("to_zero", range(3))
def test_edge_checksums(node: Node, kind: str, family: int, to_zero: int) -> None:
    """Where checksums come to be 0 or nearly so, the error's own is still right."""
    port = opened(node, kind, family, BELOW)
    at = HEADER[family] + {"tcp": 16, "udp": 6, "echo": 2}[kind]
    pod = address_of(A, family)
    zero = quote(leaving(family, pod) / request(kind, family, BELOW, data=bytes(2)))[at : at + 2]
    data = ((int.from_bytes(zero, "big") + to_zero) % 0xFFFF).to_bytes(2, "big")
    seen = quote(leaving(family, NODE[family]) / request(kind, family, port, data=data))
    meant = quote(leaving(family, pod) / request(kind, family, BELOW, data=data))
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / some(family) / Raw(seen))
    is_given_back(ran, delivered(family, A, ROUTER[family]) / some(family) / Raw(meant))


@EACH
def test_a_wrong_checksum_stays_wrong(node: Node, kind: str, family: int) -> None:
    """A damaged error is not given a valid checksum: the pod discards it, as RFC 5508 (REQ-3) asks."""
    port = opened(node, kind, family, BELOW)
    seen = quote(leaving(family, NODE[family]) / request(kind, family, port))
    meant = quote(leaving(family, address_of(A, family)) / request(kind, family, BELOW))
    at = 14 + HEADER[family] + 2
    frame = bytearray(built(arriving(family, NODE[family], ROUTER[family]) / some(family) / Raw(seen)))
    frame[at] ^= 0x10
    ran = node.into(bytes(frame))
    right = built(delivered(family, A, ROUTER[family]) / some(family) / Raw(meant))
    assert ran.packet[:at] + ran.packet[at + 2 :] == right[:at] + right[at + 2 :]
    assert ran.packet[at : at + 2] != right[at : at + 2]


@EACH
def test_errors_change_no_flow(node: Node, kind: str, family: int) -> None:
    """An error neither renews nor closes the flow that it concerns (RFC 5382 REQ-10, RFC 5508 REQ-6)."""
    port = opened(node, kind, family, BELOW)
    node.alter("flows", seen=1)
    before = node.entries("flows")
    seen = quote(leaving(family, NODE[family]) / request(kind, family, port))
    node.into(arriving(family, NODE[family], ROUTER[family]) / some(family) / Raw(seen))
    assert node.entries("flows") == before


@EACH
def test_errors_about_nothing_known(node: Node, kind: str, family: int) -> None:
    """An error about another packet than one of a pod's flows is the node's own affair."""
    port = opened(node, kind, family, BELOW)
    wrong = [
        leaving(family, NODE[family]) / request(kind, family, port ^ 1),
        leaving(family, NODE[family], OTHER[family]) / request(kind, family, port),
        leaving(family, OTHER[family]) / request(kind, family, port),
        leaving(family, NODE[family]) / answer(kind, family, port),
        leaving(family, NODE[family], **carrying(253, family)) / Raw(bytes(20)),
        leaving(family, NODE[family], version=5) / request(kind, family, port),
    ]
    for packet in wrong:
        error = arriving(family, NODE[family], ROUTER[family]) / some(family) / Raw(quote(packet))
        assert node.into(error).outcome == "fwd_host_in"


@pytest.mark.parametrize("kind", [4, 5, 9, 10, 13, 17])
def test_other_icmp(node: Node, kind: int) -> None:
    """Source quench (RFC 6633), redirects, router discovery and the like are the node's, whatever they quote."""
    port = opened(node, "udp", 4, BELOW)
    seen = quote(leaving(4, NODE[4]) / request("udp", 4, port))
    assert node.into(arriving(4, NODE[4], ROUTER[4]) / ICMP(type=kind) / Raw(seen)).outcome == "fwd_host_in"


@EACH
def test_about_an_unmasqueraded_flow(node: Node, kind: str, family: int) -> None:
    """An error to a pod's own address is delivered as it is, and is no reason to take a flow for an outsider's."""
    pod = address_of(A, family)
    error = some(family) / Raw(quote(leaving(family, pod) / request(kind, family, BELOW)))
    ran = node.into(arriving(family, pod, ROUTER[family]) / error)
    assert (ran.verdict, ran.outcome) == (REDIRECT, "fwd_inbound")
    assert ran.packet == built(delivered(family, A, ROUTER[family]) / error)
    assert node.entries("inbound") == {}


@EACH
def test_about_a_flow_of_the_stacks(node: Node, kind: str, family: int) -> None:
    """If the stack sent the packet out, its conntrack gets the error: it may have to translate that once more.

    cilium#47755: an error quoted whoever is behind a service, and the pod did not know what it is about.
    """
    pod = address_of(A, family)
    ran = node.out(leaving(family, pod) / request(kind, family, BELOW), fast=False)
    seen = quote(leaving(family, NODE[family]) / request(kind, family, source_port(kind, ran.packet, family)))
    meant = quote(leaving(family, pod) / request(kind, family, BELOW))
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / some(family) / Raw(seen))
    assert (ran.verdict, ran.outcome) == (PASS, "masq_in")
    assert ran.packet == built(arriving(family, pod, ROUTER[family]) / some(family) / Raw(meant))


# ---- From a pod, about what it got


@EVERY_ERROR
@pytest.mark.parametrize("kind", KINDS)
def test_from_the_pod(node: Node, kind: str, family: int, error: Packet) -> None:
    """A pod's error about an answer leaves under the node's address, and quotes the answer as its sender knows it."""
    port, pod = opened(node, kind, family, BELOW), address_of(A, family)
    got = quote(arriving(family, pod, ttl=50) / answer(kind, family, BELOW))
    sent = quote(arriving(family, NODE[family], ttl=50) / answer(kind, family, port))
    ran = node.out(leaving(family, pod) / error / Raw(got))
    assert (ran.verdict, ran.outcome) == (PASS, "masq_out")
    assert ran.packet == built(leaving(family, NODE[family]) / error / Raw(sent))


@EACH
def test_about_an_inbound_flow(node: Node, kind: str, family: int) -> None:
    """A pod's error about what an outsider sent to its own address has that address: "port unreachable", for one."""
    pod = address_of(A, family)
    came = arriving(family, pod) / request(kind, family, 5000)
    node.into(came)
    assert node.out(leaving(family, pod) / some(family) / Raw(quote(came))).outcome == "fwd_reply"


@EACH
def test_a_pods_error_about_nothing_known(node: Node, kind: str, family: int) -> None:
    """A pod's error about a packet that it cannot have got does not leave, nor does it open a flow."""
    opened(node, kind, family, BELOW)
    pod, before = address_of(A, family), node.entries("flows")
    wrong = [
        (WORLD[family], quote(arriving(family, pod) / answer(kind, family, BELOW + 1))),
        (WORLD[family], quote(arriving(family, pod, OTHER[family]) / answer(kind, family, BELOW))),
        (OTHER[family], quote(arriving(family, pod) / answer(kind, family, BELOW))),
    ]
    for receiver, quoted in wrong:
        error = leaving(family, pod, receiver) / some(family) / Raw(quoted)
        assert node.out(error).outcome == "drop_masq_unsupported"
    assert node.entries("flows") == before


@EACH
def test_about_another_pods_flow(node: Node, kind: str, family: int) -> None:
    """A pod cannot send errors about another pod's flows: it could end their connections."""
    opened(node, kind, family, BELOW)
    got = quote(arriving(family, address_of(A, family)) / answer(kind, family, BELOW))
    error = leaving(family, address_of(B, family)) / some(family) / Raw(got)
    assert node.out(error).outcome == "drop_masq_unsupported"


@EACH
def test_a_pods_error_about_the_stacks_flow(node: Node, kind: str, family: int) -> None:
    """A pod's error about a packet that the stack brought goes through the stack, like the flow's other packets."""
    came = arriving(family, address_of(A, family)) / request(kind, family, 5000)
    error = from_pod(family) / some(family) / Raw(quote(came))
    assert node.leave(error).outcome == "fwd_uplink"
    node.to_pod(came)
    assert node.leave(error).outcome == "punt_reply"


@BY_FAMILY
def test_errors_leave_no_note(node: Node, family: int) -> None:
    """Errors that the stack forwards, either way, do not make a flow the stack's."""
    pod = address_of(A, family)
    node.to_pod(arriving(family, pod, ROUTER[family]) / some(family) / Raw(quote(leaving(family, pod) / TCP())))
    node.out(leaving(family, pod) / some(family) / Raw(quote(arriving(family, pod) / TCP())), fast=False)
    assert node.entries("stack_flows") == {}

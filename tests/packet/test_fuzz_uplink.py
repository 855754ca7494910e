"""Damaged packets through an uplink's programs: what comes out is what went in, or that under another address and port.

`nat_check` says what may change. PODLANE_FUZZ_PACKETS sets how many packets the fuzz tests send; half of them are here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import product
from typing import Any

import pytest
from scapy.all import GRE, ICMP, SCTP, ICMPv6PacketTooBig, IPv6ExtHdrFragment, Packet, Raw, SCTPChunkData

from agent.datapath.tables import masqueraded, outcomes

from .harness import FUZZ_PACKETS, A, B, Ran, random_source
from .nat_check import PORTLESS, Translations, check, read
from .world import (
    FAMILIES,
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
    leaving,
    request,
)

pytestmark = pytest.mark.root

PACKETS = FUZZ_PACKETS * 2 // 5
PACKETS_TO_PODS = FUZZ_PACKETS // 10
PORTS = (50000, 50001, 1234)
RULES = ("OTHER_MASQUERADE", "OTHER_MASQUERADE", "OTHER_MASQUERADE", "OTHER_STACK", "OTHER_DROP")

# ---- Packets


def contents(way: str, family: int, ports: tuple[int, ...]) -> Iterator[tuple[dict[str, Any], Packet]]:
    """Yield what packets that go one way carry, with the field of the IP header that says so if nothing else does."""
    for kind, port in product(KINDS, ports):
        for flags in ("S", "A", "FA", "R") if kind == "tcp" else ("",):
            yield {}, (request if way == "out" else answer)(kind, family, port, flags=flags)
    for port in ports:
        there_and_here = (443, port) if way == "in" else (port, 443)
        yield {}, SCTP(sport=there_and_here[0], dport=there_and_here[1]) / SCTPChunkData(data=b"payload")
    for protocol in PORTLESS:
        yield carrying(protocol, family), Raw(bytes(range(40)))


def errors(way: str, family: int) -> Iterator[Packet]:
    """Yield errors that go one way, about packets that went the other."""
    error = ICMP(type=3, code=4, nexthopmtu=1280) if family == 4 else ICMPv6PacketTooBig(mtu=1280)
    node, pod = NODE[family], address_of(A, family)
    if way == "in":
        about = [(arriving(family, node), leaving(family, node)), (arriving(family, pod), leaving(family, pod))]
    else:  # the node itself complains of what it was to give to a pod
        about = [(leaving(family, pod), arriving(family, pod)), (leaving(family, node), arriving(family, pod))]
    for header, quoted in about:
        for fields, content in contents("out" if way == "in" else "in", family, PORTS[:1]):
            packet = built(with_fields(quoted, fields) / content)
            for size in (20, 28, 48, 88):
                yield header / error / Raw(packet[14 : 14 + size])


def with_fields(header: Packet, fields: dict[str, Any]) -> Packet:
    """Return an IP header with these fields changed."""
    changed = header.copy()
    for name, value in fields.items():
        setattr(changed.payload, name, value)
    return changed


def pieces(family: int, header: Packet, whole: Packet) -> Iterator[Packet]:
    """Yield a first and a later fragment of a packet."""
    data = built(whole)[14 + len(header.payload) :]
    protocol = built(whole)[23 if family == 4 else 20]
    for first in (True, False):
        payload = Raw(data[:16] if first else data[16:])
        if family == 4:
            fields = {"proto": protocol, "id": 7, "flags": "MF" if first else "", "frag": 0 if first else 2}
            yield with_fields(header, fields) / payload
        else:
            yield header / IPv6ExtHdrFragment(nh=protocol, id=7, m=first, offset=0 if first else 2) / payload


def seeds(way: str) -> list[bytes]:
    """Return good packets of all kinds that go one way."""
    packets: list[Packet] = []
    for family in FAMILIES:
        pods = [address_of(pod, family) for pod in (A, B)]
        headers = [leaving(family, each) for each in pods]
        if way == "in":
            headers = [arriving(family, each) for each in (NODE[family], pods[0])]
        for fields, content in contents(way, family, PORTS):
            wholes = [with_fields(header, fields) / content for header in headers]
            packets += [*wholes, *pieces(family, headers[0], wholes[0])]
        packets += errors(way, family)
    return [built(packet) for packet in packets]


ADDRESSES = [
    ip_address(text).packed
    for family in FAMILIES
    for text in (address_of(A, family), address_of(B, family), NODE[family], WORLD[family], OTHER[family])
]


def damaged(good: bytes, choose: random.Random) -> bytes:
    """Change up to three things about a frame."""
    frame = bytearray(good)
    for _ in range(choose.choice((0, 0, 1, 1, 2, 3))):
        position = choose.randrange(12, min(len(frame), 120))
        match choose.randrange(5):
            case 0:
                frame[position] = choose.choice((0, 1, 3, 6, 8, 11, 17, 44, 47, 58, 132, 0x45, 0x46, 0x60, 0xFF))
            case 1:
                frame[position] ^= 1 << choose.randrange(8)
            case 2:
                address = choose.choice(ADDRESSES)
                offset = choose.choice((26, 30, 54, 58) if len(address) == 4 else (22, 38, 70, 86))
                frame[offset : offset + len(address)] = address
            case 3:
                del frame[choose.randrange(54, max(len(frame), 55)) :]
            case _:
                frame += bytes(choose.randrange(20))
    return bytes(frame) + bytes(max(0, 54 - len(frame)))


@pytest.mark.timeout(120 + PACKETS // 500)
def test_damaged_packets(node: Node) -> None:
    """Of all packets, damaged or not, both ways: what comes out is the input, or the input correctly translated.

    That is under a port that stands for this flow alone, and back to the pod that has it; other protocols only if the
    configuration says so. The counters add up.
    """
    choose, seen, before = random_source(), Counter[str](), outcomes(node.datapath)
    sums = {key: [*count] for key, count in masqueraded(node.datapath).flows.items()}
    good = {way: seeds(way) for way in ("out", "in")}
    for number in range(PACKETS):
        if number % 1000 == 0:
            node.reset()
            translations, rule = Translations(), choose.choice(RULES)
            node.configure(other_protocols=node.datapath.constants[rule])
        way = choose.choice(("out", "in"))
        frame = damaged(choose.choice(good[way]), choose)
        ran = node.out(frame, fast=choose.random() < 0.9) if way == "out" else node.into(frame)
        check(frame, ran, way)
        translations.check(frame, ran, way)
        seen[ran.outcome] += 1
        if ran.outcome.startswith("masq_"):
            kind = read(frame).kind
            assert kind != "other" or rule == "OTHER_MASQUERADE", frame.hex()
            sums[kind, way] = [sums[kind, way][0] + 1, sums[kind, way][1] + len(frame)]
    after = outcomes(node.datapath)
    assert {name: after[name].packets - before[name].packets for name in after} == {name: seen[name] for name in after}
    assert {key: [*count] for key, count in masqueraded(node.datapath).flows.items()} == sums
    wanted = {"masq_in", "masq_out", "fwd_inbound", "fwd_native", "fwd_reply", "fwd_host_in", "fwd_host_out"}
    assert wanted | {"punt_fragment", "drop_masq_fragment", "drop_masq_unsupported"} <= seen.keys()


@pytest.mark.timeout(120 + PACKETS_TO_PODS // 500)
def test_damaged_packets_to_pods(node: Node) -> None:
    """Whatever the stack sends to a pod, damaged or not, passes unchanged and is counted as what it is."""
    choose, before = random_source(), outcomes(node.datapath)
    good = seeds("in") + seeds("out")
    for _ in range(PACKETS_TO_PODS):
        frame = damaged(choose.choice(good), choose)
        assert node.to_pod(frame, pod=choose.choice((A, B))).outcome == "fwd_from_stack"
    after = outcomes(node.datapath)
    growth = {name: after[name].packets - before[name].packets for name in after if after[name] != before[name]}
    assert growth == {"fwd_from_stack": PACKETS_TO_PODS}


@pytest.mark.parametrize(
    "content", [request("tcp", 4, 1234), SCTP(sport=1234) / SCTPChunkData(data=b"payload"), GRE() / bytes(40)]
)
def test_the_check_finds_faults(node: Node, content: Packet) -> None:
    """The check itself: one bit more or less in any byte of a translated packet does not pass."""
    frame = built(leaving(4, A.ipv4) / content)
    ran = node.out(frame)
    assert ran.outcome == "masq_out"
    check(frame, ran, "out")
    for at in range(12, len(ran.packet)):
        wrong = bytearray(ran.packet)
        wrong[at] ^= 1
        with pytest.raises(AssertionError):
            check(frame, Ran(ran.verdict, bytes(wrong), ran.outcome), "out")

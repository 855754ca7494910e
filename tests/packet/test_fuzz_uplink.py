"""Damaged packets through an uplink's programs: what comes out is what went in, or that under another address and port.

What may change is listed by a reader of packets that shares nothing with the C, and every checksum must be exactly as
right, or as wrong, as it was. PODLANE_FUZZ_PACKETS sets how many packets the fuzz tests send; half of them are here.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import product

import pytest
from scapy.all import ICMP, ICMPv6PacketTooBig, IPv6ExtHdrFragment, Packet, Raw

from agent.datapath.tables import outcomes

from .harness import FUZZ_PACKETS, A, B, Ran, random_source
from .world import FAMILIES, KINDS, NODE, OTHER, WORLD, Node, address_of, answer, arriving, built, leaving, request

pytestmark = pytest.mark.root

PACKETS = FUZZ_PACKETS * 2 // 5
PACKETS_TO_PODS = FUZZ_PACKETS // 10
PORTS = (50000, 50001, 1234)

TCP, UDP, ICMP4, FRAGMENT, ICMP6 = 6, 17, 1, 44, 58
CHECKSUM_AT = {TCP: 16, UDP: 6, ICMP4: 2, ICMP6: 2}
ECHO = {ICMP4: (0, 8), ICMP6: (128, 129)}
ERROR = {ICMP4: (3, 11, 12), ICMP6: (1, 2, 3, 4)}

# ---- A reader of packets


@dataclass
class Fields:
    """Where things stand in a frame: what may change, and what each checksum covers."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size, by name; names of quoted fields begin with a dot."""
    sums: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By the checksum's name, the stretches of the frame that it covers, from and to."""
    protocol: int = 0
    """Of the transport; if something is quoted, of that."""


def read(frame: bytes) -> Fields:
    """Find the fields of a frame; those that are not there, or make no sense, are left out."""
    fields = Fields({"destination mac": (0, 6), "source mac": (6, 6)})
    if frame[12:14] in (b"\x08\x00", b"\x86\xdd"):
        read_ip(frame, fields, 14, len(frame), "")
    return fields


def read_ip(frame: bytes, fields: Fields, at: int, limit: int, prefix: str) -> None:
    """Find the fields of an IP packet; `prefix` is a dot for a quoted one."""
    if frame[12:14] == b"\x08\x00":
        header, protocol = (frame[at] & 15) * 4, frame[at + 9]
        end = limit if prefix else at + int.from_bytes(frame[at + 2 : at + 4], "big")
        ends = (at + 12, at + 20)
        fields.places |= {prefix + "ttl": (at + 8, 1), prefix + "ip checksum": (at + 10, 2)}
        fields.places |= {prefix + "source": (at + 12, 4), prefix + "destination": (at + 16, 4)}
        fields.sums[prefix + "ip checksum"] = [(at, at + header)]
        later = int.from_bytes(frame[at + 6 : at + 8], "big") & 0x1FFF
    else:
        header, protocol, later = 40, frame[at + 6], 0
        end = limit if prefix else at + 40 + int.from_bytes(frame[at + 4 : at + 6], "big")
        ends = (at + 8, at + 40)
        fields.places |= {prefix + "ttl": (at + 7, 1)}
        fields.places |= {prefix + "source": (at + 8, 16), prefix + "destination": (at + 24, 16)}
        if protocol == FRAGMENT and at + 48 <= len(frame):
            protocol, later = frame[at + 40], int.from_bytes(frame[at + 42 : at + 44], "big") & 0xFFF8
            header = 48
    fields.protocol = protocol
    if not later:
        read_transport(frame, fields, (at + header, end), protocol, ends, prefix)


def read_transport(
    frame: bytes, fields: Fields, extent: tuple[int, int], protocol: int, ends: tuple[int, int], prefix: str
) -> None:
    """Find the ports or identifier, the checksum and what it covers, and what an error quotes."""
    at, end = extent
    if protocol not in CHECKSUM_AT or end - at < 8 or end > len(frame):
        return
    checksum = at + CHECKSUM_AT[protocol]
    kind = frame[at]
    quotes = kind in ERROR.get(protocol, ())
    if protocol in (TCP, UDP):
        fields.places |= {prefix + "source port": (at, 2), prefix + "destination port": (at + 2, 2)}
    elif kind in ECHO[protocol]:
        fields.places[prefix + "identifier"] = (at + 4, 2)
    elif not quotes or prefix:
        return
    if checksum + 2 <= end:
        fields.places[prefix + "checksum"] = (checksum, 2)
        covered = [(at, end)] if protocol == ICMP4 else [ends, (at, end)]
        # Of what an error quotes the end is missing; what is there changes by as much as the checksum does.
        fields.sums[prefix + "checksum"] = covered
    if quotes and end - at >= 8 + (28 if protocol == ICMP4 else 48):
        read_ip(frame, fields, at + 8, end, ".")


def total(frame: bytes, stretches: list[tuple[int, int]]) -> int:
    """Return the ones' complement sum of parts of a frame."""
    parts = [frame[start:end] + bytes((end - start) % 2) for start, end in stretches]
    return sum(int.from_bytes(part, "big") for part in parts) % 0xFFFF  # as if by 16 bits: 0x10000 is 1 there


ROUTED = {"destination mac", "source mac", "ttl", "ip checksum", "checksum"}
FLOW_SIDE = {
    "out": {"source", "source port", "identifier", ".destination", ".destination port", ".identifier"},
    "in": {"destination", "destination port", "identifier", ".source", ".source port", ".identifier"},
}


def check(frame: bytes, ran: Ran, way: str) -> None:
    """Check that nothing but one side of the flow has changed, and every checksum is as right as it was."""
    if ran.packet == frame:
        return
    fields, case = read(frame), f"{way}: {frame.hex()} became {ran.packet.hex()}"
    assert len(ran.packet) == len(frame), case
    may_change = ROUTED | FLOW_SIDE[way] | {".ip checksum", ".checksum"}
    masked = [bytearray(frame), bytearray(ran.packet)]
    for name, (at, size) in fields.places.items():
        if name in may_change:
            for each in masked:
                each[at : at + size] = bytes(size)
    assert masked[0] == masked[1], case
    for name, covered in fields.sums.items():
        at, _ = fields.places[name]
        if name.endswith("ip checksum") or frame[at : at + 2] != bytes(2) or ran.packet[at : at + 2] != bytes(2):
            assert total(frame, covered) == total(ran.packet, covered), f"{name}, {case}"


class Translations:
    """For whom each port of the node's stands, learnt from what was translated: for one flow, and both ways."""

    def __init__(self) -> None:
        self._owners: dict[tuple[int, bytes, bytes, bytes], bytes] = {}

    def check(self, frame: bytes, ran: Ran, way: str) -> None:
        """Check that a translated packet is on the node's side of the flow as expected, and on the pod's."""
        if ran.outcome not in ("masq_out", "masq_in"):
            return
        outside, inside = (ran.packet, frame) if way == "out" else (frame, ran.packet)
        key, pod = flow_of(outside, way), flow_of(inside, way)
        if not key or not pod:
            return
        case = f"{way}: {frame.hex()} became {ran.packet.hex()}"
        assert key[:3] == pod[:3], case
        assert key[3][:-2] in NODE_ADDRESSES, case
        assert int.from_bytes(key[3][-2:], "big") >= 49152, case
        assert self._owners.setdefault(key, pod[3]) == pod[3], case


def flow_of(frame: bytes, way: str) -> tuple[int, bytes, bytes, bytes] | None:
    """Return a packet's protocol, its address and port outside, and both together on this side, if it has ports."""
    fields = read(frame)
    quotes = "." if ".source" in fields.places else ""
    here, there = ("source", "destination") if (way == "out") != bool(quotes) else ("destination", "source")

    def value(name: str) -> bytes:
        at, size = fields.places.get(quotes + name, (0, 0))
        return frame[at : at + size]

    port = value(f"{here} port") or value("identifier")
    return (fields.protocol, value(there), value(f"{there} port"), value(here) + port) if port else None


# ---- Packets


def errors(family: int, way: str) -> Iterator[Packet]:
    """Yield errors about flows: from outside, and from pods."""
    error = ICMP(type=3, code=4, nexthopmtu=1280) if family == 4 else ICMPv6PacketTooBig(mtu=1280)
    for kind, size in product(KINDS, (28, 48, 68, 88)):
        if way == "in":
            quoted = leaving(family, NODE[family]) / request(kind, family, PORTS[0])
            yield arriving(family, NODE[family]) / error / Raw(built(quoted)[14 : 14 + size])
        else:
            quoted = arriving(family, address_of(A, family)) / answer(kind, family, PORTS[0])
            yield leaving(family, address_of(A, family)) / error / Raw(built(quoted)[14 : 14 + size])


def pieces(family: int, header: Packet, content: Packet) -> Iterator[Packet]:
    """Yield a first and a later fragment."""
    data = built(header / content)[14 + len(header.payload) :]
    protocol = built(header / content)[23 if family == 4 else 20]
    for first in (True, False):
        payload = Raw(data[:16] if first else data[16:])
        if family == 4:
            fragment = header.copy()
            fragment.payload.proto, fragment.payload.id = protocol, 7
            fragment.payload.flags, fragment.payload.frag = "MF" if first else "", 0 if first else 2
            yield fragment / payload
        else:
            yield header / IPv6ExtHdrFragment(nh=protocol, id=7, m=first, offset=0 if first else 2) / payload


def seeds(way: str) -> list[bytes]:
    """Return good packets of all kinds that go one way."""
    packets: list[Packet] = []
    for family, kind, port in product(FAMILIES, KINDS, PORTS):
        if way == "out":
            headers = [leaving(family, address_of(pod, family)) for pod in (A, B)]
            contents = [request(kind, family, port, flags=flags) for flags in ("S", "A", "FA", "R")]
        else:
            headers = [arriving(family, NODE[family]), arriving(family, address_of(A, family))]
            contents = [answer(kind, family, port, flags=flags) for flags in ("SA", "A", "FA", "R")]
        packets += [header / content for header, content in product(headers, contents)]
        packets += pieces(family, headers[0], contents[0])
    packets += [error for family in FAMILIES for error in errors(family, way)]
    return [built(packet) for packet in packets]


NODE_ADDRESSES = {ip_address(address).packed for address in NODE.values()}
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
                frame[position] = choose.choice((0, 1, 3, 6, 8, 11, 17, 44, 58, 0x45, 0x46, 0x60, 0xFF))
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

    That is under a port that stands for this flow alone, and back to the pod that has it. The counters add up.
    """
    choose, seen, before = random_source(), Counter[str](), outcomes(node.datapath)
    good = {way: seeds(way) for way in ("out", "in")}
    for number in range(PACKETS):
        if number % 1000 == 0:
            node.reset()
            translations = Translations()
        way = choose.choice(("out", "in"))
        frame = damaged(choose.choice(good[way]), choose)
        ran = node.out(frame, fast=choose.random() < 0.9) if way == "out" else node.into(frame)
        check(frame, ran, way)
        translations.check(frame, ran, way)
        seen[ran.outcome] += 1
    after = outcomes(node.datapath)
    assert {name: after[name].packets - before[name].packets for name in after} == {name: seen[name] for name in after}
    wanted = {"masq_in", "masq_out", "fwd_inbound", "fwd_reply", "fwd_host_in", "fwd_host_out"}
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


def test_the_check_finds_faults(node: Node) -> None:
    """The check itself: one bit more or less in any byte of a translated packet does not pass."""
    frame = built(leaving(4, A.ipv4) / request("tcp", 4, 1234))
    ran = node.out(frame)
    check(frame, ran, "out")
    for at in range(12, len(ran.packet)):
        wrong = bytearray(ran.packet)
        wrong[at] ^= 1
        with pytest.raises(AssertionError):
            check(frame, Ran(ran.verdict, bytes(wrong), ran.outcome), "out")

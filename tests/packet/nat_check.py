"""A reader of packets that shares nothing with the C, and what may become of a packet at an uplink.

It may stay as it is, or change its address and port; every checksum must be exactly as right, or as wrong, as it was.
Of SCTP's, that is what is checked of whole packets; tests/packet/test_nat_model.py has those that errors quote.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import NamedTuple

from scapy.layers.sctp import crc32c

from .harness import Ran
from .world import NODE

TCP, UDP, ICMP4, FRAGMENT, ICMP6, SCTP = 6, 17, 1, 44, 58, 132
PORTLESS = (47, 50, 4, 41, 115)
"""GRE, ESP, IPIP, IPv6 and L2TP."""

CHECKSUM_AT = {TCP: 16, UDP: 6, ICMP4: 2, ICMP6: 2}
ECHO = {ICMP4: (0, 8), ICMP6: (128, 129)}
ERROR = {ICMP4: (3, 11, 12), ICMP6: (1, 2, 3, 4)}
NODE_ADDRESSES = {ip_address(address).packed for address in NODE.values()}


@dataclass
class Fields:
    """Where things stand in a frame: what may change, and what each checksum covers."""

    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Offset and size, by name; names of quoted fields begin with a dot."""
    sums: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By the checksum's name, the stretches of the frame that it covers, from and to."""
    crc: tuple[int, int] | None = None
    """What SCTP's CRC covers, from and to, if all of that is there."""
    protocol: int = 0
    """Of the transport; if something is quoted, of that."""

    @property
    def kind(self) -> str:
        """Under which name such packets are counted."""
        return {TCP: "tcp", UDP: "udp", ICMP4: "icmp", ICMP6: "icmp"}.get(self.protocol, "other")


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
    if end - at < 8 or end > len(frame):
        return
    if protocol in (TCP, UDP, SCTP):
        fields.places |= {prefix + "source port": (at, 2), prefix + "destination port": (at + 2, 2)}
    if protocol == SCTP and end - at >= 12:
        fields.places[prefix + "crc"] = (at + 8, 4)
        fields.crc = (at, end) if not prefix and not is_fragment(frame) else None
    if protocol not in CHECKSUM_AT:
        return
    checksum = at + CHECKSUM_AT[protocol]
    kind = frame[at]
    quotes = kind in ERROR.get(protocol, ())
    if kind in ECHO.get(protocol, ()):
        fields.places[prefix + "identifier"] = (at + 4, 2)
    elif protocol in ECHO and (not quotes or prefix):
        return
    if checksum + 2 <= end:
        fields.places[prefix + "checksum"] = (checksum, 2)
        covered = [(at, end)] if protocol == ICMP4 else [ends, (at, end)]
        # Of what an error quotes the end is missing; what is there changes by as much as the checksum does.
        fields.sums[prefix + "checksum"] = covered
    if quotes and end - at >= 8 + (20 if protocol == ICMP4 else 40):
        read_ip(frame, fields, at + 8, end, ".")


def is_fragment(frame: bytes) -> bool:
    """Say whether a frame is a fragment."""
    return frame[20] & 0x3F > 0 or frame[21] > 0 if frame[12:14] == b"\x08\x00" else frame[20] == FRAGMENT


def wrong_by(frame: bytes, covered: tuple[int, int]) -> bytes:
    """Return the bits of SCTP's CRC that are not as they should be; none if it has none (0)."""
    start, end = covered
    there = frame[start + 8 : start + 12]
    right = crc32c(frame[start : start + 8] + bytes(4) + frame[start + 12 : end])
    return (int.from_bytes(there, "big") ^ right).to_bytes(4, "big") if any(there) else b""


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
    may_change = ROUTED | FLOW_SIDE[way] | {".ip checksum", ".checksum", ".crc"}
    if fields.crc:
        may_change |= {"crc"}
        assert wrong_by(frame, fields.crc) == wrong_by(ran.packet, fields.crc), case
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


class Side(NamedTuple):
    """A flow as a packet shows it, on one side of the node. What has no ports has empty ones."""

    protocol: int
    there: bytes
    there_port: bytes
    here: bytes
    here_port: bytes


class Translations:
    """For whom each port of the node's stands, learnt from what was translated: for one flow, and both ways."""

    def __init__(self) -> None:
        self._owners: dict[Side, Side] = {}

    def check(self, frame: bytes, ran: Ran, way: str) -> None:
        """Check that a translated packet is on the node's side of the flow as expected, and on the pod's."""
        if ran.outcome not in ("masq_out", "masq_in"):
            return
        outside, inside = (ran.packet, frame) if way == "out" else (frame, ran.packet)
        node, pod = side_of(outside, way), side_of(inside, way)
        if not node or not pod:
            return
        case = f"{way}: {frame.hex()} became {ran.packet.hex()}"
        assert node[:3] == pod[:3], case
        assert node.here in NODE_ADDRESSES, case
        keeps_port = node.protocol in (SCTP, *PORTLESS) and node.here_port == pod.here_port
        assert keeps_port or (node.here_port and int.from_bytes(node.here_port, "big") >= 49152), case
        assert self._owners.setdefault(node, pod) == pod, case


def side_of(frame: bytes, way: str) -> Side | None:
    """Return which flow a packet shows, unless it hides the ports."""
    fields = read(frame)
    quotes = "." if ".source" in fields.places else ""
    here, there = ("source", "destination") if (way == "out") != bool(quotes) else ("destination", "source")

    def value(name: str) -> bytes:
        at, size = fields.places.get(quotes + name, (0, 0))
        return frame[at : at + size]

    port = value(f"{here} port") or value("identifier")
    if not port and fields.protocol not in PORTLESS:
        return None
    return Side(fields.protocol, value(there), value(f"{there} port"), value(here), port)

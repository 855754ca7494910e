"""Frames for the model's messages, built from nothing: every checksum is computed, none is updated."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from scapy.layers.sctp import crc32c

from .nat_words import ICMP, PORTLESS, SCTP, TCP, UDP, Fate, Message, Part

TCP_HEADER, UDP_HEADER = 20, 8
SPLIT = 24
"""Where a datagram is cut into two fragments, in bytes of its payload: no transport header is longer."""

_PACKET_TOO_BIG = {4: (3, 4), 16: (2, 0)}
"""Type and code of the ICMP error that is sent, by the length of addresses."""

_ECHO = {4: (8, 0), 16: (128, 129)}
"""Types of request and reply."""


@dataclass(frozen=True, slots=True)
class Body:
    """What else is in a packet. `quoted` is how many bytes an error quotes of a transport header and what follows."""

    data: bytes = b""
    has_checksum: bool = True
    quoted: int = 8


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071): the sum of 16-bit words is the number itself, modulo 0xffff."""
    return -int.from_bytes(data + bytes(len(data) % 2), "big") % 0xFFFF


def ip_packet(message: Message, body: Body, *, ttl: int = 64) -> bytes:
    """Return a message as an IP packet."""
    content = _transport(message, body)
    offset, more = 0, message.part is Part.FIRST
    if message.part is Part.FIRST:
        content = content[:SPLIT]
    elif message.part is Part.LATER:
        content, offset = content[SPLIT:], SPLIT
    if len(message.source) == 4:
        return _ipv4(message, content, ttl, offset // 8 | more << 13)
    protocol = message.protocol
    if message.is_fragment:
        content = struct.pack("!BBHI", protocol, 0, offset | more, message.identification) + content
        protocol = 44
    return struct.pack("!IHBB", 6 << 28, len(content), protocol, ttl) + message.source + message.destination + content


def frame(message: Message, body: Body, source_mac: bytes, destination_mac: bytes, *, ttl: int = 64) -> bytes:
    """Return a message as an Ethernet frame."""
    ethertype = b"\x08\x00" if len(message.source) == 4 else b"\x86\xdd"
    return destination_mac + source_mac + ethertype + ip_packet(message, body, ttl=ttl)


def changed(message: Message, fate: Fate) -> Message:
    """Return a message as it leaves a program: where an error is changed, what it quotes is on the other side.

    An error that is not the pod's own, but about what the pod was to get, stays its sender's. The CRC of a fragment
    stays as it is, also in an error.
    """
    about = message.about
    message = _with_its_sum(message)
    if fate.source:
        address, port = fate.source
        if about:
            sender = address if about.destination == message.source else message.source
            about = replace(_with_its_sum(about), destination=address, destination_port=port)
            return replace(message, source=sender, about=about)
        message = replace(message, source=address, source_port=port)
    if fate.destination:
        address, port = fate.destination
        if about:
            about = replace(_with_its_sum(about), source=address, source_port=port)
            return replace(message, destination=address, about=about)
        message = replace(message, destination=address, destination_port=port)
    return message


def _with_its_sum(message: Message) -> Message:
    if message.part is not Part.FIRST:
        return message
    return replace(message, summed=message.summed or (message.source_port, message.destination_port))


def source_port(packet: bytes, message: Message) -> int:
    """Return the source port, or an echo request's identifier, in the frame of such a message; 0 if it has none."""
    if message.protocol in PORTLESS:
        return 0
    at = 14 + (20 if len(message.source) == 4 else 40)
    at += 8 if len(message.source) == 16 and message.is_fragment else 0
    at += 4 if message.protocol in ICMP.values() else 0
    return int.from_bytes(packet[at : at + 2], "big")


def _ipv4(message: Message, content: bytes, ttl: int, fragment: int) -> bytes:
    fields = (0x45, 0, 20 + len(content), message.identification, fragment, ttl, message.protocol)
    start, ends = struct.pack("!BBHHHBB", *fields), message.source + message.destination
    return start + checksum(start + ends).to_bytes(2, "big") + ends + content


def _transport(message: Message, body: Body) -> bytes:
    if message.about:
        kind, code = _PACKET_TOO_BIG[len(message.source)]
        content = _quoted(message.about, body)
        return _summed(message, struct.pack("!BBHI", kind, code, 0, 1280) + content, 2)
    ports = message.source_port, message.destination_port
    if message.protocol == TCP:
        flags = message.fin | message.syn << 1 | message.rst << 2 | message.ack << 4
        header = struct.pack("!HHIIBBHHH", *ports, 0x12345678, 0x9ABCDEF0, 0x50, flags, 0xFFFF, 0, 0)
        return _summed(message, header + body.data, 16)
    if message.protocol == UDP:
        plain = struct.pack("!HHHH", *ports, UDP_HEADER + len(body.data), 0) + body.data
        return _summed(message, plain, 6) if body.has_checksum or len(message.source) == 16 else plain
    if message.protocol == SCTP:
        tag, end = bytes([0x12, 0x34, 0x56, 0x78]), bytes([0, 3, 0, 4 + len(body.data)]) + body.data
        summed = struct.pack("!HH", *(message.summed or ports)) + tag + bytes(4) + end
        return struct.pack("!HH", *ports) + tag + struct.pack("!I", crc32c(summed)) + end
    if message.protocol not in ICMP.values():
        return body.data
    kind = _ECHO[len(message.source)][message.is_echo_reply]
    identifier = message.destination_port if message.is_echo_reply else message.source_port
    return _summed(message, struct.pack("!BBHHH", kind, 0, 0, identifier, 3) + body.data, 2)


def _quoted(about: Message, body: Body) -> bytes:
    whole = ip_packet(about, body)
    header = (
        len(whole) - len(_transport(about, body)) if about.part is Part.WHOLE else (20, 48)[len(about.source) == 16]
    )
    return whole[: header + body.quoted]


def _summed(message: Message, content: bytes, at: int) -> bytes:
    """Return the content with its checksum, which is at `at`."""
    pseudo = b""
    if message.protocol != ICMP[4]:
        pseudo = message.source + message.destination + struct.pack("!II", message.protocol, len(content))
    total = checksum(pseudo + content)
    if not total and message.protocol == UDP:
        total = 0xFFFF
    return content[:at] + total.to_bytes(2, "big") + content[at + 2 :]

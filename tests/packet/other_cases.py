"""What the tests of protocols other than TCP, UDP and ICMP are tried with."""

from __future__ import annotations

from itertools import product

import pytest
from scapy.all import (
    ESP,
    GRE,
    IP,
    SCTP,
    UDP,
    IPv6,
    Packet,
    Raw,
    SCTPChunkData,
    SCTPChunkInit,
    SCTPChunkInitAck,
)

from .cases import BELOW
from .harness import A, Pod, Ran
from .world import (
    FAMILIES,
    Node,
    address_of,
    arriving,
    built,
    carrying,
    delivered,
    leaving,
)

NUMBERS = {"sctp": 132, "gre": 47, "esp": 50, "ipip": 4, "ipv6": 41, "l2tp": 115}
PORTLESS = tuple(kind for kind in NUMBERS if kind != "sctp")
DROP, MASQUERADE, STACK = 0, 1, 2
"""Rules: the C's OTHER_*."""

LONG = bytes(number % 251 for number in range(3000))

EACH_OTHER = pytest.mark.parametrize(("kind", "family"), list(product(NUMBERS, FAMILIES)))
EACH_PORTLESS = pytest.mark.parametrize(("kind", "family"), list(product(PORTLESS, FAMILIES)))


def content(kind: str, port: int, *, is_answer: bool, data: bytes) -> Packet:
    """Return what such a packet carries; only SCTP has the port."""
    match kind:
        case "sctp" if data:
            return SCTP(sport=port, dport=443, tag=9) / SCTPChunkData(data=data)
        case "sctp" if is_answer:
            return SCTP(sport=443, dport=port, tag=8) / SCTPChunkInitAck(init_tag=9)
        case "sctp":
            return SCTP(sport=port, dport=443) / SCTPChunkInit(init_tag=8)
        case "gre":
            return GRE() / IP(src="10.99.0.1", dst="10.99.0.2") / UDP(sport=port) / data
        case "esp":
            return ESP(spi=7, seq=1, data=bytes(range(40)) + data)
        case "ipip":
            return IP(src="10.99.0.1", dst="10.99.0.2") / UDP(sport=port) / data
        case "ipv6":
            return IPv6(src="fd99::1", dst="fd99::2") / UDP(sport=port) / data
        case _:
            return Raw(b"\0\0\0\x07" + bytes(range(40)) + data)


def sent(kind: str, family: int, source: str, destination: str | None = None, *, port: int = BELOW) -> Packet:
    """Return what leaves by the uplink."""
    header = leaving(family, source, destination, **carrying(NUMBERS[kind], family))
    return header / content(kind, port, is_answer=False, data=b"")


def came(kind: str, family: int, destination: str, source: str | None = None, *, port: int = BELOW) -> Packet:
    """Return what arrives at the uplink."""
    header = arriving(family, destination, source, **carrying(NUMBERS[kind], family))
    return header / content(kind, port, is_answer=True, data=b"")


def given(kind: str, family: int, pod: Pod, *, port: int = BELOW) -> bytes:
    """Return an answer as the pod gets it."""
    header = delivered(family, pod, **carrying(NUMBERS[kind], family))
    return built(header / content(kind, port, is_answer=True, data=b""))


def out(node: Node, kind: str, family: int, pod: Pod = A, *, port: int = BELOW) -> Ran:
    """Send a packet of a pod's to the world."""
    return node.out(sent(kind, family, address_of(pod, family), port=port))

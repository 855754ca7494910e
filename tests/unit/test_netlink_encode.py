"""Netlink requests that are packed by hand."""

from __future__ import annotations

import struct
from ipaddress import ip_address

from agent.netlink.channel import attributes, messages
from agent.netlink.encode import Attributes, mac, message, pack

EACH: Attributes = [
    (1, b"abc"),
    (2, 7),
    (3, "veth"),
    (4, ip_address("10.0.0.1")),
    (5, ip_address("fd00::1")),
    (6, [(1, "x"), (2, [(1, 9)])]),
    (7, []),
]


def test_attributes_are_read_as_they_were_packed() -> None:
    """Every kind of value has its length and its padding: what reads the kernel's answers reads them back."""
    found = attributes(pack(EACH), 0)
    assert [found[number] for number in (1, 2, 3, 4, 7)] == [b"abc", struct.pack("=I", 7), b"veth\0", b"\n\0\0\1", b""]
    assert found[5] == ip_address("fd00::1").packed
    nested = attributes(found[6], 0)
    assert (nested[1], attributes(nested[2], 0)) == (b"x\0", {1: struct.pack("=I", 9)})
    assert len(pack(EACH)) % 4 == 0


def test_message() -> None:
    """A request is its header, fixed part and attributes, and says its own length."""
    request = message("do", 16, 0x600, b"body", [(1, mac("02:00:00:00:00:0a"))], tolerated=(3,))
    (found,) = messages(request.data)
    assert (found.type, found.flags, request.what, request.tolerated) == (16, 0x601, "do", (3,))
    assert found.body[:4] == b"body"
    assert attributes(found.body, 4) == {1: b"\x02\0\0\0\0\x0a"}

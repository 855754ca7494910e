"""Masquerading, packet by packet, byte for byte. Expected packets are scapy's, every checksum computed anew."""

from __future__ import annotations

from itertools import product

import pytest

from .harness import A, B, REDIRECT, PASS, Pod
from .world import (
    FAMILIES,
    KINDS,
    NODE,
    OTHER,
    Node,
    address_of,
    answer,
    arriving,
    built,
    delivered,
    leaving,
    request,
    source_port,
)

pytestmark = pytest.mark.root

EACH = pytest.mark.parametrize(("kind", "family"), list(product(KINDS, FAMILIES)))
IN_RANGE, BELOW = 50000, 1234


def opened(node: Node, kind: str, family: int, port: int, *, pod: Pod = A, **fields: object) -> int:
    """Send a pod's first packet; return the port that it left with."""
    ran = node.out(leaving(family, address_of(pod, family)) / request(kind, family, port, **fields))
    assert ran.outcome == "masq_out"
    return source_port(kind, ran.packet, family)


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

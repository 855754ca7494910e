"""What the tests of masquerading are tried with, and how its flows begin."""

from __future__ import annotations

from itertools import product

import pytest

from .harness import A, Pod, Ran
from .world import FAMILIES, KINDS, NODE, Node, address_of, answer, arriving, leaving, request, source_port

IN_RANGE, BELOW = 50000, 1234
"""Ports that a pod keeps, and cannot keep."""

EACH = pytest.mark.parametrize(("kind", "family"), list(product(KINDS, FAMILIES)))
WITH_SOCKETS = pytest.mark.parametrize(("kind", "family"), list(product(("tcp", "udp"), FAMILIES)))
"""Kinds of which programs can see the node's sockets."""
WITH_PORTS = pytest.mark.parametrize(("kind", "family"), list(product(("tcp", "udp", "sctp"), FAMILIES)))
"""Kinds that have host ports."""
BY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def out(
    node: Node,
    kind: str,
    family: int,
    port: int = IN_RANGE,
    *,
    pod: Pod = A,
    data: bytes = b"payload",
    flags: str = "S",
) -> Ran:
    """Send a packet of a pod's to the world."""
    return node.out(leaving(family, address_of(pod, family)) / request(kind, family, port, data=data, flags=flags))


def opened(
    node: Node,
    kind: str,
    family: int,
    port: int = IN_RANGE,
    *,
    pod: Pod = A,
    data: bytes = b"payload",
    flags: str = "S",
) -> int:
    """Send a packet of a pod's to the world, which is masqueraded; return the port that it left with."""
    ran = out(node, kind, family, port, pod=pod, data=data, flags=flags)
    assert ran.outcome == "masq_out"
    return source_port(kind, ran.packet, family)


def back(node: Node, kind: str, family: int, port: int = IN_RANGE, *, flags: str = "SA") -> Ran:
    """Send an answer of the world's to a port of the node's."""
    return node.into(arriving(family, NODE[family]) / answer(kind, family, port, flags=flags))

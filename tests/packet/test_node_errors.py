"""Errors that the node itself sends about what it was to give to a pod: their receiver must know what they are about.

An answer has its pod's address when the node's stack finds that its TTL is spent or that the pod is gone.
"""

from __future__ import annotations

from itertools import product

import pytest
from scapy.all import Packet, Raw

from .cases import BELOW
from .harness import PASS, A
from .other_cases import came, sent
from .test_icmp_errors import ERRORS, HEADER
from .world import (
    FAMILIES,
    KINDS,
    NODE,
    ROUTER,
    WORLD,
    Node,
    address_of,
    answer,
    arriving,
    built,
    leaving,
    request,
    source_port,
)

pytestmark = pytest.mark.root

EVERY_KIND = pytest.mark.parametrize(("kind", "family"), list(product((*KINDS, "sctp", "gre"), FAMILIES)))


def asked(node: Node, kind: str, family: int) -> int:
    """Let a pod open a flow; return the port that the answer is sent to."""
    if kind not in KINDS:
        assert node.out(sent(kind, family, address_of(A, family))).outcome == "masq_out"
        return BELOW
    ran = node.out(leaving(family, address_of(A, family)) / request(kind, family, BELOW))
    assert ran.outcome == "masq_out"
    return source_port(kind, ran.packet, family)


def answered(kind: str, family: int, destination: str, port: int) -> Packet:
    """Return an answer from the world whose TTL is spent."""
    if kind in KINDS:
        return arriving(family, destination, ttl=1) / answer(kind, family, port)
    packet = came(kind, family, destination, port=port)
    setattr(packet.payload, "ttl" if family == 4 else "hlim", 1)
    return packet


@EVERY_KIND
@pytest.mark.parametrize("beyond", [1000, 21, 8])
@pytest.mark.parametrize("name", ["time exceeded", "net unreachable", "no route", "packet too big"])
def test_about_an_answer(node: Node, kind: str, family: int, beyond: int, name: str) -> None:
    """The node's error about an answer quotes it exactly as it came in, and every checksum is right."""
    error = ERRORS[family].get(name)
    if not error:
        return
    port = asked(node, kind, family)
    answering = built(answered(kind, family, NODE[family], port))
    undelivered = node.into(answering)
    assert (undelivered.verdict, undelivered.outcome) == (PASS, "masq_in")
    before, end = node.entries("flows"), 14 + HEADER[family] + beyond
    ran = node.out(leaving(family, NODE[family]) / error / Raw(undelivered.packet[14:end]), fast=False)
    assert (ran.verdict, ran.outcome) == (PASS, "masq_out")
    assert ran.packet == built(leaving(family, NODE[family]) / error / Raw(answering[14:end]))
    assert node.entries("flows") == before


@EVERY_KIND
def test_about_a_pods_own_address(node: Node, kind: str, family: int) -> None:
    """An error about what an outsider sent to the pod's own address leaves as it is, though there are other flows."""
    asked(node, kind, family)
    request_of = answered(kind, family, address_of(A, family), BELOW)
    request_of.payload.src = ROUTER[family]
    error = leaving(family, NODE[family], ROUTER[family]) / ERRORS[family]["time exceeded"]
    assert node.out(error / Raw(built(request_of)[14:]), fast=False).outcome == "fwd_host_out"


@EVERY_KIND
def test_about_the_nodes_own(node: Node, kind: str, family: int) -> None:
    """An error about what was sent to the node itself leaves as it is, and takes no port."""
    port = asked(node, kind, family)
    before = node.entries("owners")
    error = leaving(family, NODE[family]) / ERRORS[family]["port unreachable"]
    about = answered(kind, family, NODE[family], port)
    assert node.out(error / Raw(built(about)[14:]), fast=False).outcome == "fwd_host_out"
    assert node.entries("owners") == before


@EVERY_KIND
def test_of_somebody_else(node: Node, kind: str, family: int) -> None:
    """An error of another router's, which the node forwards, is not the node's to change."""
    asked(node, kind, family)
    error = leaving(family, ROUTER[family], WORLD[family]) / ERRORS[family]["time exceeded"]
    about = answered(kind, family, address_of(A, family), BELOW)
    assert node.out(error / Raw(built(about)[14:]), fast=False).outcome == "fwd_host_out"

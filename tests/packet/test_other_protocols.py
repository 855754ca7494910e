"""Protocols other than TCP, UDP and ICMP, byte for byte.

SCTP keeps its port (test_sctp.py has where it cannot), what encapsulates other packets goes by its addresses alone, and
the configuration has the last word (`other_protocols`).
"""

from __future__ import annotations

import pytest
from scapy.all import (
    Packet,
    Raw,
)

from agent.datapath.tables import masqueraded

from .cases import BELOW, BY_FAMILY
from .harness import PASS, REDIRECT, A, B
from .other_cases import (
    DROP,
    EACH_OTHER,
    EACH_PORTLESS,
    LONG,
    MASQUERADE,
    NUMBERS,
    STACK,
    came,
    content,
    given,
    out,
    sent,
)
from .test_fragments import fragments
from .test_icmp_errors import ERRORS, HEADER, quote
from .world import (
    NODE,
    OTHER,
    ROUTER,
    Node,
    address_of,
    arriving,
    built,
    carrying,
    delivered,
    leaving,
)

pytestmark = pytest.mark.root


# ---- Masqueraded


@EACH_OTHER
def test_out_and_back(node: Node, kind: str, family: int) -> None:
    """A packet leaves under the node's address, its port as it was, and the answer comes back to the pod."""
    ran = out(node, kind, family)
    assert (ran.verdict, ran.outcome) == (PASS, "masq_out")
    assert ran.packet == built(sent(kind, family, NODE[family]))
    back = node.into(came(kind, family, NODE[family]))
    assert (back.verdict, back.outcome) == (REDIRECT, "masq_in")
    assert back.packet == given(kind, family, A)


@EACH_PORTLESS
def test_two_pods_want_the_same(node: Node, kind: str, family: int) -> None:
    """What has no port serves one pod per remote; the second is refused, until the first one's flow is over."""
    assert out(node, kind, family).outcome == "masq_out"
    assert out(node, kind, family, B).outcome == "drop_masq_exhausted"
    assert out(node, kind, family).outcome == "masq_out"
    assert node.into(came(kind, family, NODE[family])).packet == given(kind, family, A)
    assert node.out(sent(kind, family, address_of(B, family), OTHER[family])).outcome == "masq_out"
    for another in NUMBERS.keys() - {kind}:
        assert out(node, another, family, B).outcome == "masq_out"
    for half in ("flows", "owners"):
        node.alter(half)
    assert out(node, kind, family, B).outcome == "masq_out"
    assert node.into(came(kind, family, NODE[family])).packet == given(kind, family, B)


@EACH_OTHER
def test_answers_from_others(node: Node, kind: str, family: int) -> None:
    """Whom the pod did not speak to gets nothing through."""
    out(node, kind, family)
    assert node.into(came(kind, family, NODE[family], OTHER[family])).outcome == "fwd_host_in"


@EACH_OTHER
def test_inbound(node: Node, kind: str, family: int) -> None:
    """What an outsider sends to a pod's own address is answered from there, whatever the rule for other protocols."""
    for rule in (DROP, MASQUERADE, STACK):
        node.configure(other_protocols=rule)
        assert node.into(came(kind, family, address_of(A, family))).outcome == "fwd_inbound"
        assert out(node, kind, family).outcome == "fwd_reply"
    assert node.entries("flows") == node.entries("owners") == {}


@EACH_OTHER
def test_counters(node: Node, kind: str, family: int) -> None:
    """Packets of these flows, and errors about them, are counted under "other", both ways, and each flow once."""
    before = masqueraded(node.datapath)
    frames = [sent(kind, family, address_of(A, family)), came(kind, family, NODE[family])]
    frames.append(
        arriving(family, NODE[family], ROUTER[family]) / too_big(family) / Raw(quote(came_from_node(kind, family)))
    )
    node.out(frames[0])
    assert [node.into(frame).outcome for frame in frames[1:]] == ["masq_in", "masq_in"]
    sizes = [len(built(frame)) for frame in frames]
    after = masqueraded(node.datapath)
    grown = {
        key: (after.flows[key].packets - count.packets, after.flows[key].bytes - count.bytes)
        for key, count in before.flows.items()
        if after.flows[key] != count
    }
    assert grown == {("other", "out"): (1, sizes[0]), ("other", "in"): (2, sum(sizes[1:]))}
    assert (after.allocations - before.allocations, after.retries - before.retries) == (1, 0)


# ---- Errors


def too_big(family: int) -> Packet:
    """Return the error of path-MTU discovery."""
    return ERRORS[family]["fragmentation needed" if family == 4 else "packet too big"].copy()


def came_from_node(kind: str, family: int) -> Packet:
    """Return a pod's packet as the world sees it."""
    return sent(kind, family, NODE[family])


QUOTES = pytest.mark.parametrize(
    ("kind", "beyond"), [*((kind, 1000) for kind in NUMBERS), ("sctp", 8), ("sctp", 9), ("gre", 0), ("gre", 3)]
)
"""How many bytes an error quotes behind the IP header."""

BY_ERROR = pytest.mark.parametrize(
    ("family", "name"),
    [(4, "port unreachable"), (4, "fragmentation needed"), (6, "port unreachable"), (6, "packet too big")],
)


@BY_ERROR
@QUOTES
def test_errors_to_the_pod(node: Node, kind: str, beyond: int, family: int, name: str) -> None:
    """A router's error reaches the pod, and quotes what the pod sent; SCTP's CRC in there is right as it was."""
    out(node, kind, family)
    size = HEADER[family] + beyond
    seen = quote(came_from_node(kind, family), size)
    meant = quote(sent(kind, family, address_of(A, family)), size)
    ran = node.into(arriving(family, NODE[family], ROUTER[family]) / ERRORS[family][name] / Raw(seen))
    assert (ran.verdict, ran.outcome) == (REDIRECT, "masq_in")
    assert ran.packet == built(delivered(family, A, ROUTER[family]) / ERRORS[family][name] / Raw(meant))


@BY_ERROR
@QUOTES
def test_errors_from_the_pod(node: Node, kind: str, beyond: int, family: int, name: str) -> None:
    """A pod's error leaves under the node's address, and quotes the answer as its sender knows it."""
    out(node, kind, family)
    size, pod = HEADER[family] + beyond, address_of(A, family)
    got, meant = (quote(came(kind, family, address), size) for address in (pod, NODE[family]))
    ran = node.out(leaving(family, pod) / ERRORS[family][name] / Raw(got))
    assert (ran.verdict, ran.outcome) == (PASS, "masq_out")
    assert ran.packet == built(leaving(family, NODE[family]) / ERRORS[family][name] / Raw(meant))


@BY_FAMILY
def test_padding_is_not_quoted(node: Node, family: int) -> None:
    """A quoted IP header that ends in the padding behind the packet is none: it is not changed there."""
    out(node, "gre", family)
    seen = quote(came_from_node("gre", family), HEADER[family])
    error = arriving(family, NODE[family], ROUTER[family]) / too_big(family)
    for size in range(HEADER[family]):
        frame = built(error / Raw(seen[:size])) + seen[size:]
        assert node.into(frame).outcome == "fwd_host_in"


@EACH_OTHER
def test_errors_about_nothing_known(node: Node, kind: str, family: int) -> None:
    """Errors open no flow: about nothing known, one from outside is the node's, and one of a pod's does not leave."""
    seen = Raw(quote(came_from_node(kind, family)))
    assert node.into(arriving(family, NODE[family], ROUTER[family]) / too_big(family) / seen).outcome == "fwd_host_in"
    got = Raw(quote(came(kind, family, address_of(A, family))))
    ran = node.out(leaving(family, address_of(A, family)) / too_big(family) / got)
    assert ran.outcome == "drop_masq_unsupported"
    assert node.entries("flows") == node.entries("owners") == {}


# ---- Fragments


def long_fragments(header: Packet, kind: str) -> list[bytes]:
    """Return the fragments of a long packet."""
    return fragments(header / content(kind, BELOW, is_answer=False, data=LONG))


@EACH_PORTLESS
def test_fragments_without_ports(node: Node, kind: str, family: int) -> None:
    """Where the first fragment says no more than the others, they pass in any order, both ways, and none is noted."""
    fields = carrying(NUMBERS[kind], family)
    frames = long_fragments(leaving(family, address_of(A, family), **fields), kind)
    expected = long_fragments(leaving(family, NODE[family], **fields), kind)
    assert [node.out(frame).packet for frame in reversed(frames)] == expected[::-1]
    back = long_fragments(arriving(family, NODE[family], **fields), kind)
    expected = long_fragments(delivered(family, A, **fields), kind)
    assert [node.into(frame).packet for frame in reversed(back)] == expected[::-1]
    assert list(node.datapath.maps["fragments"].items()) == []

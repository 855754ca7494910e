"""Flows that outsiders open to a pod's own address: its answers keep that address, and nothing else does.

A note of what outsiders have sent moves from the map `inbound` to `conversations` when it was answered and went on. The
numbers in brackets are failures that others reported; the test would show that one here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .cases import BELOW, BY_FAMILY, EACH, IN_RANGE, WITH_SOCKETS, back, opened, out
from .harness import A
from .world import OTHER, Node, address_of, answer, arriving, built, delivered, leaving, request

pytestmark = pytest.mark.root

LONG_AGO = 1  # ns after boot
SECOND = 1_000_000_000  # ns

Begin = Callable[[Node, str, int], None]


@EACH
def test_inbound_flows_keep_the_pods_address(node: Node, kind: str, family: int) -> None:
    """An outsider reaches a pod under its own address, and the answer has that address and no port of the node's."""
    pod = address_of(A, family)
    came = node.into(arriving(family, pod) / request(kind, family, 5000))
    assert came.outcome == "fwd_inbound"
    assert came.packet == built(delivered(family, A) / request(kind, family, 5000))
    replied = leaving(family, pod) / answer(kind, family, 5000)
    assert node.out(replied).outcome == "fwd_reply"
    assert node.entries("flows") == node.entries("owners") == {}


@EACH
def test_a_forged_note_opens_nothing_to_others(node: Node, kind: str, family: int) -> None:
    """A packet from outside lets the pod answer its sender, from that port: nobody else, and from no other."""
    pod = address_of(A, family)
    node.into(arriving(family, pod) / request(kind, family, 5000))
    elsewhere = leaving(family, pod, OTHER[family]) / answer(kind, family, 5000)
    assert node.out(elsewhere).outcome in ("masq_out", "drop_masq_unsupported")
    assert node.out(leaving(family, pod) / answer(kind, family, 5001)).outcome in ("masq_out", "drop_masq_unsupported")


@BY_FAMILY
def test_a_forged_note_does_not_expose_a_connection(node: Node, family: int) -> None:
    """Whatever an outsider sent before, a connection that the pod opens is masqueraded, all of it (cilium#47425)."""
    pod = address_of(A, family)
    for flags in ("S", "SA", "A", "RA"):
        node.into(arriving(family, pod) / answer("tcp", family, IN_RANGE, flags=flags))
    assert len(node.entries("inbound")) == 1
    for flags in ("S", "A", "PA", "FA"):
        assert out(node, "tcp", family, flags=flags).outcome == "masq_out"


@WITH_SOCKETS
def test_no_note_about_a_pods_own_flow(node: Node, kind: str, family: int) -> None:
    """What comes to the pod's address in a flow that the pod has opened itself does not end its masquerading."""
    out(node, kind, family)
    assert node.into(arriving(family, address_of(A, family)) / answer(kind, family, IN_RANGE)).outcome == "fwd_inbound"
    assert node.entries("inbound") == {}
    assert out(node, kind, family, flags="A").outcome == "masq_out"


def converse(node: Node, kind: str, family: int, port: int = IN_RANGE) -> None:
    """Let an outsider open a flow, the pod answer, and the outsider go on."""
    pod = address_of(A, family)
    node.into(arriving(family, pod) / request(kind, family, port))
    assert node.out(leaving(family, pod) / answer(kind, family, port)).outcome == "fwd_reply"
    node.into(arriving(family, pod) / request(kind, family, port, flags="A"))


def last_seen(node: Node) -> int:
    """Return when something was last seen of the only inbound flow."""
    (note,) = [*node.entries("inbound").values(), *node.entries("conversations").values()]
    return int(note["seen"])


def see(node: Node, time: int) -> None:
    """Pretend that inbound flows were last seen then."""
    node.alter("inbound", seen=time)
    node.alter("conversations", seen=time)


def knock(node: Node, kind: str, family: int) -> None:
    """Let an outsider open a flow, and no more."""
    node.into(arriving(family, address_of(A, family)) / request(kind, family, IN_RANGE))


EITHER_WAY = pytest.mark.parametrize("begin", [knock, converse])


@EACH
def test_a_conversation(node: Node, kind: str, family: int) -> None:
    """What an outsider has sent is a conversation once it was answered and goes on, and not before."""
    pod = address_of(A, family)
    for _ in range(3):
        node.into(arriving(family, pod) / request(kind, family, IN_RANGE))
        assert len(node.entries("inbound")) == 1
    assert node.out(leaving(family, pod) / answer(kind, family, IN_RANGE)).outcome == "fwd_reply"
    assert node.entries("conversations") == {}
    node.into(arriving(family, pod) / request(kind, family, IN_RANGE, flags="A"))
    assert (len(node.entries("inbound")), len(node.entries("conversations"))) == (0, 1)


@BY_FAMILY
@pytest.mark.parametrize("flags", ["S", "R", "RA"])
def test_no_conversation(node: Node, family: int, flags: str) -> None:
    """Neither further SYNs nor resets make a conversation: a flood is answered, too."""
    pod = address_of(A, family)
    knock(node, "tcp", family)
    assert node.out(leaving(family, pod) / answer("tcp", family, IN_RANGE)).outcome == "fwd_reply"
    node.into(arriving(family, pod) / request("tcp", family, IN_RANGE, flags=flags))
    assert (len(node.entries("inbound")), len(node.entries("conversations"))) == (1, 0)


@BY_FAMILY
@EITHER_WAY
def test_a_stale_note(node: Node, family: int, begin: Begin) -> None:
    """A note that was quiet for longer than UDP flows live does not let a new flow out as it is (cilium#47425)."""
    begin(node, "udp", family)
    replied = leaving(family, address_of(A, family)) / answer("udp", family, IN_RANGE)
    now = last_seen(node)
    see(node, now - 290 * SECOND)
    assert node.out(replied).outcome == "fwd_reply"
    see(node, now - 310 * SECOND)
    assert node.out(replied).outcome == "masq_out"
    assert node.entries("inbound") == node.entries("conversations") == {}


@BY_FAMILY
@EITHER_WAY
def test_notes_are_renewed(node: Node, family: int, begin: Begin) -> None:
    """Packets in either direction keep a note alive, so that an inbound flow lasts as long as it is used."""
    begin(node, "udp", family)
    pod = address_of(A, family)
    now = last_seen(node)
    see(node, now - 200 * SECOND)
    node.into(arriving(family, pod) / request("udp", family, IN_RANGE))
    assert last_seen(node) >= now
    see(node, now - 200 * SECOND)
    assert node.out(leaving(family, pod) / answer("udp", family, IN_RANGE)).outcome == "fwd_reply"
    assert last_seen(node) >= now


@BY_FAMILY
@EITHER_WAY
def test_a_quiet_connection_from_outside(node: Node, family: int, begin: Begin) -> None:
    """A connection that an outsider opened may be quiet for any time: TCP tells a new one by its SYN."""
    begin(node, "tcp", family)
    see(node, LONG_AGO)
    spoken = leaving(family, address_of(A, family)) / answer("tcp", family, IN_RANGE, flags="PA")
    assert node.out(spoken).outcome == "fwd_reply"


@EACH
def test_a_flood_from_outside(node: Node, kind: str, family: int) -> None:
    """Any number of outsiders' flows leave masqueraded ones alone, and conversations: they push out each other."""
    pod = address_of(A, family)
    port = opened(node, kind, family)
    converse(node, kind, family, 5000)
    for number in range(2000):
        node.into(arriving(family, pod, OTHER[family]) / request(kind, family, 1024 + number, data=b""))
    assert len(node.entries("inbound")) <= node.datapath.maps["inbound"].spec.max_entries
    assert back(node, kind, family, port).outcome == "masq_in"
    assert out(node, kind, family, BELOW).outcome == "masq_out"
    assert len(node.entries("flows")) == 2
    assert node.out(leaving(family, pod) / answer(kind, family, 5000, flags="A")).outcome == "fwd_reply"

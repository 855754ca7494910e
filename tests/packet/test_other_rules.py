"""Who decides about protocols other than TCP, UDP and ICMP: the configuration, and the node if it has them itself."""

from __future__ import annotations

import pytest
from scapy.all import (
    AH,
    UDP,
    IPv6ExtHdrDestOpt,
    Packet,
    Raw,
)

from .cases import BELOW, BY_FAMILY, IN_RANGE, opened
from .harness import A, each, v4, v6
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
    out,
    sent,
)
from .test_fragments import fragments
from .world import (
    NATIVE,
    NODE,
    WORLD,
    Node,
    address_of,
    carrying,
    from_pod,
    leaving,
    request,
)

pytestmark = pytest.mark.root

# ---- What cannot be masqueraded, and the rules

UNSUPPORTED = {
    "AH": leaving(4, A.ipv4) / AH(spi=7) / UDP(sport=IN_RANGE),
    "UDP-Lite": leaving(4, A.ipv4, proto=136) / Raw(bytes(20)),
    "no SCTP header": leaving(4, A.ipv4, proto=132) / Raw(bytes(11)),
    "v6 AH": leaving(6, A.ipv6) / AH(spi=7) / UDP(sport=IN_RANGE),
    "v6 UDP-Lite": leaving(6, A.ipv6, nh=136) / Raw(bytes(20)),
    "v6 behind destination options": leaving(6, A.ipv6) / IPv6ExtHdrDestOpt() / UDP(sport=IN_RANGE),
    "v6 no SCTP header": leaving(6, A.ipv6, nh=132) / Raw(bytes(11)),
}


@each(UNSUPPORTED)
def test_unsupported(node: Node, packet: Packet) -> None:
    """What covers the address itself, or is not known, does not leave, whether it is to be masqueraded or dropped."""
    for rule in (MASQUERADE, DROP):
        node.configure(other_protocols=rule)
        assert node.out(packet).outcome == "drop_masq_unsupported"


@EACH_OTHER
def test_drop(node: Node, kind: str, family: int) -> None:
    """If other protocols are dropped, that is at the uplink, and not on a way where masquerading does not apply."""
    node.configure(other_protocols=DROP)
    assert out(node, kind, family).outcome == "drop_masq_unsupported"
    assert node.entries("owners") == {}
    opened(node, "udp", family, BELOW)
    node.prefix(f"{WORLD[family]}/{32 if family == 4 else 128}", NATIVE)
    assert out(node, kind, family).outcome == "fwd_native"


@EACH_OTHER
def test_stack(node: Node, kind: str, family: int) -> None:
    """If they are the stack's, the stack gets them, and what it leaves as it is stays so; the rest is fast."""
    node.configure(other_protocols=STACK)
    carried = content(kind, BELOW, is_answer=False, data=b"")
    assert node.leave(from_pod(family, **carrying(NUMBERS[kind], family)) / carried).outcome == "punt_host"
    assert node.out(sent(kind, family, address_of(A, family)), fast=False).outcome == "fwd_native"
    assert node.entries("owners") == {}
    for known in ("tcp", "udp", "echo"):
        assert node.leave(from_pod(family) / request(known, family, BELOW)).outcome == "fwd_uplink"


@each(UNSUPPORTED)
def test_stack_of_the_unsupported(node: Node, packet: Packet) -> None:
    """That holds for what nobody here knows, too."""
    node.configure(other_protocols=STACK)
    assert node.out(packet, fast=False).outcome == "fwd_native"


def test_stack_and_fragments(node: Node) -> None:
    """With IPv6 all fragments are the stack's then; those of UDP are still masqueraded after it."""
    node.configure(other_protocols=STACK)
    frames = fragments(from_pod(6) / request("udp", 6, BELOW, data=LONG))
    assert {node.leave(frame).outcome for frame in frames} == {"punt_host"}
    frames = fragments(leaving(6, A.ipv6) / request("udp", 6, BELOW, data=LONG))
    assert {node.out(frame, fast=False).outcome for frame in frames} == {"masq_out"}
    assert {node.leave(frame).outcome for frame in fragments(from_pod(4) / UDP() / LONG)} == {"fwd_uplink"}


@pytest.mark.parametrize("rule", [DROP, MASQUERADE, STACK])
@EACH_OTHER
def test_between_pods(node: Node, kind: str, family: int, rule: int) -> None:
    """From pod to pod all protocols pass, whatever the rule."""
    node.configure(other_protocols=rule)
    carried = content(kind, BELOW, is_answer=False, data=b"")
    header = (v4 if family == 4 else v6)(**carrying(NUMBERS[kind], family))
    assert node.leave(header / carried).outcome == "fwd_local"


# ---- The node's own


@EACH_PORTLESS
def test_the_nodes_tunnel_comes_first(node: Node, kind: str, family: int) -> None:
    """A tunnel of the node's own is not a pod's, though no socket tells of it."""
    assert node.out(sent(kind, family, NODE[family]), fast=False).outcome == "fwd_host_out"
    assert out(node, kind, family).outcome == "drop_masq_exhausted"
    assert node.into(came(kind, family, NODE[family])).outcome == "fwd_host_in"


@EACH_PORTLESS
def test_the_node_comes_later(node: Node, kind: str, family: int) -> None:
    """If the node sends what a pod's flow has so far, it is the node's at once."""
    out(node, kind, family)
    assert node.out(sent(kind, family, NODE[family]), fast=False).outcome == "fwd_host_out"
    assert node.into(came(kind, family, NODE[family])).outcome == "fwd_host_in"
    assert out(node, kind, family).outcome == "drop_masq_exhausted"


@BY_FAMILY
def test_what_the_node_sends_by_sctp_takes_no_ports(node: Node, family: int) -> None:
    """The node's associations leave no trace where no pod has the port: its answers to outsiders could fill the map."""
    node.out(sent("sctp", family, NODE[family]), fast=False)
    assert node.entries("owners") == {}

"""What a pod's network decides: whom it reaches, and whether it is masqueraded."""

from __future__ import annotations

import pytest
from scapy.all import IPOption

from .cases import EACH
from .harness import A, B
from .world import FAMILIES, Node, answer, arriving, from_pod, leaving, request

pytestmark = pytest.mark.root

BY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def address(family: int) -> str:
    """Return pod B's."""
    return B.ipv4 if family == 4 else B.ipv6


@BY_FAMILY
@pytest.mark.parametrize(("ours", "theirs"), [(0, 1), (1, 0), (1, 2)])
def test_networks_do_not_mix(node: Node, family: int, ours: int, theirs: int) -> None:
    """A pod does not reach one of another network, unless the two are routed to each other."""
    node.alter_endpoints(A, network=ours)
    node.alter_endpoints(B, network=theirs)
    assert (
        node.leave(from_pod(family, A, address(family)) / request("udp", family, 5000)).outcome == "drop_other_network"
    )


def test_options_lead_nowhere_else(node: Node) -> None:
    """Nor does it by what is left to the stack unseen: IP options, or fragments of a pod that answers by the stack."""
    node.to_pod(arriving(4, A.ipv4) / request("udp", 4, 5000))
    node.alter_endpoints(B, network=1)
    options = from_pod(4, A, B.ipv4, options=[IPOption(b"\x94\x04\x00\x00")])
    for packet in (options, from_pod(4, A, B.ipv4, flags="MF")):
        assert node.leave(packet / request("udp", 4, 6000)).outcome == "drop_other_network"


def test_answer_by_the_stack(node: Node) -> None:
    """What the stack brought from another network, as a service does, is answered by the stack."""
    node.to_pod(arriving(4, A.ipv4, B.ipv4) / request("udp", 4, 5000))
    node.alter_endpoints(B, network=1)
    assert node.leave(from_pod(4, A, B.ipv4) / answer("udp", 4, 5000)).outcome == "punt_reply"


@pytest.mark.parametrize(("network", "outcome"), [(0, "punt_reply"), (1, "drop_other_network")])
def test_request_with_such_answers(node: Node, network: int, outcome: str) -> None:
    """Whoever asks by the same tuple is left to the stack, to be told from that flow, but not into another network."""
    packet = request("udp", 4, 5000)
    node.to_pod(arriving(4, B.ipv4, A.ipv4) / packet)
    node.alter_endpoints(A, via_stack=1)
    node.alter_endpoints(B, network=network)
    assert node.leave(from_pod(4, A, B.ipv4) / packet).outcome == outcome


@BY_FAMILY
@pytest.mark.parametrize("network", [0, 7])
def test_within_a_network(node: Node, family: int, network: int) -> None:
    """Pods of one network reach each other, in the flat one and in one of its own."""
    node.alter_endpoints(network=network)
    assert node.leave(from_pod(family, A, address(family)) / request("udp", family, 5000)).outcome == "fwd_local"


@EACH
def test_network_that_is_not_masqueraded(node: Node, kind: str, family: int) -> None:
    """Where `ipMasq` is false, a pod's packets leave as they are, and what the world asks is answered as ever."""
    node.alter_endpoints(A, native=1)
    source = A.ipv4 if family == 4 else A.ipv6
    assert node.out(leaving(family, source) / request(kind, family, 50000)).outcome == "fwd_native"
    assert node.entries("flows") == {}
    assert node.into(arriving(family, source) / request(kind, family, 5000)).outcome == "fwd_inbound"
    assert node.out(leaving(family, source) / answer(kind, family, 5000)).outcome == "fwd_reply"

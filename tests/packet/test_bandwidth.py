"""What an endpoint's limits decide: which way a packet goes, and what it is counted as."""

from __future__ import annotations

import pytest
from scapy.all import UDP, Packet

from .harness import BROADCAST, PASS, REDIRECT, A, B, arp, datagram, each, ethernet
from .world import FAMILIES, FAST, Node, address_of, answer, arriving, delivered, from_pod, leaving, request

pytestmark = pytest.mark.root

BY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
SHAPER = 0x7FFFFFFF
"""The index of no device: BPF_PROG_TEST_RUN redirects nothing."""

SENT = {
    "to the world": from_pod(4) / UDP(),
    "to the world, IPv6": from_pod(6) / UDP(),
    "to a pod": from_pod(4, A, B.ipv4) / UDP(),
    "to a pod, IPv6": from_pod(6, A, B.ipv6) / UDP(),
    "to the node": from_pod(4, A, "192.0.2.1") / UDP(),
    "options": datagram(4, options=[b"\x01"]),
    "multicast": datagram(6, A, "ff02::1"),
    "broadcast": ethernet(dst=BROADCAST) / datagram(4).payload,
    "link-local": datagram(6, A, "fe80::1"),
    "spent TTL": datagram(4, ttl=1),
    "fragment": datagram(4, frag=10),
}


@each(SENT)
def test_all_that_a_limited_pod_sends(node: Node, packet: Packet) -> None:
    """Whatever a limited pod sends in its own name goes to its queue, unchanged: no kind of packet passes it by."""
    node.alter_endpoints(A, shaper=SHAPER)
    ran = node.leave(packet)
    assert (ran.outcome, ran.verdict, ran.packet) == ("fwd_shaped", REDIRECT, bytes(packet))


@each(
    {
        "drop_spoofed_address": datagram(4, B),
        "drop_spoofed_mac": ethernet(src=B.mac) / datagram(4).payload,
        "drop_mapped_address": datagram(6, f"::ffff:{A.ipv4}"),
        "punt_arp": arp(),
        "punt_malformed": datagram(4, len=19),
        "punt_unknown_protocol": ethernet(type=0x88B5) / bytes(50),
    }
)
def test_what_is_not_limited(node: Node, packet: Packet, request: pytest.FixtureRequest) -> None:
    """A limit opens no way past the checks; and what the stack never forwards does not wait."""
    node.alter_endpoints(A, shaper=SHAPER)
    assert node.leave(packet).outcome == request.node.callspec.id


@BY_FAMILY
def test_limited_pods_of_other_networks(node: Node, family: int) -> None:
    """Networks stay apart, although the host stack has a route to every pod."""
    node.alter_endpoints(A, shaper=SHAPER, network=1)
    assert node.leave(from_pod(family, A, address_of(B, family)) / UDP()).outcome == "drop_other_network"
    node.alter_endpoints(B, network=1)
    assert node.leave(from_pod(family, A, address_of(B, family)) / UDP()).outcome == "fwd_shaped"


@BY_FAMILY
@pytest.mark.parametrize("queued", [0, 1])
def test_delivery(node: Node, family: int, queued: int) -> None:
    """What the fast path hands to a limited pod is sent to its queue, and marked; to any other pod it is not."""
    node.alter_endpoints(B, queued=queued)
    ran = node.leave(from_pod(family, A, address_of(B, family)) / UDP())
    assert (ran.outcome, ran.verdict, ran.mark) == ("fwd_local", REDIRECT, FAST if queued else 0)
    ran = node.into(arriving(family, address_of(B, family)) / UDP())
    assert (ran.outcome, ran.verdict, ran.mark) == ("fwd_inbound", REDIRECT, FAST if queued else 0)


@BY_FAMILY
def test_at_the_queue(node: Node, family: int) -> None:
    """There it is not taken for the stack's: no note sends the answers that way, and the mark goes no further."""
    packet = delivered(family, A) / request("udp", family, 5000)
    ran = node.to_queue(packet)
    assert (ran.outcome, ran.verdict, ran.mark) == ("fwd_queued", PASS, 0)
    assert node.entries("stack_flows") == {}
    assert node.to_pod(packet).outcome == "fwd_from_stack"
    assert len(node.entries("stack_flows")) == 1


@BY_FAMILY
def test_to_a_limited_pod(node: Node, family: int) -> None:
    """What comes to a pod whose answers take the stack takes it as well, so that conntrack sees both directions."""
    node.alter_endpoints(B, shaper=SHAPER)
    ran = node.leave(from_pod(family, A, address_of(B, family)) / UDP())
    assert (ran.outcome, ran.verdict, ran.mark) == ("punt_limited", PASS, 0)
    ran = node.into(arriving(family, address_of(B, family)) / request("udp", family, 5000))
    assert (ran.outcome, ran.verdict, ran.mark) == ("fwd_inbound", PASS, 0)
    replied = leaving(family, address_of(B, family)) / answer("udp", family, 5000)
    assert node.out(replied, fast=False).outcome == "fwd_reply"

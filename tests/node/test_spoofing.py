"""A pod speaks only for itself: what it forges is dropped and counted, and nobody hears it.

Frames are built by scapy and sent from inside a pod by a packet socket, past everything that the pod's own stack would
refuse to send.
"""

from __future__ import annotations

import pytest
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6NDOptDstLLAddr,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q
from scapy.packet import Packet

from agent.plan import link_local
from tests.node.frames import (
    BROADCAST,
    COUNT,
    FENCE,
    GATEWAY4,
    GATEWAY6,
    Ears,
    Frame,
    arp,
    drops,
    ether,
    ip,
    packet,
    send,
    to_all_nodes,
)
from tests.node.machine import Machine, Netns, TestPod

V4, V6 = 0, 1


@pytest.fixture(scope="module")
def node(shared_node: Machine) -> Machine:
    """All tests of this module share a node."""
    return shared_node


@pytest.fixture(scope="module")
def mallory(node: Machine) -> TestPod:
    """Make the pod that forges."""
    return node.make_pod("mallory")


@pytest.fixture(scope="module")
def bob(node: Machine) -> TestPod:
    """Make the pod that is to be harmed."""
    return node.make_pod("bob")


@pytest.fixture(scope="module")
def alice(node: Machine) -> TestPod:
    """Make the pod in whose name Mallory speaks."""
    return node.make_pod("alice")


def neighbours(*places: Netns) -> list[set[tuple[str, ...]]]:
    """Return who is where (address, device, MAC) as the given namespaces believe, on all devices but the uplink."""
    lines = [place.run("ip", "neighbour", "show").stdout.splitlines() for place in places]
    return [
        {tuple(line.split()[:5]) for line in each if "lladdr" in line and "dev uplink" not in line} for each in lines
    ]


FORGERIES: dict[str, tuple[str, Frame]] = {
    "an IPv4 address of nobody's": (
        "drop_spoofed_address",
        lambda me, victim, _: ether(me) / packet("10.244.0.222", victim.addresses[V4]),
    ),
    "an IPv6 address of nobody's": (
        "drop_spoofed_address",
        lambda me, victim, _: ether(me) / packet("fd00:10:244::222", victim.addresses[V6]),
    ),
    "another pod's IPv4 address": (
        "drop_spoofed_address",
        lambda me, victim, other: ether(me) / packet(other.addresses[V4], victim.addresses[V4]),
    ),
    "another pod's IPv6 address": (
        "drop_spoofed_address",
        lambda me, victim, other: ether(me) / packet(other.addresses[V6], victim.addresses[V6]),
    ),
    "the victim's own address": (
        "drop_spoofed_address",
        lambda me, victim, _: ether(me) / packet(victim.addresses[V4], victim.addresses[V4]),
    ),
    "another pod's address and MAC": (
        "drop_spoofed_address",
        lambda me, victim, other: ether(me, src=other.mac) / packet(other.addresses[V4], victim.addresses[V4]),
    ),
    "the node's address": (
        "drop_spoofed_address",
        lambda me, victim, _: ether(me) / packet("192.0.2.10", victim.addresses[V4]),
    ),
    "the gateway's address": (
        "drop_spoofed_address",
        lambda me, victim, _: ether(me) / packet(GATEWAY6, victim.addresses[V6]),
    ),
    "the loopback address": (
        "drop_spoofed_address",
        lambda me, victim, _: ether(me) / packet("127.0.0.1", victim.addresses[V4]),
    ),
    "no address": (
        "drop_spoofed_address",
        lambda me, victim, _: ether(me) / packet("0.0.0.0", victim.addresses[V4]),  # noqa: S104
    ),
    "another pod's link-local address": (
        "drop_spoofed_address",
        lambda me, victim, other: ether(me) / packet(str(link_local(other.mac)), victim.addresses[V6]),
    ),
    "another pod's MAC, IPv4": (
        "drop_spoofed_mac",
        lambda me, victim, other: ether(me, src=other.mac) / packet(me.addresses[V4], victim.addresses[V4]),
    ),
    "another pod's MAC, IPv6": (
        "drop_spoofed_mac",
        lambda me, victim, other: ether(me, src=other.mac) / packet(me.addresses[V6], victim.addresses[V6]),
    ),
    "a v4-mapped IPv6 source": (
        "drop_mapped_address",
        lambda me, victim, _: ether(me) / packet(f"::ffff:{me.addresses[V4]}", victim.addresses[V6]),
    ),
    "a v4-mapped IPv6 destination": (
        "drop_mapped_address",
        lambda me, victim, _: ether(me) / packet(me.addresses[V6], f"::ffff:{victim.addresses[V4]}"),
    ),
    "ARP: I am the other": (
        "drop_spoofed_arp",
        lambda me, _, other: ether(me) / arp(me, "is-at", other.addresses[V4], GATEWAY4),
    ),
    "ARP: I am the gateway": (
        "drop_spoofed_arp",
        lambda me, _, __: ether(me, dst=BROADCAST) / arp(me, "is-at", GATEWAY4, GATEWAY4),
    ),
    "ARP: I am the node": (
        "drop_spoofed_arp",
        lambda me, _, __: ether(me, dst=BROADCAST) / arp(me, "is-at", "192.0.2.10", "192.0.2.10"),
    ),
    "ARP request in another's name": (
        "drop_spoofed_arp",
        lambda me, victim, other: (
            ether(me, dst=BROADCAST) / arp(me, "who-has", other.addresses[V4], victim.addresses[V4])
        ),
    ),
    "ARP: gratuitous, of another's address": (
        "drop_spoofed_arp",
        lambda me, _, other: ether(me, dst=BROADCAST) / arp(me, "who-has", other.addresses[V4], other.addresses[V4]),
    ),
    "ARP: probe for another's address": (
        "drop_spoofed_arp",
        lambda me, _, other: ether(me, dst=BROADCAST) / arp(me, "who-has", "0.0.0.0", other.addresses[V4]),  # noqa: S104
    ),
    "ARP: my address is at another's MAC": (
        "drop_spoofed_arp",
        lambda me, _, other: ether(me) / ARP(op="is-at", hwsrc=other.mac, psrc=me.addresses[V4], pdst=GATEWAY4),
    ),
    "ARP: sent with another's MAC": (
        "drop_spoofed_arp",
        lambda me, _, other: ether(me, src=other.mac) / arp(me, "is-at", me.addresses[V4], GATEWAY4),
    ),
    "NA for another's address": (
        "drop_spoofed_neighbour",
        lambda me, _, other: (
            to_all_nodes(me) / ICMPv6ND_NA(tgt=other.addresses[V6], R=0, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=me.mac)
        ),
    ),
    "NA for the gateway's address": (
        "drop_spoofed_neighbour",
        lambda me, _, __: (
            to_all_nodes(me) / ICMPv6ND_NA(tgt=GATEWAY6, R=1, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=me.mac)
        ),
    ),
    "NA for another's address, to that pod": (
        "drop_spoofed_neighbour",
        lambda me, victim, other: (
            ether(me)
            / ip(me.addresses[V6], victim.addresses[V6], hlim=255)
            / ICMPv6ND_NA(tgt=other.addresses[V6], R=0, S=1, O=1)
            / ICMPv6NDOptDstLLAddr(lladdr=me.mac)
        ),
    ),
    "RA": (
        "drop_spoofed_neighbour",
        lambda me, _, __: to_all_nodes(me) / ICMPv6ND_RA(routerlifetime=1800),
    ),
    "redirect": (
        "drop_spoofed_neighbour",
        lambda me, victim, _: (
            ether(me)
            / ip(str(link_local(me.mac)), victim.addresses[V6], hlim=255)
            / ICMPv6ND_Redirect(tgt=str(link_local(me.mac)), dst="2001:db8::1")
        ),
    ),
    "a VLAN tag": (
        "drop_vlan",
        lambda me, victim, other: ether(me) / Dot1Q(vlan=7) / forged(victim, other),
    ),
    "a priority tag (VID 0)": (
        "drop_vlan",
        lambda me, victim, other: ether(me) / Dot1Q(vlan=0) / forged(victim, other),
    ),
    "a priority tag in a priority tag": (
        "drop_vlan",
        lambda me, victim, other: ether(me) / Dot1Q(vlan=0) / Dot1Q(vlan=0) / forged(victim, other),
    ),
    "a priority tag in a service tag": (
        "drop_vlan",
        lambda me, victim, other: ether(me) / Dot1AD(vlan=0) / Dot1Q(vlan=0) / forged(victim, other),
    ),
}


def forged(victim: TestPod, other: TestPod) -> Packet:
    """Return a packet that nobody but `other` may send."""
    return packet(other.addresses[V4], victim.addresses[V4])


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forgery(node: Machine, mallory: TestPod, bob: TestPod, alice: TestPod, forgery: str) -> None:
    """Each forgery is dropped, counted as what it is and nothing else, not heard by anybody, and changes no mind."""
    outcome, make = FORGERIES[forgery]
    places = (node.netns, mallory.netns, bob.netns, alice.netns)
    before, believed = node.packets(), neighbours(*places)
    with Ears(bob.netns) as victim, Ears(alice.netns) as third, Ears(mallory.netns) as own:
        send(mallory, bytes(make(mallory, bob, alice)))
        for target in (bob, alice):
            send(mallory, bytes(ether(mallory) / packet(mallory.addresses[V4], target.addresses[V4], FENCE)), 1)
        send(bob, bytes(ether(bob) / packet(bob.addresses[V4], mallory.addresses[V4], FENCE)), 1)
        heard = [frame for ears in (victim, third, own) for frame in ears.until(lambda frame: FENCE in frame)]
    after = node.packets()
    assert drops(after) == {**drops(before), outcome: before[outcome] + COUNT}
    assert heard == []
    assert neighbours(*places) == believed

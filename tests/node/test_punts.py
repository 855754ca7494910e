"""What a pod may send and podlane does not carry itself: the host stack gets it, and acts as a router should."""

from __future__ import annotations

import pytest
from scapy.layers.inet import ICMP, IP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RS,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrHopByHop,
    PadN,
)
from scapy.layers.l2 import Ether

from agent.plan import link_local
from tests.node.frames import (
    BROADCAST,
    COUNT,
    FENCE,
    GATEWAY4,
    GATEWAY6,
    PAYLOAD,
    Ears,
    Frame,
    arp,
    drops,
    ether,
    ip,
    packet,
    reply,
    send,
    to_all_nodes,
)
from tests.node.machine import Machine, TestPod
from tests.node.programs import wait_settled

V4, V6 = 0, 1


@pytest.fixture(scope="module")
def node(shared_node: Machine) -> Machine:
    """All tests of this module share a node."""
    return shared_node


@pytest.fixture(scope="module")
def pod(node: Machine) -> TestPod:
    """Make the pod that sends. While a program moves to its link, what it hands on to the stack counts twice."""
    it = node.make_pod("pod")
    wait_settled(node, it)
    return it


@pytest.fixture(scope="module")
def other(node: Machine) -> TestPod:
    """Make the pod that it sends to."""
    return node.make_pod("other")


PUNTS: dict[str, tuple[str, Frame]] = {
    "ARP for the gateway": (
        "punt_arp",
        lambda me, _, __: ether(me, dst=BROADCAST) / arp(me, "who-has", me.addresses[V4], GATEWAY4),
    ),
    "gratuitous ARP of its own": (
        "punt_arp",
        lambda me, _, __: ether(me, dst=BROADCAST) / arp(me, "who-has", me.addresses[V4], me.addresses[V4]),
    ),
    "NS for the gateway": (
        "punt_multicast",
        lambda me, _, __: (
            ether(me, dst="33:33:ff:00:00:01")
            / ip(str(link_local(me.mac)), "ff02::1:ff00:1", hlim=255)
            / ICMPv6ND_NS(tgt=GATEWAY6)
            / ICMPv6NDOptSrcLLAddr(lladdr=me.mac)
        ),
    ),
    "NS to the gateway": (
        "punt_link_local",
        lambda me, _, __: ether(me) / ip(me.addresses[V6], GATEWAY6, hlim=255) / ICMPv6ND_NS(tgt=GATEWAY6),
    ),
    "NA of its own address": (
        "punt_multicast",
        lambda me, _, __: to_all_nodes(me) / ICMPv6ND_NA(tgt=me.addresses[V6], R=0, S=0, O=1),
    ),
    "RS": (
        "punt_multicast",
        lambda me, _, __: (
            ether(me, dst="33:33:00:00:00:02") / ip(str(link_local(me.mac)), "ff02::2", hlim=255) / ICMPv6ND_RS()
        ),
    ),
    "multicast": (
        "punt_multicast",
        lambda me, _, __: ether(me, dst="01:00:5e:01:02:03") / packet(me.addresses[V4], "239.1.2.3"),
    ),
    "broadcast": (
        "punt_multicast",
        lambda me, _, __: ether(me, dst=BROADCAST) / packet(me.addresses[V4], "255.255.255.255"),
    ),
    "to the node": (
        "punt_host",
        lambda me, _, __: ether(me) / packet(me.addresses[V4], "192.0.2.10"),
    ),
    "to another MAC": (
        "punt_other_mac",
        lambda me, victim, _: ether(me, dst=victim.mac) / packet(me.addresses[V4], victim.addresses[V4]),
    ),
    "an unknown protocol": (
        "punt_unknown_protocol",
        lambda me, _, __: ether(me) / Ether(bytes(12) + b"\x88\xb5" + PAYLOAD).payload,
    ),
}


@pytest.mark.parametrize("what", PUNTS)
def test_honest_traffic_for_the_stack(node: Machine, pod: TestPod, other: TestPod, what: str) -> None:
    """It is handed to the host stack and counted as such; nothing is dropped."""
    outcome, make = PUNTS[what]
    before = node.packets()
    send(pod, bytes(make(pod, other, other)))
    after = node.packets()
    # Listeners' reports, which the pods' own stacks send when they like, are options and multicast as well.
    counted = after[outcome] - before[outcome]
    assert counted >= COUNT if outcome == "punt_multicast" else counted == COUNT
    assert drops(after) == drops(before)


@pytest.mark.parametrize("family", [V4, V6])
def test_options_go_by_way_of_the_stack(node: Machine, pod: TestPod, other: TestPod, family: int) -> None:
    """A packet that asks every router to look gets to the other pod by way of the host stack, which looks."""
    before = node.packets()
    header = (
        ip(pod.addresses[V4], other.addresses[V4], options=[IPOption_NOP()] * 4)
        if family == V4
        else ip(pod.addresses[V6], other.addresses[V6]) / IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(4))])
    )
    with Ears(other.netns) as ears:
        send(pod, bytes(ether(pod) / header / reply(family == V6, FENCE)), 1)
        ears.until(lambda frame: FENCE in frame)
    after = node.packets()
    assert after["punt_options"] > before["punt_options"]
    assert after["fwd_from_stack"] > before["fwd_from_stack"]
    assert after["fwd_local"] == before["fwd_local"]


@pytest.mark.parametrize("family", [V4, V6])
def test_expired_packets_are_answered(node: Machine, pod: TestPod, other: TestPod, family: int) -> None:
    """To a packet whose TTL ends here the node answers "time exceeded", as any router, and the pod gets nothing."""
    before = node.packets()
    frame = ether(pod) / (
        ip(pod.addresses[V4], other.addresses[V4], ttl=1) / ICMP(id=7) / PAYLOAD
        if family == V4
        else ip(pod.addresses[V6], other.addresses[V6], hlim=1) / ICMPv6EchoRequest(id=7) / PAYLOAD
    )
    with Ears(pod.netns) as ears:
        send(pod, bytes(frame), 1)
        ears.until(lambda heard: is_time_exceeded(heard, ["192.0.2.10", "2001:db8::10"][family]))
    after = node.packets()
    assert after["punt_ttl"] == before["punt_ttl"] + 1
    assert after["fwd_local"] == before["fwd_local"]


def is_time_exceeded(frame: bytes, sender: str) -> bool:
    """Say whether a frame is the answer of a router, of that address, to a packet of ours that expired."""
    packet = Ether(frame)
    if IP in packet:
        return packet[IP].src == sender and ICMP in packet and packet[ICMP].type == 11 and PAYLOAD in frame
    return IPv6 in packet and packet[IPv6].src == sender and ICMPv6TimeExceeded in packet and PAYLOAD in frame


@pytest.mark.parametrize("family", [V4, V6])
def test_traceroute_sees_one_router(node: Machine, pod: TestPod, other: TestPod, family: int) -> None:
    """With one hop more than allowed the packet expires at the node, with two it arrives."""
    address = other.addresses[family]
    expired = pod.netns.run("ping", "-c", "1", "-W", "2", "-t", "1", address, check=False)
    assert "ime to live exceeded" in expired.stdout or "ime exceeded" in expired.stdout
    assert node.pings(pod, address, "-t", "2")


@pytest.mark.parametrize("address", ["10.244.0.200", "fd00:10:244::200"])
def test_address_of_no_pod_is_unreachable(pod: TestPod, address: str) -> None:
    """A packet to an address of the node's own ranges that no pod has is answered "unreachable", not sent away."""
    shown = pod.netns.run("ping", "-c", "1", "-W", "2", address, check=False).stdout
    assert "nreachable" in shown or "No route" in shown

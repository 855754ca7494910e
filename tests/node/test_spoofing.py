"""A pod speaks only for itself: what it forges is dropped and counted, and nobody hears it.

Frames are built by scapy and sent from inside a pod by a packet socket, past everything that the pod's own stack would
refuse to send.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping

import pytest
from scapy.layers.inet import ICMP, IP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrHopByHop,
    PadN,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet

from agent.plan import link_local
from agent.wiring import HOST_MAC
from tests.node.machine import Machine, Netns, TestPod, machine

V4, V6 = 0, 1
COUNT = 5
BROADCAST = "ff:ff:ff:ff:ff:ff"
ALL_NODES = "33:33:00:00:00:01"
LISTENER_REPORTS = (bytes.fromhex("333300000016"), bytes.fromhex("01005e000016"))  # MLDv2, IGMPv3
GATEWAY4, GATEWAY6 = "169.254.1.1", "fe80::1"
PAYLOAD = b"forged by the tests of podlane"
FENCE = b"the last one, and no forgery"

Frame = Callable[[TestPod, TestPod, TestPod], Packet]
"""Makes a frame that the first pod sends to harm the second in the name of the third."""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        yield it


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


def send(pod: TestPod, frame: bytes, count: int = COUNT) -> None:
    """Send a frame from inside a pod, as it is."""

    def work() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind(("eth0", 0))
            for _ in range(count):
                wire.send(frame)

    pod.netns.call(work)


class Ears:
    """Hears every frame that comes in at a device, from its making on, but the reports of the node's own listeners."""

    def __init__(self, netns: Netns, device: str = "eth0") -> None:
        self._wire: socket.socket = netns.call(lambda: self._listen(device))

    @staticmethod
    def _listen(device: str) -> socket.socket:
        every_protocol = socket.htons(0x0003)
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, every_protocol)
        wire.bind((device, 0x0003))
        wire.settimeout(10)
        return wire

    def until(self, wanted: Callable[[bytes], bool]) -> list[bytes]:
        """Return the frames heard before the wanted one."""
        heard: list[bytes] = []
        while True:
            frame, sender = self._wire.recvfrom(65536)
            if sender[2] == socket.PACKET_OUTGOING or frame[:6] in LISTENER_REPORTS:
                continue
            if wanted(frame):
                return heard
            heard.append(frame)

    def __enter__(self) -> Ears:
        return self

    def __exit__(self, *_: object) -> None:
        self._wire.close()


def ether(source: TestPod, **fields: str) -> Packet:
    """Return the Ethernet header of what a pod sends to its gateway."""
    return Ether(**{"src": source.mac, "dst": HOST_MAC, **fields})


def ip(source: str, destination: str, **fields: object) -> Packet:
    """Return the IP header of either family."""
    return (IPv6 if ":" in source else IP)(src=source, dst=destination, **fields)


def reply(family: int, body: bytes = PAYLOAD) -> Packet:
    """Return an echo reply that nobody asked for: no stack answers it."""
    return (ICMPv6EchoReply(data=body)) if family == V6 else ICMP(type="echo-reply") / body


def packet(source: str, destination: str, body: bytes = PAYLOAD) -> Packet:
    """Return an IP packet of either family."""
    return ip(source, destination) / reply(V6 if ":" in source else V4, body)


def neighbours(*places: Netns) -> list[set[tuple[str, ...]]]:
    """Return who is where (address, device, MAC) as the given namespaces believe, on all devices but the uplink."""
    lines = [place.run("ip", "neighbour", "show").stdout.splitlines() for place in places]
    return [
        {tuple(line.split()[:5]) for line in each if "lladdr" in line and "dev uplink" not in line} for each in lines
    ]


def drops(packets: Mapping[str, int]) -> dict[str, int]:
    """Return the drop counters."""
    return {name: count for name, count in packets.items() if name.startswith("drop_")}


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
            to_all_nodes(me, other.addresses[V6])
            / ICMPv6ND_NA(tgt=other.addresses[V6], R=0, S=0, O=1)
            / ICMPv6NDOptDstLLAddr(lladdr=me.mac)
        ),
    ),
    "NA for the gateway's address": (
        "drop_spoofed_neighbour",
        lambda me, _, __: (
            to_all_nodes(me, GATEWAY6) / ICMPv6ND_NA(tgt=GATEWAY6, R=1, S=0, O=1) / ICMPv6NDOptDstLLAddr(lladdr=me.mac)
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
        lambda me, _, __: to_all_nodes(me, GATEWAY6) / ICMPv6ND_RA(routerlifetime=1800),
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


def arp(sender: TestPod, operation: str, address: str, target: str) -> Packet:
    """Return an ARP message that says: `address` is at the sender."""
    return ARP(op=operation, hwsrc=sender.mac, psrc=address, pdst=target)


def to_all_nodes(sender: TestPod, _: str) -> Packet:
    """Return the headers of neighbour discovery to everybody on the link."""
    return ether(sender, dst=ALL_NODES) / ip(str(link_local(sender.mac)), "ff02::1", hlim=255)


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
        lambda me, _, __: to_all_nodes(me, GATEWAY6) / ICMPv6ND_NA(tgt=me.addresses[V6], R=0, S=0, O=1),
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
"""What a pod may send and podlane does not carry itself: it is the host stack's."""


@pytest.mark.parametrize("what", PUNTS)
def test_honest_traffic_for_the_stack(node: Machine, mallory: TestPod, bob: TestPod, alice: TestPod, what: str) -> None:
    """It is handed to the host stack and counted as such; nothing is dropped."""
    outcome, make = PUNTS[what]
    before = node.packets()
    send(mallory, bytes(make(mallory, bob, alice)))
    after = node.packets()
    # Listeners' reports, which the pods' own stacks send when they like, are options and multicast as well.
    counted = after[outcome] - before[outcome]
    assert counted >= COUNT if outcome == "punt_multicast" else counted == COUNT
    assert drops(after) == drops(before)


@pytest.mark.parametrize("family", [V4, V6])
def test_options_go_by_way_of_the_stack(node: Machine, mallory: TestPod, bob: TestPod, family: int) -> None:
    """A packet that asks every router to look gets to the other pod by way of the host stack, which looks."""
    before = node.packets()
    header = (
        ip(mallory.addresses[V4], bob.addresses[V4], options=[IPOption_NOP()] * 4)
        if family == V4
        else ip(mallory.addresses[V6], bob.addresses[V6]) / IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(4))])
    )
    with Ears(bob.netns) as ears:
        send(mallory, bytes(ether(mallory) / header / reply(family, FENCE)), 1)
        ears.until(lambda frame: FENCE in frame)
    after = node.packets()
    assert after["punt_options"] > before["punt_options"]
    assert after["fwd_from_stack"] > before["fwd_from_stack"]
    assert after["fwd_local"] == before["fwd_local"]


@pytest.mark.parametrize("family", [V4, V6])
def test_expired_packets_are_answered(node: Machine, mallory: TestPod, bob: TestPod, family: int) -> None:
    """To a packet whose TTL ends here the node answers "time exceeded", as any router, and the pod gets nothing."""
    before = node.packets()
    frame = ether(mallory) / (
        ip(mallory.addresses[V4], bob.addresses[V4], ttl=1) / ICMP(id=7) / PAYLOAD
        if family == V4
        else ip(mallory.addresses[V6], bob.addresses[V6], hlim=1) / ICMPv6EchoRequest(id=7) / PAYLOAD
    )
    with Ears(mallory.netns) as ears:
        send(mallory, bytes(frame), 1)
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
def test_traceroute_sees_one_router(node: Machine, mallory: TestPod, bob: TestPod, family: int) -> None:
    """With one hop more than allowed the packet expires at the node, with two it arrives."""
    address = bob.addresses[family]
    expired = mallory.netns.run("ping", "-c", "1", "-W", "2", "-t", "1", address, check=False)
    assert "ime to live exceeded" in expired.stdout or "ime exceeded" in expired.stdout
    assert node.pings(mallory, address, "-t", "2")


@pytest.mark.parametrize("address", ["10.244.0.200", "fd00:10:244::200"])
def test_address_of_no_pod_is_unreachable(mallory: TestPod, address: str) -> None:
    """A packet to an address of the node's own ranges that no pod has is answered "unreachable", not sent away."""
    done = mallory.netns.run("ping", "-c", "1", "-W", "2", address, check=False)
    assert "nreachable" in done.stdout or "No route" in done.stdout

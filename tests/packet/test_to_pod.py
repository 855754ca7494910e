"""to_pod; a packet for each outcome; and both programs on real devices, for what BPF_PROG_TEST_RUN cannot show."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from scapy.all import ICMP, IP, UDP, Dot1Q, ICMPv6ND_NA, ICMPv6ND_RA, IPv6ExtHdrHopByHop, Packet, raw

from agent.datapath import libbpf
from agent.datapath.tables import Count

from .harness import (
    BROADCAST,
    NOWHERE,
    PASS,
    A,
    B,
    Rig,
    Wire,
    arp,
    attached,
    datagram,
    discovery,
    each,
    ethernet,
    forwarded,
    v4,
    v6,
)

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def no_stack_flows(rig: Rig) -> None:
    """Begin without notes of flows that the stack has sent to pods."""
    rig.forget_stack_flows()


FROM_STACK = {
    "IPv4": v4(B, A) / UDP(),
    "IPv6": v6(B, A) / UDP(),
    "from the world": v4(NOWHERE[4], A, ttl=1) / ICMP(),
    "from anybody": v4(NOWHERE[4], NOWHERE[4]) / UDP(),
    "to another MAC": ethernet(dst=BROADCAST) / IP(src=NOWHERE[4], dst=A.ipv4) / UDP(),
    "multicast": v6("fe80::1", "ff02::1", hlim=255) / UDP(),
    "router advertisement": v6("fe80::1", "ff02::1", hlim=255) / ICMPv6ND_RA(),
    "options": v6(NOWHERE[6], A) / IPv6ExtHdrHopByHop() / UDP(),
    "malformed": v4(B, A, ihl=1, len=9, version=7) / UDP(),
    "tagged": ethernet() / Dot1Q(vlan=5) / IP(dst=A.ipv4) / UDP(),
    "ARP": arp(hwsrc=B.mac, psrc="169.254.1.1"),
    "anything": ethernet(type=0x88B5) / bytes(range(100)),
}


EXAMPLES = {
    "fwd_local": datagram(4),
    "fwd_from_stack": datagram(4, B, A),
    "punt_arp": arp(),
    "punt_host": datagram(4, A, NOWHERE[4]),
    "punt_link_local": datagram(6, A, "fe80::1"),
    "punt_malformed": datagram(4, len=19),
    "punt_multicast": datagram(4, A, "224.0.0.1"),
    "punt_options": datagram(4, options=[b"\x01"]),
    "punt_other_mac": ethernet(dst=B.mac) / datagram(4).payload,
    "punt_ttl": datagram(4, ttl=1),
    "punt_unknown_protocol": ethernet(type=0x88B5) / bytes(50),
    "drop_mapped_address": datagram(6, f"::ffff:{A.ipv4}"),
    "drop_spoofed_address": datagram(4, B),
    "drop_spoofed_arp": arp(psrc=B.ipv4),
    "drop_spoofed_mac": ethernet(src=B.mac) / datagram(4).payload,
    "drop_spoofed_neighbour": discovery(ICMPv6ND_NA(tgt=B.ipv6)),
    "drop_vlan": ethernet() / Dot1Q(vlan=5) / datagram(4).payload,
}
"""A packet for each outcome at a pod's hooks, where nothing leads out of the node."""


@each(FROM_STACK)
def test_to_pod_passes_everything(rig: Rig, packet: Packet) -> None:
    """What the host stack sends to a pod is counted and goes on unchanged, whatever it is."""
    ran = rig.run(packet, program="to_pod")
    assert (ran.verdict, ran.packet, ran.outcome) == (PASS, raw(packet), "fwd_from_stack")


# ---- On real devices


@pytest.fixture(scope="module")
def wire(rig: Rig) -> Iterator[Wire]:
    """Attach the programs at both pods' host ends."""
    with attached(rig) as it:
        yield it


@pytest.mark.parametrize("size", [0, 1, 1400, 3600, 4096, 8900])
@pytest.mark.parametrize("family", [4, 6])
def test_delivery_to_the_other_pod(wire: Wire, family: int, size: int) -> None:
    """Packets arrive in the other pod byte for byte, even large ones of packet sockets, which are not linear."""
    with wire.socket(A) as sender, wire.socket(B) as receiver:
        frame = raw((v4() if family == 4 else v6()) / UDP() / bytes(n % 251 for n in range(size)))
        sender.send(frame)
        assert receiver.recv(65536) == forwarded(frame, B)
        assert wire.counted(1) == {"fwd_local": Count(1, len(frame))}


@each(
    {
        "IPv4": v4(options=[b"\x01" * 40]) / UDP(),
        "IPv6": v6() / UDP(),
        "ARP": arp(),
        "no EtherType known": ethernet(type=0x88B5) / bytes(10),
    }
)
def test_truncated_on_the_wire(wire: Wire, packet: Packet) -> None:
    """Every beginning of a packet, down to a bare Ethernet header, goes to the stack, counted once."""
    frame = raw(packet)
    sizes = range(14, len(frame))
    known = packet.type != 0x88B5
    with wire.socket(A) as sender:
        for size in sizes:
            sender.send(frame[:size])
        outcome = "punt_malformed" if known else "punt_unknown_protocol"
        assert wire.counted(len(sizes)) == {outcome: Count(len(sizes), sum(sizes))}


@pytest.mark.parametrize("tags", [1, 2, 3])
@pytest.mark.parametrize("vlan", [0, 5])
def test_vlan_on_the_wire(wire: Wire, vlan: int, tags: int) -> None:
    """Real devices take the outer VLAN tag out of the packet before the program runs: it is seen nevertheless."""
    packet = v4() / UDP()
    for _ in range(tags):
        packet = ethernet() / Dot1Q(vlan=vlan) / packet.payload
    with wire.socket(A) as sender:
        sender.send(raw(packet))
        counted = wire.counted(1)
    assert {name: count.packets for name, count in counted.items()} == {"drop_vlan": 1}


def test_from_the_host_to_a_pod(wire: Wire) -> None:
    """What leaves through the host end is counted as from the stack, and reaches the pod unchanged."""
    with wire.socket(A, at_host_end=True) as stack, wire.socket(A) as pod:
        sent = [raw(packet) for name, packet in FROM_STACK.items() if name != "tagged"]
        for frame in sent:
            stack.send(frame)
            assert pod.recv(65536) == frame
        assert wire.counted(len(sent)) == {"fwd_from_stack": Count(len(sent), sum(map(len, sent)))}


def test_foreign_programs_see_what_is_punted(rig: Rig, wire: Wire) -> None:
    """A foreign program behind ours runs for every packet that we punt, and for none that we forward or drop."""
    # to_pod is as good as any foreign program: it counts, under a name that from_pod never uses.
    foreign = libbpf.link_create(rig.datapath.programs["to_pod"], rig.indexes[A], libbpf.TCX_INGRESS, "foreign")
    try:
        with wire.socket(A) as sender:
            for name in EXAMPLES.keys() - {"fwd_from_stack"}:
                sender.send(raw(EXAMPLES[name]))
                seen = {name, "fwd_from_stack"} if name.startswith("punt_") else {name}
                assert set(wire.counted(len(seen))) == seen
    finally:
        os.close(foreign)

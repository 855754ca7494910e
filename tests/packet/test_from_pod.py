"""from_pod, packet by packet: what becomes of each, and how it looks afterwards.

`Rig.run` adds to every test: one outcome counted, with the right bytes; the verdict that goes with it; packets that are
not forwarded unchanged.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from itertools import product

import pytest
from scapy.all import (
    AH,
    ARP,
    ESP,
    GRE,
    ICMP,
    IP,
    LLC,
    SCTP,
    SNAP,
    TCP,
    UDP,
    Dot1AD,
    Dot1Q,
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6ND_Redirect,
    ICMPv6ND_RS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    Packet,
    Raw,
    SCTPChunkInit,
    raw,
)

from agent.wiring import HOST_MAC

from .harness import (
    BROADCAST,
    LARGEST,
    NOWHERE,
    A,
    B,
    Pod,
    Rig,
    arp,
    datagram,
    decremented,
    discovery,
    each,
    ethernet,
    internet,
    internet_checksum,
    v4,
    v6,
)

pytestmark = pytest.mark.root

FAMILIES = (4, 6)
UNSPECIFIED = str(IPv4Address(0))
DATA = bytes(range(256))
OTHER_MACS = {
    "the other pod's": B.mac,
    "broadcast": BROADCAST,
    "IPv4 multicast": "01:00:5e:00:00:01",
    "IPv6 multicast": "33:33:00:00:00:01",
}


def routed(packet: Packet, receiver: Pod = B) -> bytes:
    """Return the packet after one hop, as scapy builds it: a router's MACs, one less TTL, everything else the same."""
    after = packet.copy()
    after.src, after.dst = HOST_MAC, receiver.mac
    if IP in after:
        after[IP].ttl -= 1
        del after[IP].chksum
    else:
        after[IPv6].hlim -= 1
    return bytes(raw(after))


# ---- Forwarded to another local pod

FORWARDED = {
    "UDP": v4() / UDP() / DATA,
    "UDP without checksum": v4() / UDP(chksum=0) / DATA,
    "TCP": v4() / TCP(options=[("MSS", 1460), ("Timestamp", (1, 2))]) / DATA,
    "ICMP echo": v4() / ICMP() / DATA,
    "ICMP error": v4() / ICMP(type=3, code=4, nexthopmtu=1280) / raw(IP(src=B.ipv4, dst=A.ipv4) / UDP()),
    "SCTP": v4() / SCTP() / SCTPChunkInit(),
    "GRE": v4() / GRE() / DATA,
    "ESP": v4() / ESP(data=DATA),
    "AH": v4() / AH(icv=bytes(12)) / UDP(),
    "IP in IP": v4() / IP(src=NOWHERE[4], dst=NOWHERE[4], ttl=1) / UDP(),
    "unknown protocol": v4(proto=253) / DATA,
    "nothing in it": v4(proto=17),
    "odd length": v4(proto=253) / b"\xff",
    "first fragment": v4(flags="MF", id=7) / UDP(len=3000) / DATA,
    "middle fragment": v4(flags="MF", frag=33, id=7, proto=17) / DATA,
    "last fragment": v4(frag=65, id=7, proto=17) / DATA[:5],
    "DF": v4(flags="DF") / UDP() / DATA,
    "reserved flag": v4(flags="evil") / UDP() / DATA,
    "ECN and DSCP": v4(tos=0xBB) / UDP() / DATA,
    "padding after it": v4(len=28) / UDP(len=8) / (b"\xaa" * 30),
    "v6 UDP": v6() / UDP() / DATA,
    "v6 TCP": v6() / TCP() / DATA,
    "v6 ICMP echo": v6() / ICMPv6EchoRequest(data=DATA),
    "v6 SCTP": v6() / SCTP() / SCTPChunkInit(),
    "v6 ESP": v6() / ESP(data=DATA),
    "v6 unknown protocol": v6(nh=253) / DATA,
    "v6 no next header": v6(nh=59),
    "v6 ECN, DSCP, flow label": v6(tc=0xBB, fl=0xABCDE) / UDP() / DATA,
    "v6 destination options": v6() / IPv6ExtHdrDestOpt() / UDP() / DATA,
    "v6 routing header": v6() / IPv6ExtHdrRouting(addresses=[NOWHERE[6]]) / UDP() / DATA,
    "v6 first fragment": v6() / IPv6ExtHdrFragment(m=1, id=7) / UDP(len=3000) / DATA,
    "v6 last fragment": v6() / IPv6ExtHdrFragment(offset=33, id=7, nh=17) / DATA[:5],
    "v6 padding after it": v6(plen=8) / UDP(len=8) / (b"\xaa" * 30),
    "v6 payload length 0": v6(plen=0, nh=253) / DATA,
    "ICMPv6 that is not discovery, below": v6() / Raw(bytes([132, 0]) + bytes(22)),
    "ICMPv6 that is not discovery, above": v6(nh=58) / Raw(bytes([138, 0]) + bytes(22)),
    "ICMPv6 shorter than a header": v6(nh=58) / b"\x86",
}


@each(FORWARDED)
def test_local_delivery(rig: Rig, packet: Packet) -> None:
    """Whatever IP carries, a packet to a local pod is routed as it is: other MACs, one less TTL, not a bit else."""
    ran = rig.run(packet)
    assert ran.outcome == "fwd_local"
    assert ran.packet == routed(packet)


@pytest.mark.parametrize(("family", "ttl"), list(product(FAMILIES, (2, 3, 64, 128, 255))))
def test_ttl_goes_down_by_one(rig: Rig, family: int, ttl: int) -> None:
    """Every TTL above 1 is passed on one less."""
    ran = rig.run(datagram(family, ttl=ttl))
    assert ran.outcome == "fwd_local"
    assert ran.packet[22 if family == 4 else 21] == ttl - 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("sender", "receiver"), [(A, B), (B, A), (A, A)])
def test_each_pod_gets_what_is_its_own(rig: Rig, family: int, sender: Pod, receiver: Pod) -> None:
    """The receiver's MAC is the destination's, in both directions, and for a pod that sends to itself."""
    packet = ethernet(sender) / internet(family, sender, receiver) / UDP()
    ran = rig.run(packet, pod=sender)
    assert ran.outcome == "fwd_local"
    assert ran.packet == routed(packet, receiver)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes(rig: Rig, family: int) -> None:
    """The smallest packet there is and the largest that can be tested here pass alike."""
    header = len(raw(ethernet() / internet(family)))
    for size in (header, header + 1, 60, 1514, LARGEST):
        packet = ethernet() / internet(family) / Raw(bytes(size - header))
        assert rig.run(packet).packet == routed(packet)


EDGE_CHECKSUMS = (0x0000, 0x0001, 0x00FF, 0x0100, 0x7FFF, 0xFEFE, 0xFEFF, 0xFF00, 0xFF01, 0xFFFE)


def test_ipv4_checksum_stays_right(rig: Rig) -> None:
    """For every TTL and the checksums where carries happen, the new checksum is what the whole header gives."""
    for ttl, wanted in product(range(2, 256), EDGE_CHECKSUMS):
        frame = bytearray(raw(v4(ttl=ttl, chksum=0, id=0) / UDP()))
        # The checksum is linear in the identification: choose that one with which it comes out as wanted.
        frame[18:20] = struct.pack("!H", (internet_checksum(frame[14:34]) - wanted) % 0xFFFF)
        frame[24:26] = struct.pack("!H", wanted)
        assert internet_checksum(frame[14:34]) == 0, "the test's own packet is wrong"
        header = bytearray(rig.run(bytes(frame)).packet[14:34])
        checksum = bytes(header[10:12])
        header[10:12] = bytes(2)
        assert checksum == struct.pack("!H", internet_checksum(header)), (ttl, hex(wanted))


def test_a_wrong_checksum_stays_wrong(rig: Rig) -> None:
    """A damaged header is not given a valid checksum on the way: the receiver must be able to tell."""
    right = int.from_bytes(raw(datagram(4))[24:26], "big")
    for error in (1, 0x0100, 0x8000, 0xFFFE):
        wrong = (right + error) % 0xFFFF
        after = rig.run(datagram(4, chksum=wrong)).packet
        assert after[24:26] == struct.pack("!H", decremented(wrong))
        assert internet_checksum(after[14:34]) != 0


def test_checksum_of_all_ones(rig: Rig) -> None:
    """0xffff, the other zero of ones' complement, is as valid as 0 before the hop, and so is what comes after."""
    frame = bytearray(raw(v4(chksum=0, id=0) / UDP()))
    frame[18:20] = struct.pack("!H", internet_checksum(frame[14:34]))
    frame[24:26] = b"\xff\xff"
    assert internet_checksum(frame[14:34]) == 0
    assert internet_checksum(rig.run(bytes(frame)).packet[14:34]) == 0


def test_big_tcp(rig: Rig) -> None:
    """A length of 0 means "too big for the field" in a GSO packet, and nonsense in any other."""
    packet = v4(len=0) / TCP() / DATA
    assert rig.outcome(packet, gso_segments=2) == "fwd_local"
    assert rig.outcome(packet) == "punt_malformed"


# ---- To the host stack


@pytest.mark.parametrize(("family", "ttl"), list(product(FAMILIES, (0, 1))))
def test_expired(rig: Rig, family: int, ttl: int) -> None:
    """With a TTL of 1 or 0 it goes to the stack, which tells the sender."""
    assert rig.outcome(datagram(family, ttl=ttl)) == "punt_ttl"


@pytest.mark.parametrize(("family", "ttl"), list(product(FAMILIES, (0, 1, 64))))
def test_not_to_a_pod(rig: Rig, family: int, ttl: int) -> None:
    """What is not for a local pod is the stack's, at any TTL."""
    assert rig.outcome(datagram(family, A, NOWHERE[family], ttl=ttl)) == "punt_host"


@each(
    {
        "no-operation": v4(options=[b"\x01\x01\x01\x00"]) / UDP(),
        "record route": v4(options=[b"\x07\x07\x04" + bytes(4)]) / UDP(),
        "timestamp": v4(options=[b"\x44\x08\x05\x00" + bytes(4)]) / UDP(),
        "loose source route": v4(options=[b"\x83\x07\x04\x0a\x01\x00\x0b"]) / UDP(),
        "router alert": v4(options=[b"\x94\x04\x00\x00"]) / UDP(),
        "the longest": v4(options=[b"\x01" * 40]) / UDP(),
        "hop-by-hop header": v6() / IPv6ExtHdrHopByHop() / UDP(),
        "to nowhere": datagram(4, A, NOWHERE[4], options=[b"\x01"]),
        "multicast report": v6(destination="ff02::16") / IPv6ExtHdrHopByHop() / ICMPv6MLReport2(),
    }
)
def test_options(rig: Rig, packet: Packet) -> None:
    """Options that every router must look at are left to the stack."""
    assert rig.outcome(packet) == "punt_options"


@pytest.mark.parametrize(
    ("family", "group"),
    [
        (4, "224.0.0.0"),
        (4, "224.0.0.1"),
        (4, "239.255.255.255"),
        (4, "255.255.255.255"),
        (6, "ff00::"),
        (6, "ff02::1"),
        (6, "ff0e::1:2"),
    ],
)
def test_multicast(rig: Rig, family: int, group: str) -> None:
    """Multicast and broadcast go to the stack, whatever MAC they are sent to."""
    for mac in (HOST_MAC, *OTHER_MACS.values()):
        assert rig.outcome(ethernet(dst=mac) / internet(family, A, group) / UDP()) == "punt_multicast"


@pytest.mark.parametrize(
    "address", ["223.255.255.255", "240.0.0.1", "255.255.255.254", UNSPECIFIED, "127.0.0.1", "169.254.1.1"]
)
def test_almost_multicast(rig: Rig, address: str) -> None:
    """The addresses next to the multicast range, and others of their own kind, are not multicast."""
    assert rig.outcome(datagram(4, A, address)) == "punt_host"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mac", OTHER_MACS.values(), ids=OTHER_MACS.keys())
def test_other_mac(rig: Rig, family: int, mac: str) -> None:
    """A packet that was not sent to the gateway's MAC is not forwarded: it may have been seen by mistake."""
    assert rig.outcome(ethernet(dst=mac) / internet(family) / UDP()) == "punt_other_mac"


LINK_LOCAL = {
    "to the gateway": datagram(6, A, "fe80::1"),
    "to another pod's": datagram(6, A, B.link_local),
    "from and to link-local": datagram(6, A.link_local, B.link_local),
    "from link-local to a pod": datagram(6, A.link_local, B),
    "from link-local to nowhere": datagram(6, A.link_local, NOWHERE[6]),
    "to the last of fe80::/10": datagram(6, A, "febf:ffff::1"),
}


@each(LINK_LOCAL)
def test_link_local(rig: Rig, packet: Packet) -> None:
    """Link-local addresses, the sender's or the receiver's, never leave their link (RFC 4291 section 2.5.6)."""
    assert rig.outcome(packet) == "punt_link_local"


@pytest.mark.parametrize("address", ["fe7f:ffff::1", "fec0::1", "::1", "::"])
def test_almost_link_local(rig: Rig, address: str) -> None:
    """The addresses next to fe80::/10, and others of a scope of their own, are not link-local."""
    assert rig.outcome(datagram(6, A, address)) == "punt_host"


@each(
    {
        **{hex(kind): ethernet(type=kind) / DATA for kind in (0x0000, 0x8035, 0x8847, 0x8863, 0x88CC, 0x9100, 0xFFFF)},
        "LLC": ethernet(type=64) / LLC() / SNAP() / DATA[:56],
        "ARP for another protocol": arp(ptype=0x86DD),
        "ARP with long hardware addresses": arp(hwlen=8),
        "ARP with long protocol addresses": arp(plen=16),
        "ARP without addresses": arp(hwlen=0, plen=0) / bytes(20),
    }
)
def test_unknown_protocol(rig: Rig, packet: Packet) -> None:
    """What is neither IP nor ARP for IPv4 goes to the stack."""
    assert rig.outcome(packet) == "punt_unknown_protocol"


LYING = {
    **{f"IHL {ihl}": v4(ihl=ihl) / UDP() / DATA for ihl in range(5)},
    **{f"IPv4 version {version}": v4(version=version) / UDP() for version in (0, 3, 5, 6, 15)},
    "length 0": v4(len=0) / UDP(),
    "length less than the header": v4(len=19) / UDP(),
    "length less than the options": v4(ihl=15, len=59) / DATA,
    "options beyond the packet": v4(ihl=15, len=28) / UDP(),
    "one byte too long": v4(len=29) / UDP(),
    "much too long": v4(len=65535) / UDP(),
    **{f"IPv6 version {version}": v6(version=version) / UDP() for version in (0, 4, 5, 7, 15)},
    "payload one byte too long": v6(plen=9) / UDP(),
    "payload much too long": v6(plen=65535) / UDP(),
    "IPv6 under IPv4's EtherType": ethernet(type=0x0800) / internet(6) / UDP(),
    "IPv4 under IPv6's EtherType": ethernet(type=0x86DD) / internet(4) / UDP() / DATA,
}


@each(LYING)
def test_lying_headers(rig: Rig, packet: Packet) -> None:
    """Headers that contradict the packet or themselves are the stack's to discard, even if the sender is spoofed."""
    assert rig.outcome(packet) == "punt_malformed"


WHOLE = {
    "IPv4": v4(options=[b"\x01" * 40]) / TCP(),
    "IPv6": v6() / IPv6ExtHdrDestOpt() / UDP(),
    "discovery": discovery(ICMPv6ND_NA(tgt=A.ipv6)),
    "ARP": arp(),
}
"""Of these, BPF_PROG_TEST_RUN takes what is not shorter than the IP header; test_to_pod.py has the rest."""


@each(WHOLE)
def test_truncated(rig: Rig, packet: Packet) -> None:
    """Cut after any byte of any header, a packet is malformed; nothing crashes, nothing is dropped."""
    frame = raw(packet)
    shortest = {0x0800: 34, 0x86DD: 54, 0x0806: 15}[packet.type]
    assert {rig.outcome(frame[:size]) for size in range(shortest, len(frame))} == {"punt_malformed"}
    assert rig.outcome(frame) != "punt_malformed"


# ---- Dropped


@each(
    {
        "tagged": ethernet() / Dot1Q(vlan=5) / internet(4) / UDP(),
        "tagged by a provider": ethernet() / Dot1AD(vlan=5) / internet(4) / UDP(),
        "priority tag": ethernet() / Dot1Q(vlan=0, prio=7) / internet(6) / UDP(),
        "priority tag twice": ethernet() / Dot1Q(vlan=0) / Dot1Q(vlan=0) / internet(4, B) / UDP(),
        "tagged ARP": ethernet() / Dot1Q(vlan=0) / ARP(hwsrc=A.mac, psrc=B.ipv4),
        "tag without content": ethernet(type=0x8100) / b"\x00\x05",
    }
)
def test_vlan(rig: Rig, packet: Packet) -> None:
    """VLAN tags are dropped: the stack would strip some of them, and take what is inside without our check."""
    assert rig.outcome(packet) == "drop_vlan"


def mapped(address: str) -> str:
    """Return the v4-mapped form."""
    return f"::ffff:{address}"


@each(
    {
        "source is our own": datagram(6, mapped(A.ipv4), B),
        "source is another pod's": datagram(6, mapped(B.ipv4), A),
        "destination is a pod's": datagram(6, A, mapped(B.ipv4)),
        "destination is nobody's": datagram(6, A, mapped(NOWHERE[4])),
        "both": datagram(6, mapped(A.ipv4), mapped(B.ipv4)),
    }
)
def test_mapped_addresses(rig: Rig, packet: Packet) -> None:
    """An IPv6 packet with v4-mapped addresses can never pass for an IPv4 one, which the maps hold in that form."""
    assert rig.outcome(packet) == "drop_mapped_address"


FALSE_SOURCES = {
    4: (B.ipv4, NOWHERE[4], "10.1.0.9", UNSPECIFIED, "127.0.0.1", "169.254.1.1", "255.255.255.255", "224.0.0.1"),
    6: (B.ipv6, NOWHERE[6], "fd00::9", "::", "::1", "fe80::1", B.link_local, "ff02::1", f"::{A.ipv4}"),
}


@pytest.mark.parametrize(
    ("family", "source"), [(family, source) for family in FAMILIES for source in FALSE_SOURCES[family]]
)
def test_spoofed_addresses(rig: Rig, family: int, source: str) -> None:
    """A source that is not the pod's own is dropped, wherever the packet goes and whatever else is odd about it."""
    destinations: list[Pod | str] = [A, B, NOWHERE[family], {4: "224.0.0.1", 6: "ff02::1"}[family]]
    for destination, ttl in product(destinations, (1, 64)):
        assert rig.outcome(datagram(family, source, destination, ttl=ttl)) == "drop_spoofed_address"
    for mac in OTHER_MACS.values():
        assert rig.outcome(ethernet(dst=mac) / internet(family, source) / UDP()) == "drop_spoofed_address"


@pytest.mark.parametrize("family", FAMILIES)
def test_another_pods_whole_identity(rig: Rig, family: int) -> None:
    """Address and MAC of another pod are not enough: the packet must come in on that pod's device."""
    packet = ethernet(B) / internet(family, B, A) / UDP()
    assert rig.outcome(packet, pod=A) == "drop_spoofed_address"
    assert rig.outcome(packet, pod=B) == "fwd_local"


@pytest.mark.parametrize("bit", range(48))
def test_spoofed_mac(rig: Rig, bit: int) -> None:
    """One wrong bit in the source MAC is enough to drop a packet, of either family and to any destination."""
    octets = (int(A.mac.replace(":", ""), 16) ^ 1 << bit).to_bytes(6, "big")
    for family in FAMILIES:
        for layer in (internet(family), internet(family, A, NOWHERE[family])):
            assert rig.outcome(ethernet(src=octets.hex(":")) / layer / UDP()) == "drop_spoofed_mac"


@each(
    {
        "request": arp(),
        "request to the gateway's MAC": ethernet() / arp().payload,
        "reply": arp(op=2, hwdst=HOST_MAC),
        "probe for our own address": arp(psrc=UNSPECIFIED, pdst=A.ipv4),
        "gratuitous request": arp(pdst=A.ipv4),
        "gratuitous reply": arp(op=2, pdst=A.ipv4, hwdst=A.mac),
        "unknown operation": arp(op=99),
        "IEEE 802 hardware": raw(arp()).replace(b"\0\1\x08\0", b"\0\6\x08\0", 1),
        "padded": arp() / (b"\xff" * 18),
    }
)
def test_arp(rig: Rig, packet: Packet) -> None:
    """ARP in which a pod speaks for itself goes to the stack, which answers."""
    assert rig.outcome(packet) == "punt_arp"


@each(
    {
        "request as another pod": arp(psrc=B.ipv4),
        "request as the gateway": arp(psrc="169.254.1.1"),
        "reply for another pod": arp(op=2, psrc=B.ipv4, pdst=A.ipv4),
        "reply for the gateway": arp(op=2, psrc="169.254.1.1"),
        "gratuitous for another pod": arp(psrc=B.ipv4, pdst=B.ipv4),
        "probe for another pod's address": arp(psrc=UNSPECIFIED, pdst=B.ipv4),
        "probe for nothing": arp(psrc=UNSPECIFIED, pdst=UNSPECIFIED),
        "another MAC inside": arp(hwsrc=B.mac),
        "another MAC outside": ethernet(src=B.mac) / ARP(hwsrc=A.mac, psrc=A.ipv4, pdst=B.ipv4),
        "another MAC inside and outside": ethernet(src=B.mac) / ARP(hwsrc=B.mac, psrc=A.ipv4, pdst=B.ipv4),
    }
)
def test_spoofed_arp(rig: Rig, packet: Packet) -> None:
    """ARP in which a pod speaks for somebody else, by address or by MAC, is dropped."""
    assert rig.outcome(packet) == "drop_spoofed_arp"


@each(
    {
        "router solicitation": discovery(ICMPv6ND_RS(), destination="ff02::2"),
        "solicitation of the gateway": discovery(ICMPv6ND_NS(tgt="fe80::1"), destination="ff02::1:ff00:1"),
        "solicitation of another pod": discovery(ICMPv6ND_NS(tgt=B.ipv6), source=A.ipv6),
        "advertisement of our address": discovery(ICMPv6ND_NA(tgt=A.ipv6)),
        "advertisement of our link-local address": discovery(ICMPv6ND_NA(tgt=A.link_local), source=A.ipv6),
    }
)
def test_neighbour_discovery(rig: Rig, packet: Packet) -> None:
    """Neighbour discovery in which a pod speaks for itself goes to the stack."""
    assert rig.outcome(packet) == "punt_multicast"


@each(
    {
        "router advertisement": discovery(ICMPv6ND_RA()),
        "router advertisement to another pod": discovery(ICMPv6ND_RA(), source=A.ipv6, destination=B.ipv6),
        "redirect": discovery(ICMPv6ND_Redirect(tgt=A.link_local, dst=NOWHERE[6]), destination="fe80::1"),
        "redirect to another pod": discovery(ICMPv6ND_Redirect(), source=A.ipv6, destination=B.ipv6),
        "advertisement of another pod": discovery(ICMPv6ND_NA(tgt=B.ipv6)),
        "advertisement of the gateway": discovery(ICMPv6ND_NA(tgt="fe80::1")),
        "advertisement of another pod, to it": discovery(ICMPv6ND_NA(tgt=B.ipv6), source=A.ipv6, destination=B.ipv6),
        "advertisement of another pod's mapped address": discovery(ICMPv6ND_NA(tgt=mapped(B.ipv4))),
        "advertisement of our mapped address": discovery(ICMPv6ND_NA(tgt=mapped(A.ipv4))),
        "advertisement without target": discovery(Raw(bytes([136, 0]) + bytes(6))),
        "advertisement with half a target": discovery(Raw(bytes([136, 0]) + bytes(14))),
    }
)
def test_spoofed_neighbour_discovery(rig: Rig, packet: Packet) -> None:
    """A pod is no router, and advertises no address but its own."""
    if IPv6 in packet:
        packet[IPv6].nh = 58
    assert rig.outcome(packet) == "drop_spoofed_neighbour"


def test_a_source_is_checked_before_all_else(rig: Rig) -> None:
    """Options and discovery messages under a false name are drops, not punts: the source decides first."""
    assert rig.outcome(v4(source=B, options=[b"\x01"]) / UDP()) == "drop_spoofed_address"
    assert rig.outcome(v6(source=B) / IPv6ExtHdrHopByHop() / UDP()) == "drop_spoofed_address"
    assert rig.outcome(discovery(ICMPv6ND_RA(), source=B.link_local)) == "drop_spoofed_address"

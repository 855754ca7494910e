"""from_pod against a model of its rules: for whatever bytes a pod sends, both must agree, and nothing must go wrong.

The model says the rules of bpf/README.md once more, on plain bytes, and shares nothing with the C. PODLANE_FUZZ_PACKETS
sets how many packets the fuzz tests send; the long run here has half of them.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.all import ICMP, TCP, UDP, Dot1Q, ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6ND_RA, IPv6ExtHdrHopByHop, raw

from agent.datapath.tables import outcomes
from agent.state import Address
from agent.wiring import HOST_MAC

from .harness import FUZZ_PACKETS, NOWHERE, A, B, Pod, Rig, arp, discovery, ethernet, forwarded, internet, random_source
from .test_to_pod import EXAMPLES

pytestmark = pytest.mark.root

PACKETS = FUZZ_PACKETS // 2

# ---- The model

OWNERS: dict[Address, Pod] = {
    ip_address(address): pod for pod in (A, B) for address in (pod.ipv4, pod.ipv6, pod.link_local)
}


def octets(mac: str) -> bytes:
    """Return a MAC address as it stands in a packet."""
    return bytes.fromhex(mac.replace(":", ""))


def number(data: bytes) -> int:
    """Return a number in network byte order."""
    return int.from_bytes(data, "big")


def fate(frame: bytes, pod: Pod, segments: int) -> str:
    """Return the outcome of a frame that a pod sends; `segments` is above 0 for a GSO packet."""
    match number(frame[12:14]):
        case 0x0800:
            return fate_of_ipv4(frame, pod, segments)
        case 0x86DD:
            return fate_of_ipv6(frame, pod)
        case 0x0806:
            return fate_of_arp(frame, pod)
        case 0x8100 | 0x88A8:
            return "drop_vlan"
        case _:
            return "punt_unknown_protocol"


def fate_of_arp(frame: bytes, pod: Pod) -> str:
    """ARP: the sender, or for a probe the address asked about, must be the pod's; so must both MACs."""
    message = frame[14:]
    if len(message) < 28:
        return "punt_malformed"
    if message[2:6] != b"\x08\x00\x06\x04":
        return "punt_unknown_protocol"
    sender, target = IPv4Address(message[14:18]), IPv4Address(message[24:28])
    speaks_for = sender if int(sender) else target
    honest = OWNERS.get(speaks_for) == pod and frame[6:12] == message[8:14] == octets(pod.mac)
    return "punt_arp" if honest else "drop_spoofed_arp"


def fate_of_ipv4(frame: bytes, pod: Pod, segments: int) -> str:
    """IPv4: the header must make sense, then it is like IPv6."""
    packet = frame[14:]
    header = (packet[0] & 15) * 4
    length = number(packet[2:4])
    if length == 0 and segments:
        length = len(packet)
    if packet[0] >> 4 != 4 or not 20 <= header <= length <= len(packet):
        return "punt_malformed"
    source, destination = IPv4Address(packet[12:16]), IPv4Address(packet[16:20])
    if fault := false_source(frame, pod, source):
        return fault
    group = destination.is_multicast or destination == IPv4Address("255.255.255.255")
    return route(frame, destination, options=header > 20, group=group, link_local=False, ttl=packet[8])


def fate_of_ipv6(frame: bytes, pod: Pod) -> str:
    """IPv6: no v4-mapped addresses, no neighbour discovery but for oneself, then it is like IPv4."""
    packet = frame[14:]
    if packet[0] >> 4 != 6 or number(packet[4:6]) > len(packet) - 40:
        return "punt_malformed"
    source, destination = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    if source.ipv4_mapped or destination.ipv4_mapped:
        return "drop_mapped_address"
    if fault := false_source(frame, pod, source):
        return fault
    if packet[6] == 58 and not honest_discovery(packet[40:], pod):
        return "drop_spoofed_neighbour"
    link_local = source.is_link_local or destination.is_link_local
    options, group, ttl = packet[6] == 0, destination.is_multicast, packet[7]
    return route(frame, destination, options=options, group=group, link_local=link_local, ttl=ttl)


def false_source(frame: bytes, pod: Pod, source: Address) -> str | None:
    """Return what is wrong with the source, if anything."""
    if OWNERS.get(source) != pod:
        return "drop_spoofed_address"
    return None if frame[6:12] == octets(pod.mac) else "drop_spoofed_mac"


def honest_discovery(message: bytes, pod: Pod) -> bool:
    """Say whether a pod may send it: no router advertisement (134), no redirect (137), no foreign address (136)."""
    if len(message) < 8 or message[0] not in (134, 136, 137):
        return True
    own = len(message) >= 24 and OWNERS.get(IPv6Address(message[8:24])) == pod
    return message[0] == 136 and own


def route(frame: bytes, destination: Address, *, options: bool, group: bool, link_local: bool, ttl: int) -> str:
    """Return who carries on an honest packet."""
    reasons = {
        "punt_options": options,
        "punt_multicast": group,
        "punt_other_mac": frame[:6] != octets(HOST_MAC),
        "punt_link_local": link_local,
        "punt_host": destination not in OWNERS,
        "punt_ttl": ttl <= 1,
    }
    return next((reason for reason, applies in reasons.items() if applies), "fwd_local")


def receiver(frame: bytes) -> Pod:
    """Return the pod that an IP packet is for."""
    address = IPv4Address(frame[30:34]) if frame[12:14] == b"\x08\x00" else IPv6Address(frame[38:54])
    return OWNERS[address]


def check(rig: Rig, frame: bytes, pod: Pod, segments: int) -> str:
    """Run a frame; program and model must agree on the outcome and on the packet. `Rig.run` checks the rest."""
    expected = fate(frame, pod, segments)
    ran = rig.run(frame, pod=pod, gso_segments=segments)
    case = f"from pod {pod.device}, {segments} segments: {frame.hex()}"
    assert ran.outcome == expected, case
    if expected == "fwd_local":
        assert ran.packet == forwarded(frame, receiver(frame)), case
    return expected


def is_runnable(frame: bytes) -> bool:
    """Say whether BPF_PROG_TEST_RUN takes the frame: it wants whole IP headers."""
    return len(frame) >= 14 + {b"\x08\x00": 20, b"\x86\xdd": 40}.get(frame[12:14], 1)


# ---- Packets made field by field, each field right, nearly right or odd

ADDRESSES = {
    4: [A.ipv4, B.ipv4, NOWHERE[4], "169.254.1.1", "224.0.0.1", "255.255.255.255"],
    6: [A.ipv6, B.ipv6, A.link_local, B.link_local, NOWHERE[6], "fe80::1", "ff02::1", f"::ffff:{A.ipv4}"],
}
POOL = {family: [ip_address(text).packed for text in texts] for family, texts in ADDRESSES.items()}
MAC_POOL = [octets(mac) for mac in (A.mac, HOST_MAC, B.mac, "ff:ff:ff:ff:ff:ff", "33:33:00:00:00:01")]
ETHERTYPES = (0x0800, 0x86DD, 0x0806, 0x8100, 0x88A8, 0x88B5)
BYTE = st.integers(0, 255)


def mostly(usual: int, *others: int) -> st.SearchStrategy[int]:
    """Return the usual value in most cases: a packet that is wrong everywhere says little."""
    return st.sampled_from([usual] * 8 + list(others))


def near(length: int) -> st.SearchStrategy[int]:
    """Return mostly the right length, else one that is not far off, or 0."""
    return mostly(length, length - 1, length + 1, 0).map(lambda value: max(value, 0))


@st.composite
def ipv4_packets(draw: st.DrawFn) -> bytes:
    """Make an IPv4 packet."""
    options = draw(st.sampled_from([b"", b"", b"", b"\x01\x01\x01\x00", b"\x01" * 40]))
    rest = options + draw(st.binary(max_size=40))
    start = draw(mostly(4, 0, 6)) << 4 | draw(mostly(5 + len(options) // 4, 0, 4, 5, 6, 15))
    fragment = draw(st.sampled_from([0, 0x4000, 0x2000, 0x2010, 0x0010]))
    ttl, protocol = draw(mostly(64, 0, 1, 2, 255)), draw(BYTE)
    fields = (start, draw(BYTE), draw(near(20 + len(rest))), 1, fragment, ttl, protocol, draw(st.integers(0, 65535)))
    return struct.pack("!BBHHHBBH", *fields) + draw_ends(draw, 4) + rest


@st.composite
def ipv6_packets(draw: st.DrawFn) -> bytes:
    """Make an IPv6 packet, every other one with something that looks like neighbour discovery."""
    message = bytes([draw(st.integers(132, 138))]) + bytes(7) + draw(st.sampled_from(POOL[6]))
    rest = draw(st.one_of(st.binary(max_size=40), st.integers(0, 24).map(lambda size: message[:size])))
    next_header = draw(st.sampled_from([0, 6, 17, 43, 44, 58, 58, 58, 59, 60, 253]))
    fields = (draw(mostly(6, 0, 4)) << 28, draw(near(len(rest))), next_header, draw(mostly(64, 0, 1, 2, 255)))
    return struct.pack("!IHBB", *fields) + draw_ends(draw, 6) + rest


@st.composite
def arp_messages(draw: st.DrawFn) -> bytes:
    """Make an ARP message, perhaps cut short."""
    start = struct.pack("!HHBBH", draw(mostly(1, 6)), draw(mostly(0x0800, 0x86DD)), draw(mostly(6, 8)), 4, draw(BYTE))
    addresses = [draw(st.sampled_from([*POOL[4], bytes(4)])) for _ in range(2)]
    macs = [draw(st.sampled_from(MAC_POOL)) for _ in range(2)]
    return (start + macs[0] + addresses[0] + macs[1] + addresses[1])[: draw(mostly(28, 27, 8, 1))]


def draw_ends(draw: st.DrawFn, family: int) -> bytes:
    """Return a source, mostly pod A's, and a destination, mostly pod B's."""
    source, destination = draw(mostly(0, *range(len(POOL[family])))), draw(mostly(1, *range(len(POOL[family]))))
    return POOL[family][source] + POOL[family][destination]


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Make a frame around any of these, mostly with the right EtherType."""
    kind, content = draw(
        st.one_of(
            st.tuples(st.just(0x0800), ipv4_packets()),
            st.tuples(st.just(0x86DD), ipv6_packets()),
            st.tuples(st.just(0x0806), arp_messages()),
        )
    )
    macs = MAC_POOL[draw(mostly(1, 0, 2, 3, 4))] + MAC_POOL[draw(mostly(0, 1, 2, 3, 4))]
    return macs + struct.pack("!H", draw(mostly(kind, *ETHERTYPES))) + content


@settings(max_examples=800, deadline=None)
@given(frame=frames().filter(is_runnable), pod=st.sampled_from([A, A, A, B]), segments=st.sampled_from([0, 0, 2]))
def test_composed_packets(rig: Rig, frame: bytes, pod: Pod, segments: int) -> None:
    """Program and model agree on packets composed of odd fields (and Hypothesis finds the shortest that shows it)."""
    check(rig, frame, pod, segments)


# ---- Packets made by damaging good ones

SEEDS = [
    raw(packet)
    for packet in (
        *(ethernet() / internet(family) / layer / bytes(20) for family in (4, 6) for layer in (UDP(), TCP(), ICMP())),
        ethernet() / internet(4, options=[b"\x94\x04\x00\x00"]) / UDP(),
        ethernet() / internet(4, flags="MF", frag=100) / UDP(),
        ethernet() / internet(6) / IPv6ExtHdrHopByHop() / UDP(),
        ethernet() / internet(6, A.link_local, "fe80::1") / UDP(),
        ethernet() / Dot1Q(vlan=1) / internet(4) / UDP(),
        discovery(ICMPv6ND_NS(tgt="fe80::1")),
        discovery(ICMPv6ND_NA(tgt=A.ipv6), source=A.ipv6, destination=B.ipv6),
        discovery(ICMPv6ND_RA()),
        arp(),
        arp(op=2),
    )
]
ODD_BYTES = (0x00, 0x01, 0x02, 0x3A, 0x44, 0x45, 0x46, 0x60, 0x7F, 0x80, 0x86, 0x88, 0xFE, 0xFF)
OFFSETS = {4: (26, 30, 28, 38), 6: (22, 38, 62)}
"""Where addresses stand in IPv4 and ARP frames, and in IPv6 frames and neighbour discovery."""


def damaged(frame: bytearray, choose: random.Random) -> bytearray:
    """Change one thing about a frame."""
    position = choose.randrange(min(len(frame), 80)) if frame else 0
    match choose.randrange(9):
        case 0:
            frame[position : position + 1] = bytes([choose.choice(ODD_BYTES)])
        case 1 | 2 if frame:
            frame[position] ^= 1 << choose.randrange(8)
        case 3 | 4:
            family = choose.choice((4, 6))
            offset, address = choose.choice(OFFSETS[family]), choose.choice(POOL[family])
            frame[offset : offset + len(address)] = address
        case 5:
            offset = choose.choice((0, 6, 22))
            frame[offset : offset + 6] = choose.choice(MAC_POOL)
        case 6:
            frame[12:14] = choose.choice(ETHERTYPES).to_bytes(2, "big")
        case 7:
            offset = choose.choice((21, 22))  # hop limit and TTL
            frame[offset : offset + 1] = bytes([choose.choice((0, 1, 2, 255))])
        case _:
            del frame[choose.randrange(len(frame) + 1) :]
            frame += bytes(choose.randrange(20))
    return frame


def damaged_frames(choose: random.Random) -> Iterator[bytes]:
    """Yield frames that were good, each changed in up to four places."""
    while True:
        frame = bytearray(choose.choice(SEEDS))
        for _ in range(choose.randrange(5)):
            frame = damaged(frame, choose)
        if is_runnable(bytes(frame)):
            yield bytes(frame)


@pytest.mark.timeout(120 + PACKETS // 1000)
def test_damaged_packets(rig: Rig) -> None:
    """Program and model agree on packets damaged at random; every packet is counted; every outcome occurs."""
    choose = random_source()
    before, seen = outcomes(rig.datapath), Counter[str]()
    for frame in islice(damaged_frames(choose), PACKETS):
        pod, segments = choose.choice((A, A, A, B)), choose.choice((0, 0, 0, 2))
        seen[check(rig, frame, pod, segments)] += 1
    after = outcomes(rig.datapath)
    assert {name: after[name].packets - before[name].packets for name in after} == {name: seen[name] for name in after}
    assert seen.total() == PACKETS
    assert seen.keys() == EXAMPLES.keys() - {"fwd_from_stack"}

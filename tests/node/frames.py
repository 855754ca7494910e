"""Frames as a pod's own stack would never send them, built by scapy; and ears that hear what comes of them."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoReply, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from agent.plan import link_local
from agent.wiring import HOST_MAC
from tests.node.machine import Netns, TestPod

COUNT = 5
BROADCAST = "ff:ff:ff:ff:ff:ff"
GATEWAY4, GATEWAY6 = "169.254.1.1", "fe80::1"
PAYLOAD = b"forged by the tests of podlane"
FENCE = b"the last one, and no forgery"

ALL_NODES = "33:33:00:00:00:01"
LISTENER_REPORTS = (bytes.fromhex("333300000016"), bytes.fromhex("01005e000016"))  # MLDv2, IGMPv3

Frame = Callable[[TestPod, TestPod, TestPod], Packet]
"""Makes a frame that the first pod sends, about the second or in the name of the third."""


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


def reply(is_ipv6: bool, body: bytes = PAYLOAD) -> Packet:
    """Return an echo reply that nobody asked for: no stack answers it."""
    return (ICMPv6EchoReply(data=body)) if is_ipv6 else ICMP(type="echo-reply") / body


def packet(source: str, destination: str, body: bytes = PAYLOAD) -> Packet:
    """Return an IP packet of either family."""
    return ip(source, destination) / reply(":" in source, body)


def arp(sender: TestPod, operation: str, address: str, target: str) -> Packet:
    """Return an ARP message that says: `address` is at the sender."""
    return ARP(op=operation, hwsrc=sender.mac, psrc=address, pdst=target)


def to_all_nodes(sender: TestPod) -> Packet:
    """Return the headers of neighbour discovery to everybody on the link."""
    return ether(sender, dst=ALL_NODES) / ip(str(link_local(sender.mac)), "ff02::1", hlim=255)


def drops(packets: Mapping[str, int]) -> dict[str, int]:
    """Return the drop counters."""
    return {name: count for name, count in packets.items() if name.startswith("drop_")}

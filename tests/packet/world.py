"""A node for single packets: the two pods, an uplink with addresses and routes, and a world that is not there."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

from scapy.all import (
    ICMP,
    IP,
    SCTP,
    TCP,
    UDP,
    Ether,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    IPv6,
    Packet,
    SCTPChunkData,
    raw,
)

from agent.datapath.loader import Datapath, load
from agent.datapath.object import Object
from agent.datapath.testrun import CHECKSUM_COMPLETE, SkBuff
from agent.wiring import HOST_MAC
from tests.node.namespaces import new_netns

from ..support import bpffs, ip, private_network
from .harness import A, Pod, Ran, Rig, two_pods

UPLINK = "up0"
UPLINK_MAC, ROUTER_MAC = "02:00:00:00:01:01", "02:00:00:00:01:fe"

NODE = {4: "192.0.2.1", 6: "2001:db8:1::1"}
"""The node's addresses on the uplink."""

ROUTER = {4: "192.0.2.254", 6: "2001:db8:1::fe"}

WORLD = {4: "203.0.113.7", 6: "2001:db8:9::7"}
"""A host out there, by way of the router."""

OTHER = {4: "203.0.113.8", 6: "2001:db8:9::8"}
"""Another one."""

UNREACHABLE = {4: "198.18.0.1", 6: "2001:db8:dead::1"}
"""An address to which the node has no route."""

FAMILIES = (4, 6)
KINDS = ("tcp", "udp", "echo")

FAST = 0x706C0000
"""The mark of what from_pod sends out: FAST_MARK of bpf/mark.h."""

SETTINGS = {
    "first_port": 49152,
    "last_port": 65535,
    "tcp_open": 240,
    "tcp_established": 7440,
    "tcp_closed": 60,
    "udp": 300,
    "icmp": 60,
    "other": 600,
    "other_protocols": 1,
    "stack_routes": 0,
}

NATIVE, STACK, NODE_OWN = 1, 2, 4

SIZES = {
    "endpoints": 64,
    "uplinks": 8,
    "tunnels": 2,
    "node_addresses": 64,
    "prefixes": 64,
    "host_ports": 64,
    "flows": 256,
    "owners": 256,
    "inbound": 256,
    "conversations": 256,
    "stack_flows": 256,
    "fragments": 256,
}
"""Of the maps, in entries."""

_STATE = ("flows", "owners", "inbound", "conversations", "fragments", "prefixes", "host_ports", "tunnels")


class Node(Rig):
    """The rig with an uplink, forwarding switched on, and what masquerading needs in the maps."""

    def __init__(self, datapath: Datapath, pins: Path, pod_netns: dict[Pod, int], world_netns: int) -> None:
        super().__init__(datapath, pins, pod_netns)
        self.uplink = _uplink(world_netns)
        for pod in pod_netns:
            _forward(pod.device)
        self.reset()

    def reset(self) -> None:
        """Forget all flows and notes, and set everything else to its usual value."""
        for name in _STATE:
            for key, _ in self.datapath.maps[name].items():
                self.datapath.maps[name].delete(key)
        self.configure()
        self.datapath.maps["uplinks"].update(self.uplink, {"ipv4": word("::"), "ipv6": word("::")})
        for address in NODE.values():
            self.datapath.maps["node_addresses"].update(word(address), 1)
        self.forget_stack_flows()
        self.growth()

    def configure(self, **changes: int) -> None:
        """Write the usual settings, but for these."""
        self.datapath.maps["settings"].update(0, {**SETTINGS, **changes})

    def prefix(self, network: str, lanes: int) -> None:
        """Give a prefix lanes of its own."""
        parsed = ip_network(network)
        length = parsed.prefixlen + (96 if parsed.version == 4 else 0)
        self.datapath.maps["prefixes"].update(
            {"length": length, "address": word(parsed.network_address)}, {"kind": lanes}
        )

    def leave(self, packet: Packet | bytes, *, pod: Pod = A, gso_size: int = 0) -> Ran:
        """Run from_pod on what a pod sends."""
        return self.run(packet, pod=pod, gso_segments=2 if gso_size else 0, gso_size=gso_size)

    def out(self, packet: Packet | bytes, *, fast: bool = True, came_by: int = 0) -> Ran:
        """Run to_uplink on what leaves the node: past the host stack, or through it.

        `came_by` is the index of the device by which the stack has got it, 0 for what it sends itself.
        """
        context = SkBuff(ifindex=self.uplink, mark=FAST if fast else 0, ingress_ifindex=came_by)
        return self.run_in(context, packet, program="to_uplink")

    def into(self, packet: Packet | bytes) -> Ran:
        """Run from_uplink on what comes from outside; the kernel's own sum of the packet must stay right, too."""
        return self.run_in(SkBuff(ifindex=self.uplink), packet, program="from_uplink", flags=CHECKSUM_COMPLETE)

    def to_pod(self, packet: Packet | bytes, *, pod: Pod = A) -> Ran:
        """Run to_pod on what the host stack sends to a pod."""
        return self.run(packet, program="to_pod", pod=pod)

    def to_queue(self, packet: Packet | bytes, *, pod: Pod = A) -> Ran:
        """Run to_pod on what another program sends to a limited pod."""
        return self.run_in(SkBuff(ifindex=self.indexes[pod], mark=FAST), packet, program="to_pod")

    def entries(self, name: str) -> dict[tuple[str, int, str, int], Any]:
        """Return the entries of a map that is keyed by tuples: source, its port, destination, its port."""
        return {
            (
                text(key["source"]),
                socket.ntohs(key["source_port"]),
                text(key["destination"]),
                socket.ntohs(key["destination_port"]),
            ): value
            for key, value in self.datapath.maps[name].items()
        }

    def alter(self, name: str, **changes: object) -> None:
        """Change fields of all entries of a map; with no changes, delete them."""
        entries = self.datapath.maps[name]
        for key, value in list(entries.items()):
            if changes:
                entries.update(key, {**value, **changes})
            else:
                entries.delete(key)


def word(address: str | IPv4Address | IPv6Address) -> Mapping[str, bytes]:
    """Return an address as `struct addr`."""
    parsed = ip_address(str(address))
    return {"word": (parsed if parsed.version == 6 else ip_address(f"::ffff:{parsed}")).packed}


def text(address: Mapping[str, Any]) -> str:
    """Return a `struct addr` as people write it."""
    packed = b"".join(number.to_bytes(4, "little") for number in address["word"])
    parsed = IPv6Address(packed)
    return str(parsed.ipv4_mapped or parsed)


@contextmanager
def world_netns() -> Iterator[int]:
    """Make the network namespace in which the uplink's other end is."""
    netns = new_netns()
    try:
        yield netns
    finally:
        os.close(netns)


@contextmanager
def node_places() -> Iterator[tuple[dict[Pod, int], int]]:
    """Make the namespaces that a node is in and next to."""
    with two_pods() as pods, world_netns() as world, private_network():
        yield pods, world


@contextmanager
def loaded_node(compiled: Object, folder: Path, sizes: Mapping[str, int]) -> Iterator[Node]:
    """Load the datapath for a node of its own, in a folder of its own; `sizes` are of maps, in entries."""
    with bpffs(folder / "bpffs") as mounted, node_places() as (pods, world):
        pins = mounted / "podlane"
        with load(compiled, pins, {**SIZES, **sizes}) as loaded:
            yield Node(loaded, pins, pods, world)


def _uplink(netns: int) -> int:
    peer = ["peer", "name", "world0", "address", ROUTER_MAC, "netns", f"/proc/{os.getpid()}/fd/{netns}"]
    ip("link", "add", UPLINK, "address", UPLINK_MAC, "type", "veth", *peer)
    _forward(UPLINK)
    ip("link", "set", "lo", "up")
    ip("link", "set", UPLINK, "up")
    for family, size in ((4, 24), (6, 64)):
        address = f"{NODE[family]}/{size}"
        ip("address", "add", address, "dev", UPLINK, *(["nodad"] if family == 6 else []))
        ip("neighbour", "add", ROUTER[family], "lladdr", ROUTER_MAC, "dev", UPLINK, "nud", "permanent")
        ip(f"-{family}", "route", "add", "default", "via", ROUTER[family])
        ip(f"-{family}", "route", "add", "unreachable", UNREACHABLE[family])
    return socket.if_nametoindex(UPLINK)


def _forward(device: str) -> None:
    settings = Path("/proc/sys/net")
    (settings / "ipv6/conf" / device / "disable_ipv6").write_text("0")
    for family in ("ipv4", "ipv6"):
        (settings / family / "conf" / device / "forwarding").write_text("1")


# ---- Packets


def frame(
    source_mac: str, destination_mac: str, family: int, source: str, destination: str, **fields: object
) -> Packet:
    """Return Ethernet and IP headers. TTL and hop limit are both called `ttl` here."""
    ethernet = Ether(src=source_mac, dst=destination_mac)
    if family == 6 and "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    return ethernet / (IP if family == 4 else IPv6)(src=source, dst=destination, **fields)


def leaving(family: int, source: str, destination: str | None = None, **fields: object) -> Packet:
    """Return the headers of what is about to leave by the uplink."""
    return frame(UPLINK_MAC, ROUTER_MAC, family, source, destination or WORLD[family], **fields)


def arriving(family: int, destination: str, source: str | None = None, **fields: object) -> Packet:
    """Return the headers of what has come in by the uplink."""
    return frame(ROUTER_MAC, UPLINK_MAC, family, source or WORLD[family], destination, **fields)


def delivered(family: int, pod: Pod, source: str | None = None, **fields: object) -> Packet:
    """Return the headers of what came from the world as the pod gets it, with one hop less than it came with."""
    fields["ttl"] = int(str(fields.pop("ttl", 64))) - 1
    source_mac = UPLINK_MAC
    return frame(source_mac, pod.mac, family, source or WORLD[family], address_of(pod, family), **fields)


def from_pod(family: int, pod: Pod = A, destination: str | None = None, **fields: object) -> Packet:
    """Return the headers of what a pod sends to the world."""
    return frame(pod.mac, HOST_MAC, family, address_of(pod, family), destination or WORLD[family], **fields)


def carrying(protocol: int, family: int) -> dict[str, Any]:
    """Return the IP header's field that says what it carries."""
    return {"proto" if family == 4 else "nh": protocol}


def address_of(pod: Pod, family: int) -> str:
    """Return the pod's address."""
    return pod.ipv4 if family == 4 else pod.ipv6


def request(
    kind: str, family: int, port: int, *, data: bytes = b"payload", flags: str = "S", to_port: int = 443
) -> Packet:
    """Return the transport part of what a pod sends from a port (an echo: with that identifier)."""
    match kind:
        case "tcp":
            return TCP(sport=port, dport=to_port, flags=flags, options=[("MSS", 1460), ("SAckOK", b"")]) / data
        case "udp":
            return UDP(sport=port, dport=to_port) / data
        case "sctp":
            return SCTP(sport=port, dport=to_port, tag=7) / SCTPChunkData(data=data)
        case _:
            return (ICMP(id=port, seq=3) if family == 4 else ICMPv6EchoRequest(id=port, seq=3)) / data


def answer(
    kind: str, family: int, port: int, *, data: bytes = b"answer!", flags: str = "SA", to_port: int = 443
) -> Packet:
    """Return the transport part of the answer to that."""
    match kind:
        case "tcp":
            return TCP(sport=to_port, dport=port, flags=flags) / data
        case "udp":
            return UDP(sport=to_port, dport=port) / data
        case "sctp":
            return SCTP(sport=to_port, dport=port, tag=8) / SCTPChunkData(data=data)
        case _:
            return (ICMP(type=0, id=port, seq=3) if family == 4 else ICMPv6EchoReply(id=port, seq=3)) / data


def source_port(kind: str, packet: bytes, family: int) -> int:
    """Return a packet's source port, or an echo's identifier."""
    start = 14 + (20 if family == 4 else 40) + (4 if kind == "echo" else 0)
    return int.from_bytes(packet[start : start + 2], "big")


def built(packet: Packet) -> bytes:
    """Return the packet's bytes, every checksum computed anew by scapy."""
    return bytes(raw(packet))

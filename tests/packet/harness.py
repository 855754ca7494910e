"""Single packets through the real programs: two pods' host ends, and what the programs do at them.

`Rig.run` uses BPF_PROG_TEST_RUN. It cannot do everything: frames shorter than their IP header (the kernel refuses
them), longer than a page, or not linear need a real device, and a redirect is only a verdict there. For these, `Wire`
has the programs attached and real frames sent.
"""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.all import ARP, IP, UDP, Ether, IPv6, Packet, raw

from agent.datapath.loader import Datapath
from agent.datapath.tables import Count, EndpointTable, TcxHooks, outcomes
from agent.datapath.testrun import SkBuff, run
from agent.netlink.netns import in_netns
from agent.plan import link_local
from agent.state import Attached, Endpoint, Hook
from agent.wiring import HOST_MAC
from tests.node.namespaces import new_netns

from ..support import ip

PASS, DROP, REDIRECT = -1, 2, 7  # TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT

SENT = {"fwd_local", "fwd_uplink", "fwd_shaped", "fwd_tunnel"}
"""Outcomes of what goes past the host stack."""

DELIVERED = {"fwd_inbound", "fwd_from_peer", "masq_in", "port_in", "port_local"}
"""Outcomes of what goes to a pod, past the host stack if nothing is odd about it."""

CHANGED = SENT | DELIVERED | {"masq_out", "fwd_to_peer", "port_out", "port_shaped"}
"""Outcomes of what is not left as it was."""

LARGEST = 3712
"""The largest frame BPF_PROG_TEST_RUN takes, in bytes: a page less the kernel's own headroom and tailroom."""

FUZZ_PACKETS = int(os.environ.get("PODLANE_FUZZ_PACKETS", "600000"))
"""How many random packets the fuzz tests send, all programs together."""

BROADCAST = "ff:ff:ff:ff:ff:ff"

NOWHERE = {4: "198.51.100.1", 6: "2001:db8::1"}
"""Addresses that no pod has (RFC 5737, RFC 3849)."""

_ALL_ETHERTYPES = 0x0003
_SECONDS = 10.0


@dataclass(frozen=True)
class Pod:
    """A pod of the rig: the host end and own end of its pair, and what it may call itself."""

    device: str
    peer: str
    mac: str
    ipv4: str
    ipv6: str

    @property
    def link_local(self) -> str:
        """Its IPv6 link-local address."""
        return str(link_local(self.mac))


A = Pod("pla", "poda", "02:00:00:00:00:0a", "10.1.0.10", "fd00::a")
B = Pod("plb", "podb", "02:00:00:00:00:0b", "10.1.0.11", "fd00::b")


@dataclass(frozen=True)
class Ran:
    """What one run did: the program's verdict, the packet it left, and the one outcome it counted."""

    verdict: int
    packet: bytes
    outcome: str
    mark: int = 0


class Rig:
    """The datapath with the pods A and B as endpoints, and devices for them in the current network namespace.

    The pods' ends are in namespaces of their own, given by descriptor: a packet cannot be redirected to a peer in the
    namespace that it is in.
    """

    def __init__(self, datapath: Datapath, pins: Path, pod_netns: dict[Pod, int]) -> None:
        self.datapath = datapath
        self.pins = pins
        self.pod_netns = pod_netns
        self.indexes = {pod: _pair(pod, netns) for pod, netns in pod_netns.items()}
        table = {
            ip_address(address): Endpoint(index, pod.mac)
            for pod, index in self.indexes.items()
            for address in (pod.ipv4, pod.ipv6, pod.link_local)
        }
        assert EndpointTable(datapath.maps["endpoints"]).upsert(table) == {}
        self._outcomes = list(outcomes(datapath))
        self._counted = self._counters()

    def run(
        self,
        packet: Packet | bytes,
        *,
        program: str = "from_pod",
        pod: Pod = A,
        gso_segments: int = 0,
        gso_size: int = 0,
    ) -> Ran:
        """Run a program on a packet of the pod's (bytes, or what scapy builds), with `run_in`'s checks."""
        context = SkBuff(ifindex=self.indexes[pod], gso_segs=gso_segments, gso_size=gso_size)
        return self.run_in(context, packet, program=program)

    def run_in(self, context: SkBuff, packet: Packet | bytes, *, program: str, flags: int = 0) -> Ran:
        """Run a program of the datapath, by its name, as `run_program` does."""
        return self.run_program(context, packet, program=self.datapath.programs[program], flags=flags)

    def run_program(self, context: SkBuff, packet: Packet | bytes, *, program: int, flags: int = 0) -> Ran:
        """Run a program, by descriptor, in a context, and check what holds for every packet.

        That is: one outcome grew, by one packet and the frame's bytes; the verdict is one that the outcome may have;
        and only a packet that is sent on was changed.
        """
        frame = raw(packet)
        result = run(program, frame, context=context, flags=flags)
        ((outcome, count),) = self.growth().items()
        assert count == (1, len(frame))
        assert result.verdict in verdicts_of(outcome), outcome
        assert outcome in CHANGED or result.packet == frame
        return Ran(result.verdict, result.packet, outcome, result.context.mark)

    def outcome(self, packet: Packet | bytes, *, pod: Pod = A, gso_segments: int = 0) -> str:
        """Return the outcome that `run` found from_pod to count."""
        return self.run(packet, pod=pod, gso_segments=gso_segments).outcome

    def forget_stack_flows(self) -> None:
        """Forget which flows to_pod has seen: from_pod would leave their answers to the stack."""
        notes = self.datapath.maps["stack_flows"]
        for key, _ in notes.items():
            notes.delete(key)
        self.alter_endpoints(via_stack=0, native=0, network=0, shaper=0, queued=0, serves=0)

    def alter_endpoints(self, pod: Pod | None = None, **fields: int) -> None:
        """Set fields of the endpoints of one pod, by default of all."""
        endpoints = self.datapath.maps["endpoints"]
        for key, value in endpoints.items():
            if pod is None or value["ifindex"] == self.indexes[pod]:
                endpoints.update(key, {**value, **fields})

    def growth(self) -> dict[str, Count]:
        """Return the outcomes counted since the last call, and by how much they grew."""
        before, self._counted = self._counted, self._counters()
        grown: dict[str, Count] = {}
        for at in range(0, len(before), 2):
            if before[at : at + 2] != self._counted[at : at + 2]:
                name = self._outcomes[at // 2 % len(self._outcomes)]
                packets, size = grown.get(name, (0, 0))
                more = [self._counted[each] - before[each] for each in (at, at + 1)]
                grown[name] = Count(packets + more[0], size + more[1])
        return grown

    def _counters(self) -> tuple[int, ...]:
        """Return packets and bytes of each outcome, CPU by CPU; to decode them all would be slow."""
        counters = self.datapath.maps["outcomes"].get_bytes(bytes(4))
        assert counters
        return struct.unpack(f"={len(counters) // 8}Q", counters)


def random_source() -> random.Random:
    """Return a source of random numbers; pytest shows its seed when the test fails."""
    seed = random.randrange(1 << 32)
    print(f"random.Random({seed})")
    return random.Random(seed)


def verdicts_of(outcome: str) -> set[int]:
    """Return the verdicts that an outcome may have, by its name."""
    if outcome in DELIVERED:
        return {PASS, REDIRECT}
    if outcome in SENT:
        return {REDIRECT}
    return {DROP} if outcome.startswith("drop_") else {PASS}


class Wire:
    """The pods' devices with the programs attached, as on a node."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        rig.growth()

    def socket(self, pod: Pod, *, at_host_end: bool = False) -> socket.socket:
        """Open a packet socket at the pod's own end, or at the host end. The caller closes it."""

        def open_socket() -> socket.socket:
            packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_ETHERTYPES))
            packets.bind((pod.device if at_host_end else pod.peer, _ALL_ETHERTYPES))
            packets.settimeout(_SECONDS)
            return packets

        return open_socket() if at_host_end else in_netns(self._rig.pod_netns[pod], open_socket)

    def counted(self, packets: int) -> dict[str, Count]:
        """Return what was counted since the last call, once it is as many packets as given."""
        deadline = time.monotonic() + _SECONDS
        total: dict[str, Count] = {}
        while sum(count.packets for count in total.values()) < packets and time.monotonic() < deadline:
            for name, count in self._rig.growth().items():
                so_far = total.get(name, Count(0, 0))
                total[name] = Count(so_far.packets + count.packets, so_far.bytes + count.bytes)
        return total


@contextmanager
def attached(rig: Rig) -> Iterator[Wire]:
    """Attach the programs at both pods' host ends for the duration."""
    hooks = TcxHooks(rig.datapath, rig.pins)
    wanted: dict[Hook, Attached] = {}
    for pod, index in rig.indexes.items():
        wanted[Hook(pod.device, "ingress")] = Attached(index, "from_pod")
        wanted[Hook(pod.device, "egress")] = Attached(index, "to_pod")
    try:
        assert hooks.upsert(wanted) == {}
        yield Wire(rig)
    finally:
        hooks.delete(list(wanted))


@contextmanager
def two_pods() -> Iterator[dict[Pod, int]]:
    """Make a network namespace for each pod, IPv6 off, so that no packet is sent but the test's own."""
    with ExitStack() as stack:
        namespaces = {}
        for pod in (A, B):
            namespaces[pod] = new_netns()
            stack.callback(os.close, namespaces[pod])
        yield namespaces


def _pair(pod: Pod, netns: int) -> int:
    """Make the pod's veth pair, jumbo frames allowed, its own end in the namespace; return the host end's index."""
    host = ["link", "add", pod.device, "mtu", "9000", "address", HOST_MAC, "type", "veth"]
    ip(*host, "peer", "name", pod.peer, "mtu", "9000", "address", pod.mac, "netns", f"/proc/{os.getpid()}/fd/{netns}")
    ip("link", "set", pod.device, "up")

    def raise_peer() -> None:
        Path(f"/proc/sys/net/ipv6/conf/{pod.peer}/disable_ipv6").write_text("1")
        ip("link", "set", pod.peer, "up")

    in_netns(netns, raise_peer)
    return socket.if_nametoindex(pod.device)


def forwarded(frame: bytes, receiver: Pod) -> bytes:
    """Return an IP packet as the receiver gets it: the router's MACs, and one less TTL with its checksum."""
    after = bytearray(bytes.fromhex((receiver.mac + HOST_MAC).replace(":", "")) + frame[12:])
    if frame[12:14] == b"\x08\x00":
        after[22] -= 1
        after[24:26] = decremented(int.from_bytes(frame[24:26], "big")).to_bytes(2, "big")
    else:
        after[21] -= 1
    return bytes(after)


def decremented(checksum: int) -> int:
    """Return an IPv4 header's checksum after its TTL went down by one (RFC 1624: ones' complement has two zeros)."""
    return (checksum + 0x0100) % 0xFFFF


def internet_checksum(data: bytes | bytearray) -> int:
    """Return the checksum of the data (RFC 1071), whose length is even."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def ethernet(pod: Pod = A, **fields: object) -> Packet:
    """Return the Ethernet header that a pod's packets have: to its gateway, which has the host ends' MAC."""
    return Ether(**{"src": pod.mac, "dst": HOST_MAC, **fields})


def each(packets: Mapping[str, Packet | bytes]) -> pytest.MarkDecorator:
    """Run the test for each packet, under its name."""
    return pytest.mark.parametrize("packet", packets.values(), ids=packets.keys())


def internet(family: int, source: Pod | str = A, destination: Pod | str = B, **fields: object) -> Packet:
    """Return an IP header, by default from pod A to pod B. TTL and hop limit are both called `ttl` here."""
    ends = [end if isinstance(end, str) else end.ipv4 if family == 4 else end.ipv6 for end in (source, destination)]
    if family == 6 and "ttl" in fields:
        fields["hlim"] = fields.pop("ttl")
    return (IP if family == 4 else IPv6)(src=ends[0], dst=ends[1], **fields)


def v4(source: Pod | str = A, destination: Pod | str = B, **fields: object) -> Packet:
    """Return an IPv4 header and all before it: by default from pod A to pod B, with TTL 64."""
    return ethernet() / internet(4, source, destination, **fields)


def v6(source: Pod | str = A, destination: Pod | str = B, **fields: object) -> Packet:
    """Return an IPv6 header and all before it: by default from pod A to pod B, hop limit 64."""
    return ethernet() / internet(6, source, destination, **fields)


def datagram(family: int, source: Pod | str = A, destination: Pod | str = B, **fields: object) -> Packet:
    """Return a whole UDP packet."""
    return ethernet() / internet(family, source, destination, **fields) / UDP() / b"payload"


def discovery(message: Packet, *, source: str = A.link_local, destination: str = "ff02::1") -> Packet:
    """Return a neighbour discovery packet from pod A."""
    return ethernet() / internet(6, source, destination, ttl=255) / message


def arp(**fields: object) -> Packet:
    """Return an ARP message from pod A: by default, "who has the gateway"."""
    return ethernet(dst=BROADCAST) / ARP(**{"hwsrc": A.mac, "psrc": A.ipv4, "pdst": "169.254.1.1", **fields})

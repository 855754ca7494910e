"""What podlane keeps in the kernel, as plain values, and the interface of the tables that hold it there.

Pure: no I/O. `plan` computes a desired `State`, `diff` compares it with the actual one, `loop` brings the kernel to it
through one `Table` per kind of object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Literal, Protocol, Self, TypeVar

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Direction = Literal["ingress", "egress"]
Program = Literal["from_pod", "to_pod", "from_uplink", "to_uplink", "from_tunnel", "to_tunnel"]
Routing = Literal["auto", "direct", "vxlan"]
OtherProtocols = Literal["masquerade", "stack", "drop"]

_U32_MAX = 0xFFFFFFFF
_MAPPED = bytes(10) + b"\xff\xff"  # before an IPv4 address in its IPv6 form (RFC 4291 section 2.5.5.2)
_MAPPED_BITS = 96

K = TypeVar("K")
V = TypeVar("V")


class Prefix(bytes):
    """A network in 17 bytes: its address in 128 bits (IPv4: v4-mapped), and its length in these.

    For what there may be thousands of: it takes a quarter of the memory of a `Network`, and a dict finds it without
    running Python code. Equal to the `Prefix` of an equal network, and sorted by address.
    """

    __slots__ = ()

    @classmethod
    def pack(cls, address: bytes, length: int) -> Self:
        """Return the prefix of an address of 4 or 16 bytes, and a length in bits of that family."""
        if len(address) == 4:
            return cls(_MAPPED + address + bytes((length + _MAPPED_BITS,)))
        return cls(address + bytes((length,)))

    @classmethod
    def of(cls, network: Network) -> Self:
        """Return the prefix of a network, which is not a v4-mapped one."""
        return cls.pack(network.network_address.packed, network.prefixlen)

    @classmethod
    def of_address(cls, address: Address) -> Self:
        """Return the prefix that is a single address."""
        return cls.pack(address.packed, address.max_prefixlen)

    @property
    def length(self) -> int:
        """Its length, in the 128 bits of all addresses."""
        return self[16]

    def covering(self, length: int) -> Prefix:
        """Return the prefix of that length that this one is in."""
        host_bits = 128 - length
        start = int.from_bytes(self[:16], "big") >> host_bits << host_bits
        return Prefix.pack(start.to_bytes(16, "big"), length)

    @property
    def version(self) -> Literal[4, 6]:
        """The IP version."""
        return 4 if self[:12] == _MAPPED and self[16] >= _MAPPED_BITS else 6

    @property
    def network(self) -> Network:
        """The network."""
        if self.version == 4:
            return ip_network((self[12:16], self[16] - _MAPPED_BITS))
        return ip_network((self[:16], self[16]))

    def __str__(self) -> str:
        return str(self.network)

    __repr__ = __str__


class KernelError(Exception):
    """The kernel refused an operation; the message names the operation, the object and the kernel's reason."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A local pod as the datapath knows it: the host end of its veth pair and the MAC address of its own end."""

    ifindex: int
    mac: str
    native: bool = False
    """Never masqueraded."""
    network: int = 0
    """0: the flat network of all pods; others are reached from their own only."""
    shaper: int = 0
    """The index of the device through whose queue it sends, if that is limited."""
    queued: bool = False
    """What it receives has to pass the queue of the host end: podlane's, which limits it, or somebody else's."""
    serves: bool = False
    """It has host ports."""


@dataclass(frozen=True, slots=True)
class HostPort:
    """A port at an address of the node's, or at 0.0.0.0 or ::, any of that family. `protocol` is the IP header's."""

    address: Address
    port: int
    protocol: int

    def __str__(self) -> str:
        name = {6: "tcp", 17: "udp", 132: "sctp"}.get(self.protocol, self.protocol)
        address = f"[{self.address}]" if self.address.version == 6 else self.address
        return f"{address}:{self.port}/{name}"


@dataclass(frozen=True, slots=True)
class PodPort:
    """Where a host port leads."""

    address: Address
    port: int


@dataclass(frozen=True, slots=True)
class Queue:
    """A device's token bucket: bytes per second, and the bytes that may go at once."""

    rate: int
    burst: int

    @property
    def limit(self) -> int:
        """The bytes that may wait: the burst, and what goes within 25 ms (plugins:bandwidth, latencyInMillis)."""
        return self.burst + _latency(self.rate)

    @classmethod
    def of(cls, rate: int, burst: int, packet: int) -> Queue:
        """Return the queue of a limit in bits per second and bits (plugins:bandwidth, CreateIngressQdisc).

        At least one `packet`, in bytes, goes at once, since less would let none pass; and a queue's bytes are 32 bits.
        """
        rate //= 8
        return cls(rate, min(max(burst // 8, packet), _U32_MAX - _latency(rate)))

    @classmethod
    def of_limit(cls, rate: int, limit: int) -> Queue:
        """Return the queue with that limit."""
        return cls(rate, limit - _latency(rate))


@dataclass(frozen=True, slots=True)
class Hook:
    """One place on a device where a program runs; ingress of a pod's host end sees what the pod sends."""

    device: str
    direction: Direction


@dataclass(frozen=True, slots=True)
class Attached:
    """What runs at a hook: the device's index (a recreated device has a new one) and the program's name."""

    ifindex: int
    program: Program | str


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent neighbour entry's key: who is on which device."""

    address: Address
    ifindex: int


@dataclass(frozen=True, slots=True)
class Gateway:
    """An address of the node's towards one pod, on the host end with that index."""

    address: Address
    ifindex: int


@dataclass(frozen=True, slots=True)
class HostRoute:
    """The host's way to a pod: the index of its host end, and the node's address there, if it has one."""

    ifindex: int
    source: Address | None = None


@dataclass(frozen=True, slots=True)
class Sources:
    """Whom masqueraded packets pass for on one uplink, where the kernel cannot say it for each (before Linux 6.7)."""

    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class Uplink:
    """A device that leads out of the node."""

    ifindex: int
    sources: Sources
    networks: frozenset[Network] = frozenset()
    """What is on-link there: the prefixes of its addresses of global scope."""
    gateways: frozenset[Address] = frozenset()
    """The next hops of the host's routes (main table) by it, but those of podlane's own."""


@dataclass(frozen=True, slots=True)
class TunnelDevice:
    """The device that leads to nodes that are not on-link: its UDP port, its MTU in bytes, the node's addresses there.

    With these the node talks through it, and whoever forwards for others under its own address (kube-proxy).
    """

    port: int
    mtu: int
    addresses: frozenset[Address] = frozenset()
    sound: bool = True
    """Whether all else about it is as podlane makes it, and it is up."""


@dataclass(frozen=True, slots=True)
class TunnelEnd:
    """What the datapath must know of that device: addresses and MTU as in `TunnelDevice`, and the network's number."""

    vni: int
    mtu: int
    mac: str
    """Its MAC address, the same on all nodes."""
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None


@dataclass(frozen=True, slots=True)
class PeerRoute:
    """The host's way to another node's pods: the device, and the next hop on it, if it has one."""

    ifindex: int
    gateway: Address | None = None
    source: Address | None = None
    """The node's address there, where it matters."""
    mtu: int = 0
    """In bytes, where it is less than the device's."""


@dataclass(frozen=True, slots=True)
class Lanes:
    """How packets to a prefix are treated."""

    native: bool = False
    """Never masqueraded."""
    stack: bool = False
    """Left to the host stack."""
    peer: Address | None = None
    """The node that has it, by the address at which it is called."""
    node: bool = False
    """It is an address of that node's own, not of its pods."""
    tunnel: int = 0
    """The index of the device that leads there, if that is the tunnel's."""
    mtu: int = 0
    """Of the way through the tunnel in bytes, where it is less than the tunnel's own."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the datapath itself must know of the configuration; names are those of the C's `struct settings`."""

    first_port: int
    last_port: int
    tcp_open: int
    tcp_established: int
    tcp_closed: int
    udp: int
    icmp: int
    other: int
    other_protocols: OtherProtocols | str
    stack_routes: bool
    tunnel_port: int = 0
    """UDP port of all nodes' tunnels; 0: there are none."""
    netns: int = 0
    """The node's network namespace, by the kernel's cookie; 0: the node's own processes reach no host ports."""


@dataclass(frozen=True)
class State:
    """Everything podlane holds in the kernel beside the veth pairs, one mapping per table."""

    tunnel_devices: dict[str, TunnelDevice] = field(default_factory=dict)
    """One, if any, by its name."""
    queues: dict[int, Queue] = field(default_factory=dict)
    """By interface index."""
    endpoints: dict[Address, Endpoint] = field(default_factory=dict)
    settings: dict[int, Settings] = field(default_factory=dict)
    """One entry, 0."""
    prefixes: dict[Prefix, Lanes] = field(default_factory=dict)
    node_addresses: dict[Address, int] = field(default_factory=dict)
    """A set, in effect: the values are 1."""
    host_ports: dict[HostPort, PodPort] = field(default_factory=dict)
    hooks: dict[Hook, Attached] = field(default_factory=dict)
    sockets: dict[str, int] = field(default_factory=dict)
    """By the call that a program sees, the number of the cgroup whose processes make it."""
    uplinks: dict[int, Sources] = field(default_factory=dict)
    """By interface index."""
    tunnels: dict[int, TunnelEnd] = field(default_factory=dict)
    """Likewise."""
    neighbours: dict[Neighbour, str] = field(default_factory=dict)
    gateways: dict[Gateway, int] = field(default_factory=dict)
    """A set, too."""
    routes: dict[Address, HostRoute] = field(default_factory=dict)
    peer_routes: dict[Prefix, PeerRoute] = field(default_factory=dict)
    subnets: dict[Network, Literal["unreachable"]] = field(default_factory=dict)


class Table(Protocol[K, V]):
    """One kind of kernel object, recognised as podlane's own by a rule that survives a restart of the agent."""

    def read(self) -> dict[K, V]:
        """Return all of podlane's own objects of this kind that are in the kernel now. Raises KernelError."""

    def upsert(self, items: Mapping[K, V]) -> dict[K, KernelError]:
        """Create or replace the given objects, each atomically; return the failures by key."""

    def delete(self, keys: Iterable[K]) -> dict[K, KernelError]:
        """Delete the given objects; one that is already gone counts as deleted. Return the failures by key."""


def _latency(rate: int) -> int:
    return min(rate // 40, _U32_MAX // 2)

"""What is said in a duel, between whom, and how: as the model's messages, and as frames."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

from .harness import A, Pod
from .nat_frames import Body, frame
from .nat_words import AH, GRE, ICMP, PORTLESS, SCTP, TCP, UDP, End, Message, Part
from .world import OTHER, WORLD

KINDS = ("tcp", "udp", "echo", "sctp", "gre", "ah")
FAMILIES = (4, 6)
FLAGS = ("S", "SA", "A", "FA", "R", "RA")
PORTS = range(60000, 60006)
"""Of the node's, for masquerading: so few that they run out."""

POD_PORTS = (60000, 60001, 60003, 60005, 1111, 2222, 3333, 4444, 5555)

_DATA = bytes(range(7, 48))
_PROTOCOLS = {"tcp": TCP, "udp": UDP, "sctp": SCTP, "gre": GRE, "ah": AH}


@dataclass(frozen=True, slots=True)
class Talk:
    """Between whom: a pod and one of two remotes. For an echo, the port of the side that asks is its identifier."""

    kind: str
    family: int
    pod: Pod = A
    port: int = PORTS[0]
    remote: int = 0

    @property
    def protocol(self) -> int:
        """The protocol's number."""
        return _PROTOCOLS.get(self.kind, ICMP[self.length])

    @property
    def has_ports(self) -> bool:
        """Whether its packets have any."""
        return self.protocol not in (*PORTLESS, AH)

    @property
    def length(self) -> int:
        """Of an address, in bytes."""
        return 4 if self.family == 4 else 16

    @property
    def pod_end(self) -> End:
        """The pod's side."""
        return self.end(self.pod.ipv4 if self.family == 4 else self.pod.ipv6, self.port)

    @property
    def remote_end(self) -> End:
        """The other side."""
        return self.end((WORLD, OTHER)[self.remote][self.family], 0 if self.kind == "echo" else 443)

    def end(self, address: str, port: int) -> End:
        """Return an end that has this port, if it can have one."""
        return End(packed(address), port if self.has_ports else 0)


@dataclass(frozen=True, slots=True)
class How:
    """What else a packet has."""

    flags: str = "A"
    part: Part = Part.WHOLE
    identification: int = 0
    size: int = 40
    has_checksum: bool = True
    quoted: int = 8


def message_of(talk: Talk, source: End, destination: End, how: How, *, is_reply: bool = False) -> Message:
    """Return a packet of a talk; `is_reply` matters to an echo only."""
    ports = source.port, destination.port
    if talk.kind == "echo":
        identifier = max(ports)
        ports = (0, identifier) if is_reply else (identifier, 0)
    flags = how.flags if talk.kind == "tcp" else ""
    if how.part is Part.LATER:  # which shows none of this
        ports, flags, is_reply = (0, 0), "", False
    return Message(
        talk.protocol,
        source.address,
        ports[0],
        destination.address,
        ports[1],
        syn="S" in flags,
        ack="A" in flags,
        fin="F" in flags,
        rst="R" in flags,
        is_echo_reply=is_reply and talk.kind == "echo",
        part=how.part,
        identification=how.identification,
    )


def error_of(talk: Talk, source: bytes, destination: bytes, about: Message) -> Message:
    """Return an ICMP error."""
    return Message(ICMP[talk.length], source, 0, destination, 0, about=about)


def frame_of(message: Message, how: How, source_mac: str, destination_mac: str, *, ttl: int = 64) -> bytes:
    """Return a packet of a talk as a frame."""
    body = Body(_DATA[: how.size], how.has_checksum, how.quoted)
    return frame(message, body, mac(source_mac), mac(destination_mac), ttl=ttl)


def packed(address: str) -> bytes:
    """Return an address's bytes."""
    return ip_address(address).packed


def mac(address: str) -> bytes:
    """Return a MAC address's bytes."""
    return bytes.fromhex(address.replace(":", ""))

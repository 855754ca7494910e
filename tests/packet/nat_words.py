"""The words in which the model of masquerading speaks of packets and flows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import NamedTuple

TCP, UDP = 6, 17


class Part(Enum):
    """How much of a datagram a packet is."""

    WHOLE = auto()
    FIRST = auto()
    LATER = auto()
    """No ports in it."""


@dataclass(frozen=True, slots=True)
class Message:
    """What of a packet matters to NAT. Addresses are bytes, 4 or 16.

    Of an echo, the identifier is the port of the side that asks; the other side has port 0.
    """

    protocol: int
    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    syn: bool = False
    ack: bool = False
    fin: bool = False
    rst: bool = False
    is_echo_reply: bool = False
    has_ports: bool = True
    part: Part = Part.WHOLE
    identification: int = 0
    about: Message | None = None
    """The packet that an ICMP error quotes; the ports above are then unused."""

    @property
    def is_fragment(self) -> bool:
        """Whether it is not a whole datagram."""
        return self.part is not Part.WHOLE

    @property
    def opens(self) -> bool:
        """Whether it is TCP's first."""
        return self.syn and not self.ack


class Flow(NamedTuple):
    """A flow as one of its packets shows it."""

    source: bytes
    source_port: int
    destination: bytes
    destination_port: int
    protocol: int

    @property
    def reverse(self) -> Flow:
        """The same flow as the other side's packets show it."""
        return Flow(self.destination, self.destination_port, self.source, self.source_port, self.protocol)


class State(Flag):
    """How far a flow has come."""

    NEW = 0
    REPLIED = 1
    FIN_OUT = 2
    FIN_IN = 4
    RESET = 8


CLOSED = State.FIN_OUT | State.FIN_IN


class End(NamedTuple):
    """An address and a port."""

    address: bytes
    port: int


@dataclass(slots=True)
class Mapping:
    """Whom a pod's flow passes for."""

    end: End
    seen: int
    state: State = State.NEW


class Choice(NamedTuple):
    """What a program did where it may choose: its outcome, and the port that it took for the flow; 0: none shows."""

    outcome: str
    port: int


class Fate(NamedTuple):
    """What becomes of a packet. `source` or `destination` is what it is changed to; `fast`: past the host stack."""

    outcome: str
    source: End | None = None
    destination: End | None = None
    fast: bool = False


@dataclass(frozen=True)
class Lifetimes:
    """How long flows live after their last packet, in seconds."""

    tcp_open: int
    tcp_established: int
    tcp_closed: int
    udp: int
    icmp: int

    def of(self, protocol: int, state: State) -> int:
        """Return a flow's."""
        if protocol == TCP and (State.RESET in state or CLOSED in state):
            return self.tcp_closed
        if protocol == TCP:
            return self.tcp_established if State.REPLIED in state else self.tcp_open
        return self.udp if protocol == UDP else self.icmp

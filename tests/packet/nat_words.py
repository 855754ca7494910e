"""The words in which the model of masquerading speaks of packets and flows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import NamedTuple

TCP, UDP, SCTP, GRE, AH = 6, 17, 132, 47, 51
ICMP = {4: 1, 16: 58}
"""By the length of addresses."""

PORTLESS = frozenset({GRE, 50, 4, 41, 115})
"""What encapsulates other packets: beside GRE, ESP, IPIP, IPv6 and L2TP."""

_NAMES = {TCP: "tcp", UDP: "udp", ICMP[4]: "icmp", ICMP[16]: "icmp"}


def family_of(protocol: int) -> str:
    """Return under which name packets of a protocol are counted."""
    return _NAMES.get(protocol, "other")


def is_known(protocol: int) -> bool:
    """Say whether flows of that protocol can be masqueraded."""
    return protocol in _NAMES or keeps_port(protocol)


def is_other(protocol: int) -> bool:
    """Say whether the configuration has a rule for that protocol."""
    return protocol not in _NAMES


def keeps_port(protocol: int) -> bool:
    """Say whether a flow of that protocol has the pod's port where it can, in the range or not."""
    return protocol == SCTP or protocol in PORTLESS


class Rule(Enum):
    """What becomes of protocols other than TCP, UDP and ICMP; the names are those of the C, without OTHER_."""

    DROP = auto()
    MASQUERADE = auto()
    STACK = auto()


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


class Part(Enum):
    """How much of a datagram a packet is."""

    WHOLE = auto()
    FIRST = auto()
    LATER = auto()
    """No ports in it."""


@dataclass(frozen=True, slots=True)
class Message:
    """What of a packet matters to NAT. Addresses are bytes, 4 or 16.

    Of an echo, the identifier is the port of the side that asks; the other side has port 0. What has no ports has 0.
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
    part: Part = Part.WHOLE
    identification: int = 0
    summed: tuple[int, int] | None = None
    """The ports of which a first fragment's CRC is, if not those above."""
    about: Message | None = None
    """The packet that an ICMP error quotes; the ports above are then unused."""

    @property
    def flow(self) -> Flow:
        """The flow that it shows."""
        return Flow(self.source, self.source_port, self.destination, self.destination_port, self.protocol)

    @property
    def datagram(self) -> tuple[bytes, bytes, int, int]:
        """What all fragments of a datagram have in common."""
        return self.source, self.destination, self.identification, self.protocol

    @property
    def is_fragment(self) -> bool:
        """Whether it is not a whole datagram."""
        return self.part is not Part.WHOLE

    @property
    def hides_ports(self) -> bool:
        """Whether its flow has ports, but not in this fragment."""
        return self.part is Part.LATER and self.protocol not in PORTLESS

    @property
    def opens(self) -> bool:
        """Whether it is TCP's first."""
        return self.protocol == TCP and self.syn and not self.ack

    @property
    def carries_on(self) -> bool:
        """Whether it neither begins a flow nor refuses one."""
        return not self.opens and not self.rst and not self.about


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


def answer_to(flow: Flow, end: End) -> Flow:
    """Return the flow of the answers to a flow that passes for that end's."""
    return flow.reverse._replace(destination=end.address, destination_port=end.port)


def question_of(answer: Flow, owner: End) -> Flow:
    """Return the flow that was answered, of the end that owns the answer."""
    return answer.reverse._replace(source=owner.address, source_port=owner.port)


@dataclass(slots=True)
class Mapping:
    """Whom a pod's flow passes for."""

    end: End
    seen: int
    state: State = State.NEW


@dataclass(slots=True)
class Note:
    """What an outsider has sent to a pod's own address."""

    seen: int
    answered: bool = False


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
    other: int

    def of(self, protocol: int, state: State) -> int:
        """Return a flow's."""
        if protocol == TCP and (State.RESET in state or CLOSED in state):
            return self.tcp_closed
        if protocol == TCP:
            return self.tcp_established if State.REPLIED in state else self.tcp_open
        if protocol == UDP:
            return self.udp
        return self.icmp if protocol in ICMP.values() else self.other

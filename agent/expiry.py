"""When a masqueraded flow is over, and how often to look. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from agent.state import Settings

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58  # of the IP header

PROTOCOLS = {TCP: "tcp", UDP: "udp", ICMP: "icmp", ICMPV6: "icmpv6"}
"""What can be masqueraded, by protocol number."""

_NANOSECONDS = 1_000_000_000
_STATES = 256  # a flow's state is one byte

# Seconds between scans: unhurried (half of the shortest time-outs), and the least.
_CALM, _HURRIED = 30.0, 1.0
_CALM_PRESSURE = 0.5
_CPU_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class FlowStates:
    """The bits of a flow's state, as the C has them (FLOW_*)."""

    replied: int
    fin_out: int
    fin_in: int
    reset: int


def lifetime(protocol: int, state: int, settings: Settings, bits: FlowStates) -> int:
    """Return how many seconds a flow lives after its last packet."""
    if protocol == UDP:
        return settings.udp
    if protocol != TCP:
        return settings.icmp
    both_fins = bits.fin_out | bits.fin_in
    if state & bits.reset or state & both_fins == both_fins:
        return settings.tcp_closed
    return settings.tcp_established if state & bits.replied else settings.tcp_open


def lifetimes(settings: Settings, bits: FlowStates) -> Mapping[int, tuple[int, ...]]:
    """Return all lifetimes in nanoseconds: by protocol, then by state."""
    return {
        protocol: tuple(lifetime(protocol, state, settings, bits) * _NANOSECONDS for state in range(_STATES))
        for protocol in PROTOCOLS
    }


def pauses(pressure: float, cpu_seconds: float) -> tuple[float, float]:
    """Return how many seconds to wait until the next scan: at least, and at most, while nothing fails.

    `pressure` (0 to 1) is how full the fullest thing is: a map, or the ports to one destination. `cpu_seconds` is what
    the last scan cost: scanning never takes more than a tenth of a core.
    """
    least = max(_HURRIED, cpu_seconds / _CPU_SHARE)
    relief = min((1 - pressure) / (1 - _CALM_PRESSURE), 1)
    return least, max(least, _CALM * relief)

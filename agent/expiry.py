"""When a masqueraded flow is over, and how often to look. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agent.state import Settings

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58  # of the IP header
SCTP, GRE, ESP, IPIP, IPV6_IN_IP, L2TP = 132, 47, 50, 4, 41, 115

PROTOCOLS = {
    TCP: "tcp",
    UDP: "udp",
    ICMP: "icmp",
    ICMPV6: "icmpv6",
    SCTP: "sctp",
    GRE: "gre",
    ESP: "esp",
    IPIP: "ipip",
    IPV6_IN_IP: "ipv6",
    L2TP: "l2tp",
}
"""What can be masqueraded (bpf/transport.h): names as in /etc/protocols, by protocol number."""

_NANOSECONDS = 1_000_000_000
_BYTE = 256  # so many values have protocols, and states of a flow

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
    if protocol in (ICMP, ICMPV6):
        return settings.icmp
    if protocol != TCP:
        return settings.other
    both_fins = bits.fin_out | bits.fin_in
    if state & bits.reset or state & both_fins == both_fins:
        return settings.tcp_closed
    return settings.tcp_established if state & bits.replied else settings.tcp_open


def lifetimes(settings: Settings, bits: FlowStates) -> Sequence[Sequence[int]]:
    """Return all lifetimes in nanoseconds: by protocol, of whatever number, then by state."""
    rows = {
        protocol: [lifetime(protocol, state, settings, bits) * _NANOSECONDS for state in range(_BYTE)]
        for protocol in (TCP, UDP, ICMP, ICMPV6)
    }
    others = [settings.other * _NANOSECONDS] * _BYTE
    return [rows.get(protocol, others) for protocol in range(_BYTE)]


def pauses(pressure: float, cpu_seconds: float) -> tuple[float, float]:
    """Return how many seconds to wait until the next scan: at least, and at most, while nothing fails.

    `pressure` (0 to 1) is how full the fullest thing is: a map, or the ports to one destination. `cpu_seconds` is what
    the last scan cost: scanning never takes more than a tenth of a core.
    """
    least = max(_HURRIED, cpu_seconds / _CPU_SHARE)
    relief = min((1 - pressure) / (1 - _CALM_PRESSURE), 1)
    return least, max(least, _CALM * relief)

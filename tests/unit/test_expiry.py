"""When a flow is over, and how often to look."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.expiry import ICMP, ICMPV6, TCP, UDP, FlowStates, lifetime, lifetimes, pauses
from agent.state import Settings

BITS = FlowStates(replied=1, fin_out=2, fin_in=4, reset=8)
SETTINGS = Settings(
    first_port=1,
    last_port=2,
    tcp_open=10,
    tcp_established=20,
    tcp_closed=30,
    udp=40,
    icmp=50,
    other=60,
    other_protocols="masquerade",
    stack_routes=False,
)


@pytest.mark.parametrize(
    ("state", "seconds"),
    [
        (0, 10),
        (BITS.fin_out, 10),  # half closed, never answered
        (BITS.replied, 20),
        (BITS.replied | BITS.fin_out, 20),  # half closed connections may live long (RFC 9293 section 3.6)
        (BITS.replied | BITS.fin_in, 20),
        (BITS.replied | BITS.fin_out | BITS.fin_in, 30),
        (BITS.fin_out | BITS.fin_in, 30),
        (BITS.reset, 30),
        (BITS.replied | BITS.reset, 30),
    ],
)
def test_tcp_follows_the_connection(state: int, seconds: int) -> None:
    """A connection that nobody answered, an open one and a closed one have different lifetimes."""
    assert lifetime(TCP, state, SETTINGS, BITS) == seconds


@given(st.integers(0, 255))
def test_udp_and_icmp_have_one_lifetime(state: int) -> None:
    """UDP and ICMP know no states."""
    assert [lifetime(protocol, state, SETTINGS, BITS) for protocol in (UDP, ICMP, ICMPV6)] == [40, 50, 50]


@given(st.integers(0, 255).filter(lambda protocol: protocol not in (TCP, UDP, ICMP, ICMPV6)), st.integers(0, 255))
def test_all_other_protocols_have_one_lifetime(protocol: int, state: int) -> None:
    """Whatever number a protocol has, there is a lifetime for its flows."""
    assert lifetime(protocol, state, SETTINGS, BITS) == 60


@given(st.integers(0, 255), st.integers(0, 255))
def test_lifetimes_are_in_nanoseconds(protocol: int, state: int) -> None:
    """The table for every protocol and state says the same as the function, in nanoseconds."""
    assert lifetimes(SETTINGS, BITS)[protocol][state] == lifetime(protocol, state, SETTINGS, BITS) * 10**9


@given(st.floats(0, 1), st.floats(0, 100))
def test_pauses(pressure: float, cpu: float) -> None:
    """A scan costs at most a tenth of a core, and the pause is half a minute, less as things fill up."""
    least, most = pauses(pressure, cpu)
    assert least >= max(1, cpu * 9.99)
    assert least <= most <= max(30, least)
    if pressure <= 0.5:
        assert most >= 30
    if pressure == 1:
        assert most == least


def test_pauses_shrink() -> None:
    """The fuller, the sooner."""
    mosts = [pauses(pressure / 100, 0.01)[1] for pressure in range(101)]
    assert mosts == sorted(mosts, reverse=True)

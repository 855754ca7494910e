"""The self-test's packet, taken apart by scapy, and the verdict on what comes back. The node tests run the whole."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP
from scapy.layers.l2 import Ether

from agent import selftest
from agent.wiring import GATEWAYS, HOST_MAC, pod_mac


def test_frame() -> None:
    """The frame goes from the scratch pod to its gateway's MAC and its own address, and its checksum is right."""
    packet = Ether(selftest._frame())
    assert (packet.dst, packet.src) == (HOST_MAC, pod_mac(selftest._ATTACHMENT))
    assert (packet[IP].src, packet[IP].dst) == (str(selftest._ADDRESS), str(selftest._ADDRESS))
    assert (packet[IP].ttl, packet[IP].proto, packet[IP].len) == (64, 253, len(packet) - 14)
    assert bytes(packet[IP].payload) == selftest._PAYLOAD
    given = packet[IP].chksum
    del packet[IP].chksum
    assert Ether(bytes(packet))[IP].chksum == given


def test_the_address_is_of_no_range() -> None:
    """The scratch pod takes no address that a pod could have: its own is link-local, and not the gateway's."""
    assert selftest._ADDRESS.is_link_local
    assert GATEWAYS[4] != selftest._ADDRESS


@pytest.mark.parametrize(("ttl", "good"), [(63, True), (64, False), (62, False), (0, False)])
def test_verdict(ttl: int, good: bool) -> None:
    """The packet must come back with its TTL reduced by exactly one: it has passed the datapath, and nothing else."""
    packet = Ether(selftest._frame())
    packet[IP].ttl = ttl
    if good:
        selftest._judge(bytes(packet))
        return
    with pytest.raises(selftest.SelfTestFailed, match=f"came back with TTL {ttl}, not 63"):
        selftest._judge(bytes(packet))

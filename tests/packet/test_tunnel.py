"""The tunnel, packet by packet: what goes into it, whom it is for, and whose word is taken for what comes out."""

from __future__ import annotations

from itertools import product

import pytest
from scapy.all import ARP, UDP, Ether, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, Packet

from agent.wiring import HOST_MAC

from .cases import WITH_PORTS
from .harness import DROP, PASS, REDIRECT, A
from .test_host_ports import CLIENT, HOST, OWN, error, publish
from .tunnel import MTU, PEERS, VNI, Tunnel, pod_of
from .world import (
    FAMILIES,
    NATIVE,
    NODE,
    NODE_OWN,
    STACK,
    WORLD,
    address_of,
    answer,
    arriving,
    built,
    delivered,
    frame,
    from_pod,
    leaving,
    request,
)

pytestmark = pytest.mark.root

EACH = pytest.mark.parametrize(("family", "underlay"), list(product(FAMILIES, FAMILIES)))
"""Of the packets inside, and of the addresses that nodes call each other by."""
BY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
HEADERS = {4: 20 + 8, 6: 40 + 8}
FAR, OTHER = 2, 3
NOBODY_ELSE = "02:70:6c:61:6e:64"
"""A source that no device has: the kernel drops what seems to be from its own."""


def sized(family: int, size: int) -> bytes:
    """Return what makes a UDP packet so large, in bytes with the IP header."""
    return bytes(size - HEADERS[family])


@EACH
def test_pod_to_far_pod(tunnel: Tunnel, family: int, underlay: int) -> None:
    """What a pod sends to one on a far node goes into the tunnel as it is, with one hop less."""
    tunnel.peers(underlay)
    ran = tunnel.node.leave(from_pod(family, A, pod_of(FAR, family), ttl=9) / request("udp", family, 5000))
    assert (ran.outcome, ran.verdict) == ("fwd_tunnel", REDIRECT)
    assert ran.packet == built(from_pod(family, A, pod_of(FAR, family), ttl=8) / request("udp", family, 5000))


@BY_FAMILY
def test_pod_to_far_node(tunnel: Tunnel, family: int) -> None:
    """So does what it sends to the far node itself: the answer comes that way, too."""
    tunnel.peers(family)
    assert tunnel.node.leave(from_pod(family, A, str(PEERS[family][0])) / UDP()).outcome == "fwd_tunnel"


@BY_FAMILY
def test_size(tunnel: Tunnel, family: int) -> None:
    """What is larger than the tunnel takes is the stack's, which tells the pod; of a GSO packet, a segment counts."""
    tunnel.peers(4)
    packet = from_pod(family, A, pod_of(FAR, family)) / UDP()
    assert tunnel.node.leave(packet / sized(family, MTU)).outcome == "fwd_tunnel"
    assert tunnel.node.leave(packet / sized(family, MTU + 1)).outcome == "punt_too_big"
    assert tunnel.node.leave(packet / sized(family, 3000), gso_size=1400).outcome == "fwd_tunnel"
    assert tunnel.node.leave(packet / sized(family, 3000), gso_size=1430).outcome == "punt_too_big"


@BY_FAMILY
def test_size_of_one_way(tunnel: Tunnel, family: int) -> None:
    """Where the way to one node takes less than others, that counts."""
    tunnel.peers(4, mtu=1300)
    packet = from_pod(family, A, pod_of(FAR, family)) / UDP()
    assert tunnel.node.leave(packet / sized(family, 1300)).outcome == "fwd_tunnel"
    assert tunnel.node.leave(packet / sized(family, 1301)).outcome == "punt_too_big"


@BY_FAMILY
def test_stack_first(tunnel: Tunnel, family: int) -> None:
    """A spent TTL, a service's address among those of pods, and a tunnel that is not there yet are the stack's."""
    tunnel.peers(4)
    far = from_pod(family, A, pod_of(FAR, family), ttl=1)
    assert tunnel.node.leave(far / UDP()).outcome == "punt_ttl"
    tunnel.node.prefix(f"{pod_of(FAR, family)}/{32 if family == 4 else 128}", STACK)
    assert tunnel.node.leave(from_pod(family, A, pod_of(FAR, family)) / UDP()).outcome == "punt_host"
    for key, _ in tunnel.node.datapath.maps["tunnels"].items():
        tunnel.node.datapath.maps["tunnels"].delete(key)
    assert tunnel.node.leave(from_pod(family, A, pod_of(OTHER, family)) / UDP()).outcome == "punt_host"


@EACH
def test_wrapped(tunnel: Tunnel, family: int, underlay: int) -> None:
    """What goes into the tunnel is for the MAC address of the far device, and changed in nothing else."""
    tunnel.peers(underlay)
    for source in (A.ipv4 if family == 4 else A.ipv6, NODE[family]):
        ran = tunnel.out(leaving(family, source, pod_of(FAR, family)) / request("tcp", family, 5000))
        assert (ran.outcome, ran.verdict, ran.mark) == ("fwd_to_peer", PASS, 0)
        expected = frame(NOBODY_ELSE, HOST_MAC, family, source, pod_of(FAR, family)) / request("tcp", family, 5000)
        assert ran.packet == built(expected)


@pytest.mark.parametrize(
    ("destination", "outcome"),
    [
        (WORLD[4], "drop_no_peer"),
        (NODE[4], "drop_no_peer"),
        ("224.0.0.251", "punt_multicast"),
        ("255.255.255.255", "punt_multicast"),
    ],
)
def test_nobody_has_it(tunnel: Tunnel, destination: str, outcome: str) -> None:
    """What no node has is dropped; what is for all is left to the device, which knows nobody either."""
    tunnel.peers(4)
    assert tunnel.out(leaving(4, NODE[4], destination) / UDP()).outcome == outcome


def test_only_ip(tunnel: Tunnel) -> None:
    """So is all but IP, in both directions: nobody asks for MAC addresses there."""
    tunnel.peers(4)
    question = Ether(src=HOST_MAC, dst=HOST_MAC) / ARP(psrc=pod_of(FAR, 4), pdst=A.ipv4)
    assert tunnel.out(question).outcome == "drop_no_peer"
    assert tunnel.into(question, PEERS[4][0]).outcome == "drop_forged_peer"


@EACH
def test_far_pod_to_pod(tunnel: Tunnel, family: int, underlay: int) -> None:
    """What a far node sends for its pod is handed to the local one, with one hop less."""
    tunnel.peers(underlay)
    packet = arriving(family, address_of(A, family), pod_of(FAR, family)) / request("udp", family, 5000)
    ran = tunnel.into(packet, PEERS[underlay][0])
    assert (ran.outcome, ran.verdict) == ("fwd_from_peer", REDIRECT)
    assert ran.packet == built(delivered(family, A, pod_of(FAR, family)) / request("udp", family, 5000))


@BY_FAMILY
def test_far_node_to_pod(tunnel: Tunnel, family: int) -> None:
    """So is what it sends itself."""
    tunnel.peers(family)
    sender = PEERS[family][0]
    assert tunnel.into(arriving(family, address_of(A, family), str(sender)) / UDP(), sender).outcome == "fwd_from_peer"


@EACH
def test_forged(tunnel: Tunnel, family: int, underlay: int) -> None:
    """Nobody passes for a pod of another node, for that node, for the world, for a local pod or for this node."""
    tunnel.peers(underlay)
    far, other = PEERS[underlay]
    sources = [pod_of(OTHER, family), WORLD[family], address_of(A, family), NODE[family]]
    sources += [str(other)] if family == underlay else []
    for source in sources:
        ran = tunnel.into(arriving(family, address_of(A, family), source) / UDP(), far)
        assert (ran.outcome, ran.verdict) == ("drop_forged_peer", DROP), source


@EACH
def test_stranger(tunnel: Tunnel, family: int, underlay: int) -> None:
    """Who is no node is not believed, nor a node with another network's number, nor what nobody has wrapped."""
    tunnel.peers(underlay)
    honest = arriving(family, address_of(A, family), pod_of(FAR, family)) / UDP()
    assert tunnel.into(honest, WORLD[underlay]).outcome == "drop_forged_peer"
    assert tunnel.into(honest, NODE[underlay]).outcome == "drop_forged_peer"
    assert tunnel.into(honest, PEERS[underlay][0], vni=VNI + 1).outcome == "drop_forged_peer"
    assert tunnel.unwrapped_by_nobody(honest).outcome == "drop_forged_peer"
    assert tunnel.into(honest, PEERS[underlay][0]).outcome == "fwd_from_peer"


@EACH
def test_node_that_is_not_called(tunnel: Tunnel, family: int, underlay: int) -> None:
    """A node that has no address by which it could be called sends nothing, in nobody's name."""
    tunnel.peers(underlay)
    silent = str(PEERS[underlay][1])
    tunnel.node.prefix(f"{silent}/{32 if underlay == 4 else 128}", NODE_OWN)
    tunnel.node.prefix(f"{address_of(A, family)}/{32 if family == 4 else 128}", NATIVE)
    packet = arriving(family, address_of(A, family), address_of(A, family)) / UDP()
    assert tunnel.into(packet, silent).outcome == "drop_forged_peer"


@EACH
def test_pods_wrap_nothing(tunnel: Tunnel, family: int, underlay: int) -> None:
    """What a pod of a node has wrapped under its own address is not the node's word."""
    tunnel.peers(underlay)
    packet = arriving(family, address_of(A, family), pod_of(FAR, family)) / UDP()
    assert tunnel.into(packet, pod_of(FAR, underlay)).outcome == "drop_forged_peer"


@BY_FAMILY
def test_pods_do_not_pass_for_the_tunnel(tunnel: Tunnel, family: int) -> None:
    """Nor does it get out under the node's address, to whatever address some other node may have."""
    tunnel.node.configure(tunnel_port=4789)
    packet = leaving(family, address_of(A, family), WORLD[family])
    assert tunnel.node.out(packet / request("udp", family, 5000, to_port=4789)).outcome == "drop_forged_peer"
    assert tunnel.node.out(packet / request("udp", family, 5000, to_port=4790)).outcome == "masq_out"
    assert tunnel.node.out(packet / request("tcp", family, 5000, to_port=4789)).outcome == "masq_out"


@BY_FAMILY
def test_the_node_forwards_nothing_for_the_tunnel(tunnel: Tunnel, family: int) -> None:
    """Nor do services get it out under the node's address, for whomever; what the node sends itself goes."""
    tunnel.node.configure(tunnel_port=4789)
    packet = leaving(family, NODE[family], WORLD[family])
    wrapped = packet / request("udp", family, 5000, to_port=4789)
    for came_by in (tunnel.node.indexes[A], tunnel.node.uplink):
        assert tunnel.node.out(wrapped, fast=False, came_by=came_by).outcome == "drop_forged_peer"
        for other in (request("udp", family, 5000, to_port=4790), request("tcp", family, 5000, to_port=4789)):
            assert tunnel.node.out(packet / other, fast=False, came_by=came_by).outcome == "fwd_host_out"
    assert tunnel.node.out(wrapped, fast=False).outcome == "fwd_host_out"
    tunnel.node.configure(tunnel_port=0)
    assert tunnel.node.out(wrapped, fast=False, came_by=tunnel.node.uplink).outcome == "fwd_host_out"


def test_extension_headers_hide_nothing_for_the_tunnel(tunnel: Tunnel) -> None:
    """Nor behind IPv6 extension headers; a later fragment, which nothing can be made of, goes."""
    tunnel.node.configure(tunnel_port=4789)
    packet, wrapped = leaving(6, NODE[6], WORLD[6]), request("udp", 6, 5000, to_port=4789)
    for hidden, outcome in (
        (IPv6ExtHdrDestOpt() / wrapped, "drop_forged_peer"),
        (IPv6ExtHdrFragment(m=1) / wrapped, "drop_forged_peer"),
        (IPv6ExtHdrFragment(m=1, nh=60) / IPv6ExtHdrDestOpt() / wrapped, "drop_forged_peer"),
        (IPv6ExtHdrFragment(offset=9, nh=17) / wrapped, "fwd_host_out"),
    ):
        assert tunnel.node.out(packet / hidden, fast=False, came_by=tunnel.node.uplink).outcome == outcome
        assert tunnel.node.out(packet / hidden, fast=False).outcome == "fwd_host_out"


@BY_FAMILY
def test_answers_of_the_stack(tunnel: Tunnel, family: int) -> None:
    """What the stack has sent into the tunnel for a pod, as to a service, is answered by the stack; others are not."""
    tunnel.peers(4)
    source = address_of(A, family)
    tunnel.out(leaving(family, source, pod_of(FAR, family)) / request("udp", family, 5000), fast=False)
    tunnel.out(leaving(family, source, pod_of(FAR, family)) / request("udp", family, 5001), fast=True)
    for port, verdict in ((5000, PASS), (5001, REDIRECT)):
        reply = arriving(family, source, pod_of(FAR, family)) / answer("udp", family, port)
        ran = tunnel.into(reply, PEERS[4][0])
        assert (ran.outcome, ran.verdict) == ("fwd_from_peer", verdict)


@BY_FAMILY
def test_by_the_uplink(tunnel: Tunnel, family: int) -> None:
    """What the stack sends out of an uplink for a pod, to a far node, takes the tunnel after all, not masqueraded."""
    tunnel.peers(family)
    packet = leaving(family, address_of(A, family), str(PEERS[family][0])) / request("udp", family, 5000)
    ran = tunnel.node.out(packet, fast=False)
    assert (ran.outcome, ran.verdict) == ("fwd_tunnel", REDIRECT)
    assert ran.packet == built(packet)


def tunnelled(family: int, source: str) -> Packet:
    """Return the headers of what a node of the tunnel is sent for the far node's pod."""
    return frame(NOBODY_ELSE, HOST_MAC, family, source, pod_of(FAR, family))


@WITH_PORTS
def test_host_port(tunnel: Tunnel, kind: str, family: int) -> None:
    """A far pod reaches the node's port by the tunnel and hears from there; the pod's own address is another way."""
    tunnel.peers(4)
    publish(tunnel.node, kind, family)
    caller, pod = pod_of(FAR, family), address_of(A, family)
    calls = arriving(family, NODE[family], caller) / request(kind, family, CLIENT, to_port=HOST)
    answers = leaving(family, pod, caller) / answer(kind, family, CLIENT, to_port=OWN)
    came = tunnel.into(calls, PEERS[4][0])
    assert (came.outcome, came.verdict) == ("port_in", REDIRECT)
    assert came.packet == built(delivered(family, A, caller) / request(kind, family, CLIENT, to_port=OWN))
    for fast in (True, False):
        replied = tunnel.out(answers, fast=fast)
        assert (replied.outcome, replied.verdict) == ("port_out", PASS)
        assert replied.packet == built(tunnelled(family, NODE[family]) / answer(kind, family, CLIENT, to_port=HOST))
    tunnel.node.forget_stack_flows()
    direct = arriving(family, pod, caller) / request(kind, family, CLIENT, to_port=OWN)
    assert tunnel.into(direct, PEERS[4][0]).outcome == "fwd_from_peer"
    assert tunnel.out(answers).outcome == "fwd_to_peer"


@WITH_PORTS
def test_host_port_of_a_far_node(tunnel: Tunnel, kind: str, family: int) -> None:
    """A far node itself calls past the tunnel, and is answered past it; all else that the pod sends there takes it."""
    tunnel.peers(family)
    publish(tunnel.node, kind, family)
    caller, pod = str(PEERS[family][0]), address_of(A, family)
    calls = arriving(family, NODE[family], caller) / request(kind, family, CLIENT, to_port=HOST)
    assert tunnel.node.into(calls).outcome == "port_in"
    back = answer(kind, family, CLIENT, to_port=OWN)
    assert tunnel.node.leave(from_pod(family, A, caller) / back).outcome == "fwd_uplink"
    replied = tunnel.node.out(leaving(family, pod, caller) / back)
    assert replied.outcome == "port_out"
    assert replied.packet == built(leaving(family, NODE[family], caller) / answer(kind, family, CLIENT, to_port=HOST))
    other = answer(kind, family, CLIENT + 1, to_port=OWN)
    assert tunnel.node.leave(from_pod(family, A, caller) / other).outcome == "fwd_tunnel"


@WITH_PORTS
def test_errors_about_a_host_port(tunnel: Tunnel, kind: str, family: int) -> None:
    """A far pod's error about an answer from the node's port is about the pod's; the pod's own comes from the node."""
    tunnel.peers(4)
    publish(tunnel.node, kind, family)
    caller, pod = pod_of(FAR, family), address_of(A, family)
    asked = request(kind, family, CLIENT, to_port=HOST)
    tunnel.into(arriving(family, NODE[family], caller) / asked, PEERS[4][0])
    about = leaving(family, NODE[family], caller) / answer(kind, family, CLIENT, to_port=HOST)
    came = tunnel.into(arriving(family, NODE[family], caller) / error(family, about), PEERS[4][0])
    inside = leaving(family, pod, caller) / answer(kind, family, CLIENT, to_port=OWN)
    assert came.outcome == "port_in"
    assert came.packet == built(delivered(family, A, caller) / error(family, inside))
    heard = leaving(family, caller, pod) / request(kind, family, CLIENT, to_port=OWN)
    sent = tunnel.out(leaving(family, pod, caller) / error(family, heard))
    outside = leaving(family, caller, NODE[family]) / asked
    assert sent.outcome == "port_out"
    assert sent.packet == built(tunnelled(family, NODE[family]) / error(family, outside))

"""VXLAN that nobody of the cluster sent, or not the one who may: it is dropped and counted, wherever it comes from."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet import UDP as UDPHeader
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet

from tests.node.cluster import PORT
from tests.node.cluster import address as service_address
from tests.node.echo import UDP, bound, server, who
from tests.node.frames import COUNT, FENCE, PAYLOAD, Ears, packet
from tests.node.kubeproxy import Service, delete_rules, write_rules
from tests.node.machine import Netns
from tests.node.mesh import Mesh, mesh
from tests.node.nodes import BOTH, FAR, FIRST, V4, WORLD, nodes

TUNNEL = {"port": 14789, "vni": 77}
NODE_PORT = 30000
SPARE = ("192.0.2.200", "2001:db8::200")
"""Addresses that the first node has, and nobody was told of."""
UNKNOWN = "n3 by an address that nobody knows"
UNKNOWN_ADDRESSES = ("203.0.113.200", "2001:db8:3::200")
families = pytest.mark.parametrize("family", BOTH)


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Yield a cluster in which every packet between nodes takes the tunnel, by a port and a number of its own."""
    with nodes(tmp_path_factory.mktemp("tunnel"), routing="vxlan", tunnel=TUNNEL) as made:
        for address, bits in zip(SPARE, ("32", "128"), strict=True):
            made.members[FIRST].netns.run("ip", "address", "add", f"{address}/{bits}", "dev", "lo")
        for family, address in enumerate(SPARE):
            made.router.run("ip", "route", "add", address, "via", made.members[FIRST].addresses[family])
        with mesh(made) as it:
            yield it


def wrapped(it: Mesh, inside: Packet, vni: int = TUNNEL["vni"]) -> Packet:
    """Return a UDP datagram of the tunnel, with a packet to the device that the first node has."""
    shown = it.hosts[FIRST].netns.run("ip", "-json", "link", "show", "podlane.vx").stdout
    mac = json.loads(shown)[0]["address"]
    frame = Ether(src="02:00:00:00:99:99", dst=mac) / inside
    return UDPHeader(sport=40000, dport=TUNNEL["port"]) / VXLAN(flags=8, vni=vni) / frame


def forge(sender: Netns, source: str, destination: str, datagram: Packet) -> None:
    """Send a datagram some times, in anybody's name."""
    whole = bytes((IPv6 if ":" in source else IP)(src=source, dst=destination) / datagram)

    def send() -> None:
        kind = socket.AF_INET6 if ":" in source else socket.AF_INET
        with socket.socket(kind, socket.SOCK_RAW, socket.IPPROTO_RAW) as wire:
            for _ in range(COUNT):
                wire.sendto(whole, (destination, 0))

    sender.call(send)


def arrives(it: Mesh, send: Callable[[Packet], None], inside: Packet) -> bool:
    """Say whether a packet, sent in some wrapping, gets to the first node's pod; if not, some node has counted it."""
    pod, far, host = it.pods[FIRST], it.pods[FAR], it.hosts[FAR]
    before = forged(it)
    with Ears(pod.netns) as ears:
        send(inside)
        fence = wrapped(it, packet(far.addresses[V4], pod.addresses[V4], FENCE))
        forge(it.nodes.router, host.addresses[V4], it.hosts[FIRST].addresses[V4], fence)
        heard = [frame for frame in ears.until(lambda frame: FENCE in frame) if PAYLOAD in frame]
    dropped = forged(it) - before
    assert (len(heard), dropped) in ((COUNT, 0), (0, COUNT))
    return bool(heard)


def forged(it: Mesh) -> int:
    """Return how many packets all nodes have dropped as forged."""
    return sum(member.packets()["drop_forged_peer"] for member in it.nodes.members)


OWNERS = [("n3", "pod on n3"), ("n3", "n3"), ("n2", "pod on n2")]
"""Who may send what: the node, and in whose name."""
FORGERS = [
    ("world", "pod on n3"),
    ("world", "n3"),
    ("world", "world"),
    ("n2", "pod on n3"),
    ("n2", "n3"),
    ("n3", "pod on n1"),
    ("n3", "n1"),
    ("n3", "world"),
    ("pod on n3", "pod on n3"),
    (UNKNOWN, "n3"),
    (UNKNOWN, "pod on n3"),
]
"""Who may not."""


def name(pair: tuple[str, str]) -> str:
    """Return the name of such a case."""
    return " as ".join(pair)


def address(it: Mesh, name: str, family: int) -> str:
    """Return the address of somebody."""
    if name == UNKNOWN:
        return UNKNOWN_ADDRESSES[family]
    (party,) = (each for each in (*it.pods, *it.hosts, it.world) if each.name == name)
    return party.addresses[family]


@families
@pytest.mark.parametrize("pair", [*OWNERS, *FORGERS], ids=name)
def test_sender(it: Mesh, pair: tuple[str, str], family: int) -> None:
    """Out of the tunnel comes only what the node sent that has the source, as its own address or a pod's."""
    outside, inside = (address(it, name, family) for name in pair)
    pod, node = it.pods[FIRST].addresses[family], it.hosts[FIRST].addresses[family]

    def send(inner: Packet) -> None:
        forge(it.nodes.router, outside, node, wrapped(it, inner))

    assert arrives(it, send, packet(inside, pod)) == (pair in OWNERS)


@families
def test_other_network(it: Mesh, family: int) -> None:
    """A packet of another network's number is none of ours, whoever sent it."""
    pod, node = it.pods[FIRST].addresses[family], it.hosts[FIRST].addresses[family]

    def send(inner: Packet) -> None:
        forge(it.nodes.router, it.hosts[FAR].addresses[family], node, wrapped(it, inner, vni=78))

    assert not arrives(it, send, packet(it.pods[FAR].addresses[family], pod))


def test_what_is_no_ip(it: Mesh) -> None:
    """Nothing but IP is in the tunnel: ARP and mapped addresses are forged by whoever sends them."""
    far, pod = it.pods[FAR].addresses, it.pods[FIRST].addresses
    mapped = packet(f"::ffff:{far[V4]}", f"::ffff:{pod[V4]}")
    for inside in (ARP(psrc=far[V4], pdst=pod[V4]) / PAYLOAD, mapped):
        assert not arrives(
            it,
            lambda inner: forge(
                it.nodes.router, it.hosts[FAR].addresses[V4], it.hosts[FIRST].addresses[V4], wrapped(it, inner)
            ),
            inside,
        )


@families
@pytest.mark.parametrize("spare", [False, True], ids=["at the node's address", "at one that nobody knows"])
@pytest.mark.parametrize("victim", ["pod on n3", "n3", "pod on n2"])
@pytest.mark.parametrize("place", [FIRST, FAR])
def test_pod_wraps(it: Mesh, place: int, victim: str, family: int, *, spare: bool) -> None:
    """A pod that wraps packets by itself gets nowhere: not as itself, nor under its node's address by masquerading."""
    node = SPARE[family] if spare else it.hosts[FIRST].addresses[family]
    kind = (socket.AF_INET, socket.AF_INET6)[family]

    def send(inner: Packet) -> None:
        with it.pods[place].netns.call(lambda: socket.socket(kind, socket.SOCK_DGRAM)) as ours:
            for _ in range(COUNT):
                ours.sendto(bytes(wrapped(it, inner)[VXLAN]), (node, TUNNEL["port"]))

    assert not arrives(it, send, packet(address(it, victim, family), it.pods[FIRST].addresses[family]))


@families
@pytest.mark.parametrize("victim", ["n3", "pod on n3"])
@pytest.mark.parametrize("door", ["the service's address", "a NodePort", "a NodePort, from outside"])
def test_services_wrap_nothing(it: Mesh, door: str, victim: str, family: int) -> None:
    """A service that leads to a node's tunnel makes nobody pass for the node that masquerades for it."""
    node, host = it.hosts[FIRST].addresses[family], it.hosts[FAR]
    sender = it.world.netns if "outside" in door else it.pods[FAR].netns
    service = Service(service_address(FAR, family), PORT, [node], TUNNEL["port"], NODE_PORT)
    to = (service.address, PORT) if "service" in door else (host.addresses[family], NODE_PORT)
    kind = (socket.AF_INET, socket.AF_INET6)[family]

    def send(inner: Packet) -> None:
        with sender.call(lambda: socket.socket(kind, socket.SOCK_DGRAM)) as ours:
            for _ in range(COUNT):
                ours.sendto(bytes(wrapped(it, inner)[VXLAN]), to)

    write_rules(host.netns, [service])
    try:
        assert not arrives(it, send, packet(address(it, victim, family), it.pods[FIRST].addresses[family]))
    finally:
        delete_rules(host.netns)


@contextmanager
def named(it: Mesh, address: str) -> Iterator[None]:
    """Have the far node's entry name one more address for the duration."""
    entries = [each.entry for each in it.nodes.members]
    entries[FAR] = replace(entries[FAR], addresses=(*entries[FAR].addresses, address))
    it.nodes.tell(entries)
    try:
        yield
    finally:
        it.nodes.tell()


def test_one_more_address(it: Mesh) -> None:
    """A node's further address is one of its own: pods are seen there as they are."""
    far, pod, more = it.nodes.members[FAR], it.pods[FIRST], "203.0.113.113"
    far.netns.run("ip", "address", "add", f"{more}/24", "dev", "uplink")
    with server(far.netns, UDP, more, 9) as asked, named(it, more):
        far.wait_for(lambda: who(pod.netns, asked)[0] == pod.addresses[V4], "the pod to be seen")
    far.netns.run("ip", "address", "delete", f"{more}/24", "dev", "uplink")


def test_a_foreign_address(it: Mesh) -> None:
    """A node that names a foreign address draws nothing that pods send there: it is wrapped for that very address."""
    pod, world, member = it.pods[FIRST], it.nodes.world, it.nodes.members[FAR]
    with bound(world, UDP, WORLD[V4], 9) as plain, bound(world, UDP, WORLD[V4], TUNNEL["port"]) as tunnel:

        def hears(ears: socket.socket) -> bool:
            ears.settimeout(0.1)
            with bound(pod.netns, UDP, pod.addresses[V4]) as ours:
                ours.sendto(PAYLOAD, (WORLD[V4], 9))
            try:
                return PAYLOAD in ears.recv(2000)
            except TimeoutError:
                return False

        with named(it, WORLD[V4]):
            member.wait_for(lambda: hears(tunnel), "the foreign address to get what is sent there")
        while hears(tunnel):
            pass
        member.wait_for(lambda: hears(plain), "the address to be the world's again")


def test_host_is_safe(it: Mesh) -> None:
    """What is forged does not reach the node itself either."""
    node, before = it.nodes.members[FIRST], forged(it)
    inside = IP(src=WORLD[V4], dst=it.hosts[FIRST].addresses[V4]) / UDPHeader(sport=9, dport=9) / PAYLOAD
    with bound(node.netns, UDP, it.hosts[FIRST].addresses[V4], 9) as ours:
        forge(it.nodes.router, it.hosts[FAR].addresses[V4], it.hosts[FIRST].addresses[V4], wrapped(it, inside))
        node.wait_for(lambda: forged(it) == before + COUNT, "the forged ones to be dropped")
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(100)

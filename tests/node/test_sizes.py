"""Packets of all sizes between pods and the world: path-MTU discovery, fragments, GSO."""

from __future__ import annotations

import errno
import hashlib
import re
import socket
import struct
import threading
from pathlib import Path

import pytest
from scapy.layers.inet import IP, fragment
from scapy.layers.inet import UDP as UDPHeader
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6

from tests.node.echo import TCP, UDP, bound
from tests.node.internet import (
    HOPS,
    NARROW,
    NODE,
    WORLD,
    Internet,
    datagram_server,
    forget_mtu,
    nothing_dropped,
)
from tests.node.kubeproxy import Service, write_rules
from tests.node.machine import Machine, Netns, TestPod, machine

V4, V6 = 0, 1
ANYWHERE = ("0.0.0.0", "::")  # noqa: S104
SERVICE = ("10.96.0.20", "fd00:10:96::20")
BIGGEST = (65507, 65487)  # bytes of a datagram: 64 KB less the headers of UDP and IPv4; IPv6: and those of fragments
# linux/in.h, linux/in6.h, linux/errqueue.h
IP_RECVERR, IPV6_RECVERR = 11, 25
EXTENDED_ERROR = struct.Struct("=IBBBBII")

families = pytest.mark.parametrize("family", [V4, V6])
kinds = pytest.mark.parametrize("kind", [TCP, UDP])


@pytest.fixture(scope="module")
def node(routed_node: Machine) -> Machine:
    """All tests of this module share a node."""
    return routed_node


@pytest.fixture(scope="module")
def pod(node: Machine) -> TestPod:
    """Make a pod."""
    return node.make_pod("a")


@families
def test_narrow_link_is_reported(internet: Internet, pod: TestPod, family: int) -> None:
    """A ping that does not fit through a link in the middle is answered by the router, with what fits."""
    with internet.narrowed():
        done = pod.netns.run("ping", "-n", "-c", "1", "-W", "5", "-M", "do", "-s", "1400", WORLD[family], check=False)
        forget_mtu(pod.netns)
    assert re.search(rf"From {HOPS[family][1]} .*mtu ?= ?{NARROW}", done.stdout), done.stdout


@families
@pytest.mark.parametrize("opened_by", ["pod", "world"])
def test_bulk_through_narrow_link(node: Machine, internet: Internet, pod: TestPod, family: int, opened_by: str) -> None:
    """TCP finds out what fits through a link in the middle, in both directions, whoever opened the connection."""
    with internet.narrowed(), nothing_dropped(node):
        ways = [(pod.netns, internet.world, WORLD[family]), (internet.world, pod.netns, pod.addresses[family])]
        exchange(*ways[opened_by == "world"], 10 << 20)
        shown = pod.netns.run("ip", "route", "get", WORLD[family]).stdout
        forget_mtu(pod.netns)
    assert f"mtu {NARROW}" in shown


def test_narrow_link_behind_a_service(tmp_path: Path) -> None:
    """TCP to a service finds out what fits through a link on the way there, to a pod elsewhere or to the world.

    cilium#47755: the pod did not know what the router's error was about.
    """
    remote = {False: [], True: [f"{WORLD[V4]}/32", f"{WORLD[V6]}/128"]}
    for is_pod, prefixes in remote.items():
        (tmp_path / str(is_pod)).mkdir()
        with machine(tmp_path / str(is_pod), masquerade={"non_masquerade_cidrs": prefixes}) as node:
            internet = Internet.behind(node)
            node.start_agent()
            pod = node.make_pod("a")
            services = [Service(SERVICE[family], 5001, [WORLD[family]], 5001) for family in (V4, V6)]
            write_rules(node.netns, services)
            with internet.narrowed():
                for family in (V4, V6):
                    peer = exchange(pod.netns, internet.world, WORLD[family], 5 << 20, by=SERVICE[family])
                    assert peer == (pod.addresses if is_pod else NODE)[family]
                    assert f"mtu {NARROW}" in pod.netns.run("ip", "route", "get", SERVICE[family]).stdout


@families
@pytest.mark.parametrize("whose", ["node", "pod"])
def test_fragments_in_reverse_order(node: Machine, internet: Internet, pod: TestPod, family: int, whose: str) -> None:
    """A datagram whose fragments overtake each other reaches the node itself, and a pod's own address.

    cilium#25709, #46100: what came before the first fragment was dropped.
    """
    netns, address = (node.netns, NODE[family]) if whose == "node" else (pod.netns, pod.addresses[family])
    data = hashlib.shake_128(b"data").digest(5000)
    datagram = UDPHeader(sport=5004, dport=5004) / data
    if family == V4:
        pieces = fragment(IP(src=WORLD[V4], dst=address, id=7) / datagram, fragsize=1400)
    else:
        pieces = fragment6(IPv6(src=WORLD[V6], dst=address) / IPv6ExtHdrFragment(id=7) / datagram, 1400)
    assert len(pieces) > 3

    def wire() -> socket.socket:
        return socket.socket((socket.AF_INET, socket.AF_INET6)[family], socket.SOCK_RAW, socket.IPPROTO_RAW)

    with bound(netns, UDP, address, 5004) as it, internet.world.call(wire) as world, nothing_dropped(node):
        for piece in reversed(pieces):
            world.sendto(bytes(piece), (address, 0))
        assert it.recv(65536) == data


@families
@pytest.mark.parametrize("narrow", [False, True])
def test_big_datagrams(node: Machine, internet: Internet, pod: TestPod, family: int, *, narrow: bool) -> None:
    """The largest datagrams there are go both ways, in fragments, and through a narrow link in smaller ones."""
    question = hashlib.shake_128(b"question").digest(BIGGEST[family])
    answer = question[::-1]
    if narrow:
        with internet.narrowed(), nothing_dropped(node):
            # IPv6 routers do not fragment: the first ones, each way, only tell how large fragments may be.
            assert converse(internet.world, pod.netns, family, question, attempts=10) == answer
            forget_mtu(pod.netns)
    else:
        with nothing_dropped(node):
            assert converse(internet.world, pod.netns, family, question) == answer


def converse(world: Netns, pod: Netns, family: int, question: bytes, attempts: int = 1) -> bytes:
    """Send a datagram until it is answered, by its bytes in reverse order."""
    with (
        datagram_server(world, WORLD[family], 7, lambda heard: heard[::-1]) as asked,
        bound(pod, UDP, ANYWHERE[family]) as it,
    ):
        it.connect((WORLD[family], 7))
        it.settimeout(0.5 if attempts > 1 else 5)
        for _ in range(attempts):
            it.send(question)
            try:
                answer = it.recv(65536)
            except OSError as error:
                if attempts == 1 or (not isinstance(error, TimeoutError) and error.errno != errno.EMSGSIZE):
                    raise
                continue
            assert set(asked) == {NODE[family]}
            return answer
    return b""


@families
def test_bulk(node: Machine, internet: Internet, pod: TestPod, family: int) -> None:
    """Two hundred megabytes, half each way at once, arrive as they were sent, in large (GSO) packets."""
    size = 100 << 20
    before = node.packets()
    with nothing_dropped(node):
        assert exchange(pod.netns, internet.world, WORLD[family], size) == NODE[family]
    after = node.packets()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["masq_out"] < size / 1500  # so there were large ones
    assert grown["punt_too_big"] < 10


def exchange(opener: Netns, server_at: Netns, address: str, size: int, *, by: str = "") -> str:
    """Send bytes both ways at once over TCP, compare what arrived; return who the server took the opener for.

    `by`: the address that the opener knows, if it is another.
    """
    with bound(server_at, TCP, address, 5001) as listener:
        listener.listen()
        with bound(opener, TCP, ANYWHERE[":" in address]) as one:
            one.connect((by or address, 5001))
            other, peer = listener.accept()
            with other:
                digests: dict[str, str] = {}
                threads = [
                    threading.Thread(target=work, args=(digests, name, end, size))
                    for name, end in (("one", one), ("other", other))
                    for work in (_send, _receive)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    assert digests["received by one"] == digests["sent by other"]
    assert digests["received by other"] == digests["sent by one"]
    return str(peer[0])


def _send(digests: dict[str, str], name: str, end: socket.socket, size: int) -> None:
    block, digest = hashlib.shake_128(name.encode()).digest(1 << 20), hashlib.sha256()
    end.settimeout(60)
    for number in range(size >> 20):
        piece = number.to_bytes(8, "big") + block[8:]
        digest.update(piece)
        end.sendall(piece)
    end.shutdown(socket.SHUT_WR)
    digests[f"sent by {name}"] = digest.hexdigest()


def _receive(digests: dict[str, str], name: str, end: socket.socket, size: int) -> None:
    digest, left = hashlib.sha256(), size
    while left and (piece := end.recv(1 << 20)):
        digest.update(piece)
        left -= len(piece)
    digests[f"received by {name}"] = digest.hexdigest()

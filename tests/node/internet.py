"""What lies behind a node's uplink: two routers, a narrow link between them, and the world."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.node.echo import UDP, bound
from tests.node.machine import Machine, Netns, run

NODE = ["192.0.2.10", "2001:db8::10"]
WORLD = ["198.51.100.1", "2001:db8:f::1"]
NOBODY = ["198.51.100.77", "2001:db8:f::77"]
"""In the world's network, and nobody has it: the last router says so."""
CLOSED = ["198.51.100.200", "2001:db8:f::c8"]
"""The last router refuses to route there."""
HOPS = [
    ["192.0.2.10", "192.0.2.1", "203.0.113.2", WORLD[0]],
    ["2001:db8::10", "2001:db8::1", "2001:db8:3::2", WORLD[1]],
]
"""What a traceroute of the world shows."""
PODS = ("10.244.0.0/24", "fd00:10:244::/64")
NARROW = 1280

_A, _INTERNET, _RESPONSE, _NAMED_ADDRESSES = 1, 1, 0x8400, 64


@dataclass(frozen=True)
class Internet:
    """Two routers in a row, and the world behind them. All know the way to the node's pods."""

    node: Machine
    near: Netns
    far: Netns
    world: Netns

    @classmethod
    def behind(cls, node: Machine) -> Internet:
        """Build it at the node's uplink, before the agent starts."""
        it = cls(node, node.add_uplink(), node.add_netns("far"), node.add_netns("world"))
        for router in (node.netns, it.near, it.far):
            router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
            # As many errors as there are reasons: left alone, the kernel sends one a second to each destination.
            router.run("sysctl", "-qw", "net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0")
        join(it.near, it.far, "middle", ("203.0.113.1/24", "2001:db8:3::1/64"), ("203.0.113.2/24", "2001:db8:3::2/64"))
        join(
            it.far, it.world, "last", ("198.51.100.254/24", "2001:db8:f::fe/64"), ("198.51.100.1/24", f"{WORLD[1]}/64")
        )
        it.near.run("ip", "route", "add", "198.51.100.0/24", "via", "203.0.113.2")
        it.near.run("ip", "route", "add", "2001:db8:f::/64", "via", "2001:db8:3::2")
        it.far.run("ip", "route", "add", "default", "via", "203.0.113.1")
        it.far.run("ip", "route", "add", "default", "via", "2001:db8:3::1")
        it.world.run("ip", "route", "add", "default", "via", "198.51.100.254")
        it.world.run("ip", "route", "add", "default", "via", "2001:db8:f::fe")
        for pods, node_address, closed in zip(PODS, NODE, CLOSED, strict=True):
            it.near.run("ip", "route", "add", pods, "via", node_address)
            it.far.run("ip", "route", "add", "unreachable", closed)
        for netns in (node.netns, it.near, it.far, it.world):
            node.wait_for(partial(_is_settled, netns), "link-local addresses, without which no neighbour is asked for")
        return it

    @contextmanager
    def narrowed(self) -> Iterator[None]:
        """Make the link between the routers narrow for the duration, and let everybody forget that it was."""
        self._set_middle(NARROW)
        try:
            yield
        finally:
            self._set_middle(1500)
            forget_mtu(self.world)

    def _set_middle(self, mtu: int) -> None:
        for router in (self.near, self.far):
            router.run("ip", "link", "set", "middle", "mtu", str(mtu))


def join(one: Netns, other: Netns, device: str, ours: tuple[str, str], theirs: tuple[str, str]) -> None:
    """Join two namespaces by a veth pair, of one name at both ends, with an IPv4 and an IPv6 address each."""
    run("ip", "-n", one.name, "link", "add", device, "type", "veth", "peer", "name", device, "netns", other.name)
    for netns, addresses in ((one, ours), (other, theirs)):
        netns.run("ip", "address", "add", addresses[0], "dev", device)
        netns.run("ip", "address", "add", addresses[1], "dev", device, "nodad")
        netns.run("ip", "link", "set", device, "up")


def _is_settled(netns: Netns) -> bool:
    """Say whether each device that is up has a link-local address, and has found that nobody else does."""
    devices = json.loads(netns.run("ip", "-j", "-6", "address", "show", "up").stdout)
    found = [address for device in devices if device.get("ifname") != "lo" for address in device["addr_info"]]
    links = [each for each in found if each["scope"] == "link" and not each.get("tentative")]
    return len(links) == len([each for each in devices if each.get("ifname") not in (None, "lo")])


@contextmanager
def nothing_dropped(node: Machine) -> Iterator[None]:
    """Assert that the datapath drops nothing meanwhile."""
    before = node.packets()
    yield
    after = node.packets()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert [name for name in grown if name.startswith("drop_")] == [], grown


def forget_mtu(netns: Netns) -> None:
    """Let a host forget what it learnt about paths."""
    netns.run("ip", "-4", "route", "flush", "cache")
    netns.run("ip", "-6", "route", "flush", "cache")


@contextmanager
def web_server(netns: Netns, address: str, port: int, page: bytes) -> Iterator[list[str]]:
    """Serve a page over HTTP; yield the list of those who asked for it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.client_address[0])
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:  # the base class's name
            """Print nothing."""

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

    made: ThreadingHTTPServer = netns.call(lambda: Server((address, port), Handler))
    with made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield asked
        finally:
            made.shutdown()
            thread.join()


@contextmanager
def datagram_server(netns: Netns, address: str, port: int, answer: Callable[[bytes], bytes]) -> Iterator[list[str]]:
    """Answer every datagram by what the function makes of it; yield the list of those who sent them."""
    asked: list[str] = []
    stop = threading.Event()
    with bound(netns, UDP, address, port) as it:
        it.settimeout(0.05)

        def serve() -> None:
            while not stop.is_set():
                try:
                    question, peer = it.recvfrom(65536)
                except TimeoutError:
                    continue
                asked.append(peer[0])
                it.sendto(answer(question), peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield asked
        finally:
            stop.set()
            thread.join()


def name_server(question: bytes) -> bytes:
    """Return what a name server does that knows sixty-four addresses for every name (RFC 1035 section 4.1)."""
    to_the_name = 0xC00C  # it stands in the question, behind the header
    records = [
        struct.pack("!HHHIH4B", to_the_name, _A, _INTERNET, 1, 4, 203, 0, 113, last) for last in range(_NAMED_ADDRESSES)
    ]
    header = question[:2] + struct.pack("!HHHHH", _RESPONSE, 1, len(records), 0, 0)
    return header + question[12:] + b"".join(records)

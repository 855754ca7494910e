"""Pods and a world that is some routers away: what people do there, and what routers and hosts answer."""

from __future__ import annotations

import errno
import json
import re
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.dns import DNS, DNSQR

from tests.node.echo import TCP, UDP, bound, client, server
from tests.node.internet import (
    CLOSED,
    HOPS,
    NODE,
    WORLD,
    Internet,
    datagram_server,
    name_server,
    nothing_dropped,
    web_server,
)
from tests.node.machine import Machine, Netns, TestPod, machine, pings, run
from tests.node.traffic import Datagrams

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
def test_web_page(node: Machine, internet: Internet, pod: TestPod, family: int) -> None:
    """A pod's curl fetches a page, and the web server's log has the node's address."""
    page = b"a page of the world\n" * 50_000
    host = f"[{WORLD[V6]}]" if family == V6 else WORLD[V4]
    with web_server(internet.world, WORLD[family], 80, page) as asked, nothing_dropped(node):
        for _ in range(3):
            assert pod.netns.run("curl", "-sS", "-m", "10", f"http://{host}/").stdout == page.decode()
    assert [str(ip_address(each)) for each in asked] == [NODE[family]] * 3


@families
def test_names(node: Machine, internet: Internet, pod: TestPod, family: int) -> None:
    """A hundred queries, each from a port of its own as resolvers ask, are answered to who asked, long answers too."""
    with (
        datagram_server(internet.world, WORLD[family], 53, name_server) as asked,
        nothing_dropped(node),
    ):
        for number in range(100):
            query = bytes(DNS(id=number, rd=1, qd=DNSQR(qname=f"w{number}.example.")))
            with bound(pod.netns, UDP, ANYWHERE[family]) as resolver:
                resolver.connect((WORLD[family], 53))
                resolver.send(query)
                assert resolver.recv(4096) == name_server(query)
    assert set(asked) == {NODE[family]}


@families
@pytest.mark.parametrize("size", [0, 1400, 20000])
def test_ping(node: Machine, internet: Internet, pod: TestPod, family: int, size: int) -> None:
    """Pings of any size, in fragments if need be, are answered whole."""
    with nothing_dropped(node):
        assert node.pings(pod, WORLD[family], "-s", str(size), count=5)
        assert pings(internet.world, pod.addresses[family], "-s", str(size))


@families
def test_traceroute_by_ping(internet: Internet, pod: TestPod, family: int) -> None:  # noqa: ARG001
    """A traceroute that sends echo requests shows the node, each router and the world."""
    found = []
    for hops in range(1, 5):
        shown = pod.netns.run("ping", "-n", "-c", "1", "-W", "2", "-t", str(hops), WORLD[family], check=False).stdout
        answer = re.search(r"[Ff]rom ([0-9a-f.:]+?):? icmp_seq", shown)
        found.append(answer[1] if answer else shown)
    assert found == HOPS[family]


@families
def test_traceroute_by_udp(internet: Internet, pod: TestPod, family: int) -> None:  # noqa: ARG001
    """A traceroute that sends UDP shows them too: the sender's socket is told of each error, and who sent it."""
    found = []
    for hops in range(1, 5):
        with bound(pod.netns, UDP, ANYWHERE[family]) as probe:
            level, option = (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS) if family else (socket.IPPROTO_IP, 2)
            probe.setsockopt(level, option, hops)
            probe.connect((WORLD[family], 33433 + hops))
            tell_errors(probe)
            probe.send(b"who is there?")
            found.append(error_of(probe)[1])
    assert found == HOPS[family]


@contextmanager
def connected(pod: TestPod, world: Netns, family: int, port: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Connect a pod to the world by TCP; yield both ends."""
    with bound(world, TCP, WORLD[family], 5002) as listener, bound(pod.netns, TCP, ANYWHERE[family], port) as ours:
        listener.listen()
        ours.connect((WORLD[family], 5002))
        theirs, _ = listener.accept()
        with theirs:
            theirs.settimeout(5)
            yield ours, theirs


@families
@pytest.mark.parametrize("by_pod", [False, True])
def test_reset(node: Machine, internet: Internet, pod: TestPod, family: int, *, by_pod: bool) -> None:
    """A reset reaches the other side, whoever sends it, and the same ports serve a new connection at once."""
    with nothing_dropped(node):
        for _ in range(3):
            with connected(pod, internet.world, family, port=50010) as ends:
                end, other = ends if by_pod else ends[::-1]
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
                with pytest.raises(ConnectionResetError):
                    other.recv(1)


@families
def test_simultaneous_close(node: Machine, internet: Internet, pod: TestPod, family: int) -> None:
    """Two ends that close before they hear of each other's FIN both get there, and each takes itself for the first."""
    iptables = ("iptables", "ip6tables")[family]
    with nothing_dropped(node), connected(pod, internet.world, family) as (ours, theirs):
        port = ours.getsockname()[1]
        internet.far.run(iptables, "-A", "FORWARD", "-j", "DROP")
        ours.shutdown(socket.SHUT_WR)
        theirs.shutdown(socket.SHUT_WR)
        internet.far.run(iptables, "-D", "FORWARD", "-j", "DROP")
        assert ours.recv(1) == theirs.recv(1) == b""
        closing = ["ss", "-Htan", "state", "time-wait", "state", "closing"]
        node.wait_for(lambda: str(port) in pod.netns.run(*closing).stdout, "the pod's end to close")
        node.wait_for(lambda: ":5002" in internet.world.run(*closing).stdout, "the world's end to close")


@families
@kinds
def test_closed_port(internet: Internet, pod: TestPod, family: int, kind: socket.SocketKind) -> None:  # noqa: ARG001
    """A port on which nobody listens refuses: by a reset, or an error that the pod's socket is told of."""
    with bound(pod.netns, kind, ANYWHERE[family]) as it:
        assert knock(it, WORLD[family], 9) == errno.ECONNREFUSED


def knock(it: socket.socket, address: str, port: int) -> int:
    """Return the error that a connection, or the first datagram, is answered by."""
    try:
        it.connect((address, port))
        it.send(b"?")
        it.recv(1)
    except OSError as error:
        return error.errno or 0
    return 0


@families
def test_unreachable_host(internet: Internet, pod: TestPod, family: int) -> None:  # noqa: ARG001
    """A router that knows no way tells the pod, and its connection fails at once."""
    with bound(pod.netns, TCP, ANYWHERE[family]) as it:
        assert knock(it, CLOSED[family], 80) in (errno.EHOSTUNREACH, errno.ENETUNREACH)


@families
def test_late_answer_is_refused(node: Machine, internet: Internet, pod: TestPod, family: int) -> None:
    """An answer to a socket that is gone is refused by the pod, and the world hears it from the node."""
    with bound(internet.world, UDP, WORLD[family], 5003) as theirs, nothing_dropped(node):
        with bound(pod.netns, UDP, ANYWHERE[family]) as ours:
            ours.connect((WORLD[family], 5003))
            ours.send(b"?")
            theirs.connect(theirs.recvfrom(1)[1])
        tell_errors(theirs)
        theirs.send(b"too late")
        assert error_of(theirs) == (errno.ECONNREFUSED, NODE[family])


@families
def test_world_is_refused_by_the_pod(internet: Internet, pod: TestPod, family: int) -> None:
    """Who sends to a closed port of a pod's own address is refused from that address."""
    with bound(internet.world, UDP, ANYWHERE[family]) as theirs:
        theirs.connect((pod.addresses[family], 9))
        tell_errors(theirs)
        theirs.send(b"?")
        assert error_of(theirs) == (errno.ECONNREFUSED, pod.addresses[family])


def tell_errors(it: socket.socket) -> None:
    """Let a socket queue the errors that it is told of, with their senders."""
    is_ipv6 = it.family == socket.AF_INET6
    level, option = (socket.IPPROTO_IPV6, IPV6_RECVERR) if is_ipv6 else (socket.IPPROTO_IP, IP_RECVERR)
    it.setsockopt(level, option, 1)


def error_of(it: socket.socket) -> tuple[int, str]:
    """Wait for an error that a socket is told of; return it, and who sent it."""
    waiting = select.poll()
    waiting.register(it, select.POLLERR)
    assert waiting.poll(5000), "no error came"
    _, ancillary, _, _ = it.recvmsg(1024, 1024, socket.MSG_ERRQUEUE)
    ((_, _, data),) = ancillary
    number = EXTENDED_ERROR.unpack_from(data)[0]
    sender = data[EXTENDED_ERROR.size :]  # struct sockaddr_in or sockaddr_in6
    packed = sender[8:24] if it.family == socket.AF_INET6 else sender[4:8]
    return number, str(ip_address(packed))


def test_two_copies_of_the_program(node: Machine, internet: Internet, pod: TestPod) -> None:
    """While packets pass two copies of the program, as when the agent moves it, flows keep their ports and lanes."""
    with (
        server(internet.world, TCP, WORLD[V4], 7) as far,
        server(pod.netns, TCP, pod.addresses[V4], 7) as near,
        client(pod.netns, far) as out,
        client(internet.world, near) as into,
    ):
        before = [out.ask(), into.ask()]
        with second_copy(node):
            counted = node.packets()
            for _ in range(3):
                assert [out.ask(), into.ask()] == before
            after = node.packets()
            assert after["fwd_host_out"] >= counted["fwd_host_out"] + 6  # so both copies ran
        assert [out.ask(), into.ask()] == before
    assert node.packets()["punt_reply"] == counted["punt_reply"]


@contextmanager
def second_copy(node: Machine) -> Iterator[None]:
    """Attach the program of the uplink's way out a second time, behind the first."""
    link = node.bpffs / "links" / "uplink:egress"
    copy = node.bpffs.parent / "copy"
    node.wait_for(link.exists, "the program to be in its final place")
    program = json.loads(run("bpftool", "-j", "link", "show", "pinned", str(link)).stdout)["prog_id"]
    run("bpftool", "prog", "pin", "id", str(program), str(copy))
    node.netns.run("tc", "qdisc", "replace", "dev", "uplink", "clsact")
    filters = ("dev", "uplink", "egress", "pref", "7")
    node.netns.run("tc", "filter", "add", *filters, "bpf", "da", "object-pinned", str(copy))
    try:
        yield
    finally:
        node.netns.run("tc", "filter", "del", *filters)
        copy.unlink()


def test_start_disturbs_nobody(tmp_path: Path) -> None:
    """The node's own packets go on, all of them, while an agent takes hold of its uplink for the first time."""
    with machine(tmp_path) as node:
        world = node.add_world()
        with bound(world, UDP, WORLD[V4], 9) as theirs, bound(node.netns, UDP, ANYWHERE[V4]) as ours:
            ours.connect((WORLD[V4], 9))
            flow, stop = Datagrams(ours, theirs), threading.Event()
            thread = threading.Thread(target=send_until, args=(flow, stop))
            thread.start()
            try:
                node.start_agent()
                node.make_pod("a")
                links = node.bpffs / "links"
                node.wait_for(lambda: len(list(links.glob("*"))) == 4, "all programs to be in their final places")
            finally:
                stop.set()
                thread.join()
            assert flow.lost() == set()


def send_until(flow: Datagrams, stop: threading.Event) -> None:
    """Send datagrams, some thousands a second."""
    while not stop.wait(0.0002):
        flow.send()

"""Pods and a world that is some routers away: what people do there, and what routers and hosts answer."""

from __future__ import annotations

import errno
import hashlib
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
    NARROW,
    NODE,
    WORLD,
    Internet,
    datagram_server,
    forget_mtu,
    join,
    name_server,
    web_server,
)
from tests.node.machine import Machine, Netns, TestPod, machine, run
from tests.node.traffic import Datagrams

V4, V6 = 0, 1
ANYWHERE = ("0.0.0.0", "::")  # noqa: S104
BIGGEST = (65507, 65487)  # bytes of a datagram: 64 KB less the headers of UDP and IPv4; IPv6: and those of fragments
# linux/in.h, linux/in6.h, linux/errqueue.h
IP_RECVERR, IPV6_RECVERR = 11, 25
EXTENDED_ERROR = struct.Struct("=IBBBBII")

families = pytest.mark.parametrize("family", [V4, V6])
kinds = pytest.mark.parametrize("kind", [TCP, UDP])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make the node that all tests share."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        yield it


@pytest.fixture(scope="module")
def internet(node: Machine) -> Internet:
    """Build what is behind its uplink, and start its agent."""
    it = Internet.behind(node)
    node.start_agent()
    return it


@pytest.fixture(scope="module")
def pod(node: Machine, internet: Internet) -> TestPod:  # noqa: ARG001 - the agent runs by then
    """Make a pod."""
    return node.make_pod("a")


@contextmanager
def nothing_dropped(node: Machine) -> Iterator[None]:
    """Assert that the datapath drops nothing meanwhile."""
    before = node.packets()
    yield
    after = node.packets()
    grown = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert [name for name in grown if name.startswith("drop_")] == [], grown


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
        assert internet.world.run("ping", "-c", "1", "-s", str(size), "-W", "2", pod.addresses[family])


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


@families
def test_narrow_link_is_reported(internet: Internet, pod: TestPod, family: int) -> None:
    """A ping that does not fit through a link in the middle is answered by the router, with what fits."""
    with internet.narrowed():
        done = pod.netns.run("ping", "-n", "-c", "1", "-W", "1", "-M", "do", "-s", "1400", WORLD[family], check=False)
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


def exchange(opener: Netns, server_at: Netns, address: str, size: int) -> str:
    """Send bytes both ways at once over TCP, compare what arrived; return who the server took the opener for."""
    with bound(server_at, TCP, address, 5001) as listener:
        listener.listen()
        with bound(opener, TCP, ANYWHERE[":" in address]) as one:
            one.connect((address, 5001))
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


def test_many_uplinks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A node with two uplinks, several addresses and routes by policy masquerades as it chooses for itself."""
    with machine(tmp_path_factory.mktemp("node")) as node:
        ways = two_uplinks(node)
        node.start_agent()
        pod = node.make_pod("a")
        for destination, (world, expected) in ways.items():
            with server(world, UDP, destination, 7) as far:
                for netns in (node.netns, pod.netns):
                    with client(netns, far) as it:
                        assert it.ask()[0] == expected, destination


def two_uplinks(node: Machine) -> dict[str, tuple[Netns, str]]:
    """Give a node two uplinks; return by destination where that is, and from which address the node goes there."""
    first, second = node.add_uplink(), node.add_netns("second")
    join(node.netns, second, "other", ("192.0.3.10/24", "2001:db8:33::10/64"), ("192.0.3.1/24", "2001:db8:33::1/64"))
    for device, address in (("uplink", "192.0.2.11/24"), ("uplink", "192.0.2.12/32"), ("other", "192.0.3.11/24")):
        node.netns.run("ip", "address", "add", address, "dev", device)
    for command in (
        "route add 203.0.113.0/24 via 192.0.2.1 src 192.0.2.12",
        "route add default via 192.0.3.1 table 100",
        "route add 198.51.100.64/26 via 192.0.3.1 src 192.0.3.11 table 100",
        "rule add to 198.51.100.0/24 table 100",
        "-6 route add default via 2001:db8:33::1 table 100",
        "-6 rule add to 2001:db8:f::/48 table 100",
    ):
        node.netns.run("ip", *command.split())
    ways = {
        "203.0.113.1": (first, "192.0.2.12"),
        "192.0.2.1": (first, "192.0.2.10"),
        "8.8.8.8": (first, "192.0.2.10"),
        "2001:db8:8::8": (first, "2001:db8::10"),
        "198.51.100.1": (second, "192.0.3.10"),
        "198.51.100.65": (second, "192.0.3.11"),
        "2001:db8:f::1": (second, "2001:db8:33::10"),
    }
    for destination, (world, _) in ways.items():
        if destination != "192.0.2.1":
            length = "128" if ":" in destination else "32"
            world.run("ip", "address", "add", f"{destination}/{length}", "dev", "lo")
    return ways

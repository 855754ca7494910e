"""Where masquerading ends: no port is left, the node needs one itself, the world forges and floods."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.node.crowd import Datagrams, connected, connecting, syn_flood, tcp_server
from tests.node.echo import TCP, UDP, Client, Server, bound, client, server, who
from tests.node.machine import Machine, TestPod, machine

V4, V6 = 0, 1
NODE = ("192.0.2.10", "2001:db8::10")
NEIGHBOUR = ("192.0.2.1", "2001:db8::1")
FAR = ("198.51.100.1", "2001:db8:f::1")
FIRST_PORT, PORTS = 61000, 1000  # above those that the pods' kernels choose
COLLECTED = ("podlane_masquerade_collected_total", ("flow",))
IDLE = 2  # seconds until a flow of UDP is over

families = pytest.mark.parametrize("family", [V4, V6])
kinds = pytest.mark.parametrize("kind", [TCP, UDP])


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node with few ports, which most tests share."""
    masquerade = {"first_port": FIRST_PORT, "last_port": FIRST_PORT + PORTS - 1, "tcp_closed": 1, "udp": IDLE}
    with machine(tmp_path_factory.mktemp("node"), masquerade=masquerade) as it:
        it.add_world()
        it.start_agent()
        yield it


@pytest.fixture(scope="module")
def pod(node: Machine) -> TestPod:
    """Make a pod."""
    return node.make_pod("a")


def busiest(node: Machine, address: str, port: int, protocol: str) -> float:
    """Return how many ports to a destination are in use, as the metrics say."""
    host = f"[{address}]" if ":" in address else address
    return node.metrics().get(("podlane_masquerade_destination_ports", (f"{host}:{port}/{protocol}",)), 0)


@families
def test_connections_exhaust_the_ports(node: Machine, pod: TestPod, family: int) -> None:
    """When the ports to a destination run out only new connections there fail, until old ones have ended.

    cilium#33074, #23604, #20955: it is seen in a counter and in the metrics of that destination.
    """
    before = node.packets()
    with (
        tcp_server(node.world, FAR[family], 7) as far,
        server(node.world, TCP, FAR[family], 8) as elsewhere,
        connecting(pod.netns, far, PORTS + 100) as crowd,
    ):
        node.wait_for(lambda: len(connected(crowd)) >= PORTS * 9 // 10, "most connections")
        assert who(pod.netns, elsewhere)[0] == NODE[family]
        assert node.packets()["drop_masq_exhausted"] >= before["drop_masq_exhausted"] + 100
        node.wait_for(lambda: busiest(node, FAR[family], 7, "tcp") >= PORTS * 9 // 10, "the metric")
        happy = connected(crowd)
        assert len(happy) <= PORTS
        ports = ask_all(happy)
        assert len(set(ports)) == len(happy)
        assert_node_gets_a_port(node, far, ports)
        happy = [each for each, port in zip(happy, ports, strict=True) if port != ports[0]]
        end(happy[: PORTS // 2])
        node.wait_for(lambda: busiest(node, FAR[family], 7, "tcp") <= PORTS * 7 // 10, "the ports to be free again")
        assert ask_all(happy[PORTS // 2 :]) == ports[PORTS // 2 + 1 :]
        with connecting(pod.netns, far, PORTS // 4) as more:
            node.wait_for(lambda: len(connected(more)) == PORTS // 4, "new connections")
            assert len(set(ask_all(more))) == PORTS // 4
        end(connected(crowd))


def ask_all(clients: list[Client]) -> list[int]:
    """Return the ports by which a server knows the clients."""
    for each in clients:
        each.socket.settimeout(5)
    return [each.ask()[1] for each in clients]


def assert_node_gets_a_port(node: Machine, far: Server, ports: list[int]) -> None:
    """Assert that the node itself can connect, from a port of the range that is in use there."""
    with client(node.netns, far, port=ports[0]) as own:
        own.socket.settimeout(5)
        assert {own.ask()[1] for _ in range(3)} == {ports[0]}


def end(clients: list[Client]) -> None:
    """End connections: every other one by a reset."""
    for number, each in enumerate(clients):
        if number % 2:
            each.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        each.socket.close()


def test_twenty_thousand_flows(tmp_path: Path) -> None:
    """Of 20,000 flows to one destination as many live as there are ports; the others are refused, until some end.

    They also live while the agent does not.
    """
    wanted = range(1024, 21024)
    with machine(tmp_path) as node, ExitStack() as stack:
        node.add_world()
        node.start_agent()
        pod = node.make_pod("a")
        far = stack.enter_context(server(node.world, UDP, FAR[V4], 7))
        crowd = Datagrams(stack, pod.netns, far)
        ports = crowd.ask(wanted)
        range_size = 65536 - 49152
        assert range_size * 0.98 <= len(ports) <= range_size
        assert len(set(ports.values())) == len(ports)
        assert node.packets()["drop_masq_exhausted"] == len(wanted) - len(ports)
        node.wait_for(lambda: busiest(node, FAR[V4], 7, "udp") == len(ports), "the metric")
        other = stack.enter_context(server(node.world, UDP, FAR[V4], 8))
        assert who(pod.netns, other)[0] == NODE[V4]

        node.kill_agent()
        assert crowd.ask(list(ports)) == ports
        node.configure(masquerade={"udp": 1})  # so they all end
        time.sleep(1.1)  # before the first scan: the second may be half a minute later
        node.start_agent()
        node.wait_for(lambda: node.metrics()[COLLECTED] >= len(ports), "the flows to be collected")
        assert crowd.ask([each for each in wanted if each not in ports]).keys() == set(wanted) - ports.keys()


@families
@kinds
def test_node_takes_a_port_back(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind) -> None:
    """A connection of the node's own, from a port that a pod already has for that destination, is the node's."""
    port = FIRST_PORT + 10
    with server(node.world, kind, FAR[family], 17) as far, client(pod.netns, far, port=port) as theirs:
        assert theirs.ask() == (NODE[family], port)
        with client(node.netns, far, port=port) as own:
            assert own.ask() == (NODE[family], port)
            if kind == UDP:
                assert theirs.ask()[1] != port
            else:
                with pytest.raises(ConnectionResetError):  # the server knows no such connection any more
                    theirs.ask()
            assert {own.ask() for _ in range(3)} == {(NODE[family], port)}


@families
@kinds
def test_listening_port_is_not_taken(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind) -> None:
    """A port of the range on which the node listens is given to no pod, and who asks there is answered by the node."""
    port = FIRST_PORT + 11
    with (
        server(node.world, kind, FAR[family], port) as far,
        server(node.netns, kind, NODE[family], port) as own,
        client(pod.netns, far, port=port) as theirs,
    ):
        assert theirs.ask()[1] != port
        assert who(node.world, own)[0] == NEIGHBOUR[family]
        assert theirs.ask()[1] != port


@families
@pytest.mark.parametrize("pod_first", [False, True])
def test_node_pings_beside_a_pod(node: Machine, pod: TestPod, family: int, *, pod_first: bool) -> None:
    """Pings of the node and of a pod with one identifier, at the same time, are all answered to who sent them."""
    identifier = FIRST_PORT + 20 + pod_first
    command = ("ping", "-e", str(identifier), "-c", "30", "-i", "0.02", "-W", "2", FAR[family])
    pings = []
    for netns in (pod.netns, node.netns) if pod_first else (node.netns, pod.netns):
        pings.append(subprocess.Popen(netns.command(*command), stdout=subprocess.PIPE, text=True))
        time.sleep(0.1)
    for ping in pings:
        assert " 30 received, 0% packet loss" in ping.communicate(timeout=30)[0]


@families
@kinds
def test_forged_packets_leak_nothing(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind) -> None:
    """Packets to a pod's own address that look like answers do not make its flow leave under that address.

    cilium#47425: a note of such packets made masquerading be skipped.
    """
    port = FIRST_PORT + 30
    with server(node.world, kind, FAR[family], 7) as far, client(pod.netns, far, port=port) as it:
        before = it.ask()
        assert before[0] == NODE[family]
        forge(node, pod, family, kind, port)
        assert kind == TCP or it.socket.recv(100) == b"forged"
        assert [it.ask() for _ in range(3)] == [before] * 3


@families
def test_note_ends_with_a_new_connection(node: Machine, pod: TestPod, family: int) -> None:
    """What the world has sent to a port of a pod's own address does not matter to a connection that the pod opens."""
    port = FIRST_PORT + 31
    forge(node, pod, family, TCP, port)
    with server(node.world, TCP, FAR[family], 7) as far, client(pod.netns, far, port=port) as it:
        assert {it.ask()[0] for _ in range(3)} == {NODE[family]}


def test_note_ends_with_silence(node: Machine, pod: TestPod) -> None:
    """A pod's datagrams answer those that the world has sent to its own address, but not after a long silence."""
    port = FIRST_PORT + 32
    with ExitStack() as stack:
        seen = []
        for family in (V4, V6):
            far = stack.enter_context(server(node.world, UDP, FAR[family], 7))
            it = stack.enter_context(client(pod.netns, far, port=port + family))
            forge(node, pod, family, UDP, port + family)
            assert it.socket.recv(100) == b"forged"
            seen.append((it, family))
        assert [it.ask()[0] for it, _ in seen] == [pod.addresses[family] for _, family in seen]
        time.sleep(IDLE + 1)
        assert [it.ask()[0] for it, _ in seen] == [NODE[family] for _, family in seen]


def forge(node: Machine, pod: TestPod, family: int, kind: socket.SocketKind, port: int) -> None:
    """Send to a pod's own address from where the server is that the test's flow goes to, with its ports."""
    protocol = socket.IPPROTO_TCP if kind == TCP else socket.IPPROTO_UDP
    with far_wire(node, family, protocol) as wire:
        if kind == UDP:
            body = struct.pack("!HHHH", 7, port, 8 + 6, 0) + b"forged"
        else:
            body = struct.pack("!HHIIBBHHH", 7, port, 1, 1, 5 << 4, 0x10, 1000, 0, 0)  # ACK
        if family == V6:
            wire.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_CHECKSUM, 6 if kind == UDP else 16)
        wire.sendto(body, (pod.addresses[family], 0))


def far_wire(node: Machine, family: int, protocol: int) -> socket.socket:
    """Return a raw socket of the world's, with its far address."""

    def make() -> socket.socket:
        wire = socket.socket((socket.AF_INET, socket.AF_INET6)[family], socket.SOCK_RAW, protocol)
        wire.bind((FAR[family], 0))
        return wire

    made: socket.socket = node.world.call(make)
    return made


@contextmanager
def flooded(node: Machine, targets: list[tuple[str, int]], count: int) -> Iterator[None]:
    """Flood the node with SYNs from outside during the block, and until all are sent."""
    mac = node.netns.run("ip", "-br", "link", "show", "dev", "uplink").stdout.split()[2]
    flood = threading.Thread(target=syn_flood, args=(node.world, "outside", mac, targets, count))
    flood.start()
    try:
        yield
    finally:
        flood.join()


def test_flood(node: Machine, pod: TestPod) -> None:
    """200,000 SYNs from anywhere, to a pod and the node's range, hurt no flow, old or new, even without an agent."""
    with ExitStack() as stack:
        far = stack.enter_context(tcp_server(node.world, FAR[V4], 7))
        near = stack.enter_context(tcp_server(pod.netns, pod.addresses[V4], 7))
        old = [stack.enter_context(client(pod.netns, far)) for _ in range(20)]
        quiet = stack.enter_context(client(pod.netns, far))
        opened_outside = stack.enter_context(client(node.world, near))
        first = [each.ask() for each in [*old, quiet, opened_outside]]
        before = node.packets()
        targets = [
            (pod.addresses[V4], 7),
            (pod.addresses[V4], 9),
            (NODE[V4], first[0][1]),
            (NODE[V4], FIRST_PORT + 500),
        ]
        node.kill_agent()
        with flooded(node, targets, 200_000):
            for _ in range(50):
                assert [each.ask() for each in old] == first[:20]
                assert opened_outside.ask() == first[21]
                assert who(pod.netns, far)[0] == NODE[V4]
        node.start_agent()
        assert [each.ask() for each in [*old, quiet, opened_outside]] == first
        assert who(pod.netns, far)[0] == NODE[V4]
        after = node.packets()
    assert after["fwd_inbound"] >= before["fwd_inbound"] + 90_000
    assert [name for name in after if name.startswith("drop_") and after[name] != before[name]] == []


def test_flood_spares_a_quiet_connection(node: Machine, pod: TestPod) -> None:
    """A connection that the world opened to a pod, and that was quiet during a flood, is there when the pod speaks."""
    with (
        bound(pod.netns, TCP, pod.addresses[V4], 19) as listener,
        bound(node.world, TCP, FAR[V4]) as theirs,
    ):
        listener.listen()
        theirs.connect((pod.addresses[V4], 19))
        ours, _ = listener.accept()
        with ours:
            with flooded(node, [(pod.addresses[V4], 9)], 50_000):
                pass
            ours.sendall(b"news")
            assert theirs.recv(100) == b"news"

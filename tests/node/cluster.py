"""A node with services and host ports, as kube-proxy and portmap write them, and pods behind and before them."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.node.echo import TCP, UDP, Server, client, server
from tests.node.kubeproxy import CLUSTER, HostPort, Service, write_rules
from tests.node.machine import Machine, Netns, TestPod, machine

V4, V6 = 0, 1
NODE = ("192.0.2.10", "2001:db8::10")
NEIGHBOUR = ("192.0.2.1", "2001:db8::1")
FAR = ("198.51.100.1", "2001:db8:f::1")
REMOTE = ("10.244.9.9", "fd00:10:244:9::9")
"""A pod of another node, which the world carries to it."""
PORT, BACKEND_PORT = 80, 8080
HOST_PORTS = (8000, 60000)  # the latter is also one that masquerading may use
# Services by what is behind them: the last byte of their address, and their NodePort.
LOCAL, ITSELF, REMOTE_POD, WORLD, BOTH = 10, 11, 12, 13, 14
NODE_PORT = {LOCAL: 30010, ITSELF: 30011, REMOTE_POD: 30012}
NODE_PORT_LOCAL = 31010


def address(service: int, family: int) -> str:
    """Return a service's address."""
    return f"{('10.96.0.', 'fd00:10:96::')[family]}{service}"


@dataclass
class Cluster:
    """A node with services, and who takes part: a pod that asks and one that answers, and others that do neither."""

    node: Machine
    asker: TestPod
    backend: TestPod
    bystanders: tuple[TestPod, TestPod]
    servers: dict[tuple[str, int, socket.SocketKind], Server] = field(default_factory=dict)

    def serve(self, stack: ExitStack) -> None:
        """Run a server of each kind at every backend."""
        places = [(self.backend.netns, self.backend.addresses), (self.asker.netns, self.asker.addresses)]
        places += [(self.node.world, list(REMOTE)), (self.node.world, list(FAR))]
        for netns, addresses in places:
            for family in (V4, V6):
                for kind in (TCP, UDP):
                    key = (addresses[family], family, kind)
                    self.servers[key] = stack.enter_context(server(netns, kind, addresses[family], BACKEND_PORT))

    def write_rules(self) -> None:
        """Write the rules of all services and host ports."""
        services, host_ports = [], []
        for family in (V4, V6):
            backend, asker = self.backend.addresses[family], self.asker.addresses[family]
            behind = {
                LOCAL: [backend],
                ITSELF: [asker],
                REMOTE_POD: [REMOTE[family]],
                WORLD: [FAR[family]],
                BOTH: [backend, REMOTE[family]],
            }
            for number, backends in behind.items():
                at = address(number, family)
                services.append(Service(at, PORT, backends, BACKEND_PORT, NODE_PORT.get(number, 0)))
            at = address(LOCAL + 100, family)
            services.append(Service(at, PORT, [backend], BACKEND_PORT, NODE_PORT_LOCAL, local=True))
            host_ports += [HostPort(port, backend, BACKEND_PORT) for port in HOST_PORTS]
        write_rules(self.node.netns, services, host_ports)

    def asked(self, at: str, family: int, kind: socket.SocketKind) -> int:
        """Return how many questions the server at an address has had."""
        return len(self.servers[at, family, kind].peers)


@contextmanager
def made_cluster(directory: Path) -> Iterator[Cluster]:
    """Make a node with services, in a directory of its own."""
    masquerade = {"non_masquerade_cidrs": list(CLUSTER)}
    with machine(directory, masquerade=masquerade) as node, ExitStack() as stack:
        world = node.add_world()
        for remote, length in zip(REMOTE, ("32", "128"), strict=True):
            world.run("ip", "address", "add", f"{remote}/{length}", "dev", "lo")
        node.start_agent()
        it = Cluster(node, node.make_pod("asker"), node.make_pod("backend"), (node.make_pod("c"), node.make_pod("d")))
        it.serve(stack)
        it.write_rules()
        yield it


def converse(netns: Netns, to: Server, times: int = 3) -> set[str]:
    """Ask over one flow, several times; return by which addresses the server knows us."""
    with client(netns, to) as it:
        return {it.ask()[0] for _ in range(times)}


def packets_at_rest(node: Machine) -> dict[str, int]:
    """Return the packets counted so far, once the last flows' ends have come to rest."""
    seen = node.packets()
    while True:
        time.sleep(0.2)
        before, seen = seen, node.packets()
        if seen == before:
            return seen

"""Services whose backends are on other nodes, by kube-proxy's rules, whichever lane leads there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.node.cluster import PORT, address, converse
from tests.node.echo import TCP, UDP, Server, client
from tests.node.kubeproxy import Service, write_rules
from tests.node.mesh import PORT as BACKEND_PORT
from tests.node.mesh import Mesh, mesh
from tests.node.nodes import BOTH, FAR, FIRST, PLACES, SECOND, nodes

ALL = 3
"""The service with a backend on every node; the others have one, on the node of their number."""
families = pytest.mark.parametrize("family", BOTH)
kinds = pytest.mark.parametrize("kind", [TCP, UDP])
behind = pytest.mark.parametrize("service", PLACES)


@pytest.fixture(scope="module")
def it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Yield a cluster with services; all nodes have the rules of all of them."""
    with nodes(tmp_path_factory.mktemp("services"), routing="auto") as made, mesh(made) as it:
        services = []
        for family in BOTH:
            backends = [pod.addresses[family] for pod in it.pods]
            for number, behind in enumerate([*([each] for each in backends), backends]):
                services.append(Service(address(number, family), PORT, behind, BACKEND_PORT, node_port(number)))
        for member in made.members:
            write_rules(member.netns, services)
        yield it


def node_port(service: int) -> int:
    """Return the NodePort of a service."""
    return 30000 + service


@families
@kinds
@behind
def test_cluster_address(it: Mesh, service: int, family: int, kind: socket.SocketKind) -> None:
    """Pods of all nodes reach a service, whose backend sees them as they are; itself it sees as its node."""
    at = Server(address(service, family), PORT, kind)
    for place, pod in enumerate(it.pods):
        seen = it.hosts[place] if place == service else pod
        assert converse(pod.netns, at) == {seen.addresses[family]}, pod.name


@families
@kinds
@behind
def test_from_nodes(it: Mesh, service: int, family: int, kind: socket.SocketKind) -> None:
    """Nodes reach a service by its cluster address, as themselves."""
    at = Server(address(service, family), PORT, kind)
    for host in it.hosts:
        assert converse(host.netns, at) == {host.addresses[family]}, host.name


@families
@kinds
@behind
def test_node_port(it: Mesh, service: int, family: int, kind: socket.SocketKind) -> None:
    """Whoever asks at a NodePort of any node is answered, and seen as that node: the world, pods and other nodes."""
    for host in it.hosts:
        at = Server(host.addresses[family], node_port(service), kind)
        for asker in (it.world, *it.pods, *it.hosts):
            if asker is not host:
                assert converse(asker.netns, at) == {host.addresses[family]}, f"{asker.name} → {host.name}"


@families
@kinds
def test_backends_everywhere(it: Mesh, family: int, kind: socket.SocketKind) -> None:
    """Connections to one service go to backends on all nodes, and each stays with its own."""
    asker = it.pods[FIRST]
    servers = [it.servers[pod.addresses[family], kind] for pod in it.pods]
    before = [len(each.peers) for each in servers]
    with ExitStack() as stack:
        at = Server(address(ALL, family), PORT, kind)
        clients = [stack.enter_context(client(asker.netns, at)) for _ in range(40)]
        first = [each.ask() for each in clients]
        assert [each.ask() for each in clients] == first
    grown = [len(each.peers) - then for each, then in zip(servers, before, strict=True)]
    assert all(grown), grown


@families
@kinds
@pytest.mark.parametrize("there", [SECOND, FAR])
def test_direct_beside_service(it: Mesh, there: int, family: int, kind: socket.SocketKind) -> None:
    """A pod that talks to another by a service and directly at the same time is answered each way by the same way."""
    asker, asked = it.pods[FIRST], it.pods[there]
    by_service = Server(address(there, family), PORT, kind)
    with (
        client(asker.netns, by_service) as one,
        client(asker.netns, it.servers[asked.addresses[family], kind]) as other,
    ):
        for _ in range(3):
            assert one.ask()[0] == other.ask()[0] == asker.addresses[family]

"""Pods beside kube-proxy and host ports: whatever conntrack does to a flow, it also undoes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.node.cluster import (
    BACKEND_PORT,
    BOTH,
    FAR,
    HOST_PORTS,
    ITSELF,
    LOCAL,
    NEIGHBOUR,
    NODE,
    NODE_PORT,
    NODE_PORT_LOCAL,
    PORT,
    REMOTE,
    REMOTE_POD,
    V4,
    V6,
    WORLD,
    Cluster,
    address,
    converse,
    packets_at_rest,
)
from tests.node.echo import TCP, UDP, Client, Server, client, server, who
from tests.node.kubeproxy import Service, write_rules
from tests.node.machine import machine

families = pytest.mark.parametrize("family", [V4, V6])
kinds = pytest.mark.parametrize("kind", [TCP, UDP])


# Who a service's backend takes the asking pod for: conntrack hides it only where the answer would not come back.
SEEN: dict[int, Callable[[Cluster, int], str]] = {
    LOCAL: lambda it, family: it.asker.addresses[family],
    ITSELF: lambda _, family: NODE[family],
    REMOTE_POD: lambda it, family: it.asker.addresses[family],
    WORLD: lambda _, family: NODE[family],
}


@families
@kinds
@pytest.mark.parametrize("behind", [LOCAL, ITSELF, REMOTE_POD, WORLD])
def test_cluster_address(cluster: Cluster, behind: int, family: int, kind: socket.SocketKind) -> None:
    """A pod reaches a service whoever is behind it: another pod here, itself, a pod of another node, or the world."""
    at = Server(address(behind, family), PORT, kind)
    for _ in range(3):
        assert converse(cluster.asker.netns, at) == {SEEN[behind](cluster, family)}


@families
@kinds
def test_several_backends(cluster: Cluster, family: int, kind: socket.SocketKind) -> None:
    """Connections to one service go to all its backends, wherever they are; each stays with its own."""
    places = (cluster.backend.addresses[family], REMOTE[family])
    before = [cluster.asked(place, family, kind) for place in places]
    with ExitStack() as stack:
        at = Server(address(BOTH, family), PORT, kind)
        clients = [stack.enter_context(client(cluster.asker.netns, at)) for _ in range(40)]
        first = [each.ask() for each in clients]
        assert [each.ask() for each in clients] == first
    assert {address for address, _ in first} == {cluster.asker.addresses[family]}
    after = [cluster.asked(place, family, kind) for place in places]
    # TCP servers note a connection, UDP servers every question.
    assert sum(after) - sum(before) == (40 if kind == TCP else 80)
    assert all(now > then for now, then in zip(after, before, strict=True))


@families
@kinds
@pytest.mark.parametrize("behind", [LOCAL, ITSELF, REMOTE_POD])
def test_node_port(cluster: Cluster, behind: int, family: int, kind: socket.SocketKind) -> None:
    """A NodePort reaches its backends from outside under the node's address (externalTrafficPolicy: Cluster)."""
    at = Server(NODE[family], NODE_PORT[behind], kind)
    assert converse(cluster.node.world, at) == {NODE[family]}


@families
@kinds
def test_node_port_local(cluster: Cluster, family: int, kind: socket.SocketKind) -> None:
    """With externalTrafficPolicy: Local the backend sees the one who asks, who is answered by the NodePort."""
    at = Server(NODE[family], NODE_PORT_LOCAL, kind)
    assert converse(cluster.node.world, at) == {NEIGHBOUR[family]}


@families
@kinds
@pytest.mark.parametrize("port", HOST_PORTS)
def test_host_port(cluster: Cluster, family: int, kind: socket.SocketKind, port: int) -> None:
    """A host port reaches its pod from outside, and from other pods of the node, under the address of who asks."""
    at = Server(NODE[family], port, kind)
    assert converse(cluster.node.world, at) == {NEIGHBOUR[family]}
    assert converse(cluster.asker.netns, at) == {cluster.asker.addresses[family]}
    assert converse(cluster.backend.netns, at) == {NODE[family]}  # by itself


@families
@kinds
@pytest.mark.parametrize("where", ["cluster address", "NodePort"])
def test_from_inside(cluster: Cluster, family: int, kind: socket.SocketKind, where: str) -> None:
    """The node reaches a service by its cluster address, and a pod by a NodePort of its own node."""
    if where == "cluster address":
        assert converse(cluster.node.netns, Server(address(LOCAL, family), PORT, kind)) == {NODE[family]}
    else:
        at = Server(NODE[family], NODE_PORT[LOCAL], kind)
        assert converse(cluster.asker.netns, at) == {NODE[family]}


@families
@kinds
def test_direct_beside_service(cluster: Cluster, family: int, kind: socket.SocketKind) -> None:
    """A pod that talks to another by a service and directly at the same time is answered each way by the same way."""
    direct = cluster.servers[cluster.backend.addresses[family], family, kind]
    by_service = Server(address(LOCAL, family), PORT, kind)
    with client(cluster.asker.netns, by_service) as one, client(cluster.asker.netns, direct) as other:
        me = cluster.asker.addresses[family]
        before = cluster.node.packets()
        assert {one.ask()[0], other.ask()[0], one.ask()[0], other.ask()[0]} == {me}
        after = cluster.node.packets()
    assert after["fwd_local"] >= before["fwd_local"] + 4
    assert after["punt_reply"] >= before["punt_reply"] + 2


@families
@kinds
@pytest.mark.parametrize("behind", [LOCAL, REMOTE_POD])
def test_direct_after_service(cluster: Cluster, behind: int, family: int, kind: socket.SocketKind) -> None:
    """From a port that a pod has called a service from, it reaches the pod behind it directly: that is another flow."""
    there = (cluster.backend.addresses if behind == LOCAL else REMOTE)[family]
    me, port = who(cluster.asker.netns, Server(address(behind, family), PORT, kind))
    assert who(cluster.asker.netns, cluster.servers[there, family, kind], port=port)[0] == me


@families
@kinds
def test_bystanders(cluster: Cluster, family: int, kind: socket.SocketKind) -> None:
    """Pods that no service has ever touched keep the fast path to each other and to the world."""
    one, other = cluster.bystanders
    with server(other.netns, kind, other.addresses[family], 7) as near:
        before = packets_at_rest(cluster.node)
        assert converse(one.netns, near) == {one.addresses[family]}
        assert converse(one.netns, cluster.servers[FAR[family], family, kind]) == {NODE[family]}
        after = cluster.node.packets()
    grown = {name: after[name] - before[name] for name in after}
    assert grown["fwd_local"] >= 6
    assert grown["fwd_uplink"] >= 3
    assert grown["punt_reply"] == grown["punt_host"] == 0


@families
@kinds
def test_flows_outlive_the_agent(cluster: Cluster, family: int, kind: socket.SocketKind) -> None:
    """Flows to services, NodePorts and host ports go on while the agent is dead and after it is back; new ones work."""
    inside = [Server(address(each, family), PORT, kind) for each in (LOCAL, ITSELF, REMOTE_POD, WORLD)]
    outside = [Server(NODE[family], port, kind) for port in (NODE_PORT[LOCAL], NODE_PORT_LOCAL, *HOST_PORTS)]
    with ExitStack() as stack:

        def opened() -> list[Client]:
            return [
                stack.enter_context(client(netns, each))
                for netns, servers in ((cluster.asker.netns, inside), (cluster.node.world, outside))
                for each in servers
            ]

        old = opened()
        first = [each.ask() for each in old]
        cluster.node.kill_agent()
        assert [each.ask() for each in old] == first
        fresh = [each.ask()[0] for each in opened()]
        assert fresh == [address for address, _ in first]
        cluster.node.start_agent()
        assert [each.ask() for each in old] == first
        assert [each.ask()[0] for each in opened()] == fresh


@pytest.mark.parametrize("everything", [False, True])
def test_other_services(tmp_path: Path, *, everything: bool) -> None:
    """Services of other addresses work once they are configured, or with all that leaves going through the stack."""
    masquerade = {"stack_routes": True} if everything else {"service_cidrs": ["172.30.0.0/16"]}
    with machine(tmp_path, masquerade=masquerade) as node:
        world = node.add_world()
        node.start_agent()
        asker, backend = node.make_pod("asker"), node.make_pod("backend")
        write_rules(node.netns, [Service("172.30.1.2", PORT, [backend.addresses[V4]], BACKEND_PORT)])
        for kind in (TCP, UDP):
            with server(backend.netns, kind, backend.addresses[V4], BACKEND_PORT):
                assert converse(asker.netns, Server("172.30.1.2", PORT, kind)) == {asker.addresses[V4]}
            with server(world, kind, FAR[V4], 7) as far:
                assert who(asker.netns, far)[0] == NODE[V4]
        assert (node.packets()["fwd_uplink"] == 0) == everything

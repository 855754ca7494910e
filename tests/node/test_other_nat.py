"""podlane beside others who translate addresses on the node: iptables for services, for host ports, for containers."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.node.cluster import (
    FAR,
    HOST_PORTS,
    LOCAL,
    NEIGHBOUR,
    NODE,
    NODE_PORT,
    NODE_PORT_LOCAL,
    PORT,
    V4,
    V6,
    WORLD,
    Cluster,
    address,
    converse,
    packets_at_rest,
)
from tests.node.echo import TCP, UDP, Client, Server, client
from tests.node.internet import join
from tests.node.kubeproxy import CLUSTER
from tests.node.machine import Machine, Netns

families = pytest.mark.parametrize("family", [V4, V6])
kinds = pytest.mark.parametrize("kind", [TCP, UDP])


@families
@kinds
@pytest.mark.parametrize("port", [NODE_PORT[LOCAL], NODE_PORT_LOCAL, *HOST_PORTS])
def test_pod_uses_the_same_port(cluster: Cluster, family: int, kind: socket.SocketKind, port: int) -> None:
    """A pod's flow from a port that on the node is a NodePort, or a host port, gets its answers, and the service its.

    cilium#16827, #33723: NodePorts, #34041: host ports got answers that were masqueraded flows'.
    """
    far = cluster.servers[FAR[family], family, kind]
    with client(cluster.bystanders[0].netns, far, port=port) as it:
        first = it.ask()
        assert first[0] == NODE[family]
        for _ in range(3):
            assert converse(cluster.node.world, Server(NODE[family], port, kind)) <= {NODE[family], NEIGHBOUR[family]}
            assert it.ask() == first


@contextmanager
def masquerading(node: Machine, family: int, source: str) -> Iterator[None]:
    """Let iptables masquerade what comes from a prefix, as Docker, Flannel and others do, beside podlane."""
    rule = ("POSTROUTING", "-s", source, "-o", "uplink", "-j", "MASQUERADE")
    tool = ("iptables", "ip6tables")[family]
    node.netns.run(tool, "-t", "nat", "-A", *rule)
    try:
        yield
    finally:
        node.netns.run(tool, "-t", "nat", "-D", *rule)


@families
@kinds
def test_masqueraded_once(cluster: Cluster, family: int, kind: socket.SocketKind) -> None:
    """Where iptables masquerades pods as well, each of their flows is masqueraded once, by who comes first.

    cilium#36631: twice, and each such flow took a port.
    """
    one, _ = cluster.bystanders
    with masquerading(cluster.node, family, CLUSTER[family]):
        before = packets_at_rest(cluster.node)
        assert converse(one.netns, cluster.servers[FAR[family], family, kind]) == {NODE[family]}
        between = packets_at_rest(cluster.node)
        assert converse(cluster.asker.netns, Server(address(WORLD, family), PORT, kind)) == {NODE[family]}
        after = packets_at_rest(cluster.node)
    assert between["masq_out"] >= before["masq_out"] + 3
    assert between["fwd_uplink"] >= before["fwd_uplink"] + 3
    assert after["masq_out"] == between["masq_out"]


@pytest.fixture(scope="module")
def container(cluster: Cluster) -> Netns:
    """Make a container of another network on the node, which iptables masquerades."""
    it = cluster.node.add_netns("container")
    node = ("172.17.0.1/24", "fd17::1/64")
    join(cluster.node.netns, it, "docker", node, ("172.17.0.2/24", "fd17::2/64"))
    for each in node:
        it.run("ip", "route", "add", "default", "via", each.partition("/")[0])
    return it


@families
@kinds
@pytest.mark.parametrize("pod_first", [False, True])
def test_port_of_the_kernels_own_nat(
    cluster: Cluster, container: Netns, family: int, kind: socket.SocketKind, *, pod_first: bool
) -> None:
    """A port that iptables has given to a flow of somebody else's is that flow's, whoever came first.

    cilium#30858: neither knew what the other one had given away.
    """
    far, port = cluster.servers[FAR[family], family, kind], 50100 + pod_first
    pod = cluster.bystanders[0].netns
    with masquerading(cluster.node, family, ("172.17.0.0/24", "fd17::/64")[family]), ExitStack() as stack:

        def theirs() -> Client:
            it = stack.enter_context(client(container, far, port=port))
            assert it.ask() == (NODE[family], port)
            return it

        other = None if pod_first else theirs()
        ours = stack.enter_context(client(pod, far, port=port))
        seen = ours.ask()
        other = other or theirs()
        assert other.ask() == (NODE[family], port)
        if pod_first:
            assert seen == (NODE[family], port)
        if pod_first and kind == TCP:
            with pytest.raises(ConnectionResetError):  # the server knows no such connection any more
                ours.ask()
        else:
            assert ours.ask()[1] != port
        assert {other.ask() for _ in range(3)} == {(NODE[family], port)}

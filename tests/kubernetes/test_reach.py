"""Who reaches whom: pods, nodes and services, of one node and across nodes."""

from __future__ import annotations

import pytest

from tests.kubernetes.cluster import Cluster, Document, service
from tests.kubernetes.reach import meet, pods

pytestmark = pytest.mark.timeout(600)  # for clusters that are slower than the tests' own

_LARGE = 64 << 20  # bytes


@pytest.mark.parametrize("kind", ["tcp", "udp", "ping"])
def test_pods_reach_pods(cluster: Cluster, kind: str) -> None:
    """Each pod reaches each other one, on its node and on all others, and is seen under its own address."""
    everybody = pods(cluster)
    assert meet(cluster, everybody, everybody, kind) == []


@pytest.mark.parametrize("kind", ["tcp", "udp", "ping"])
def test_nodes_reach_pods(cluster: Cluster, kind: str) -> None:
    """What runs in a node's own network reaches each pod, there and on other nodes."""
    assert meet(cluster, cluster.peers("host"), pods(cluster), kind) == []


@pytest.mark.parametrize("kind", ["tcp", "udp", "ping"])
def test_pods_reach_nodes(cluster: Cluster, kind: str) -> None:
    """Each pod reaches each node's address, its own node's too, and is seen under its own: nothing is masqueraded."""
    assert meet(cluster, pods(cluster), cluster.peers("host"), kind) == []


def test_nodes_reach_nodes(cluster: Cluster) -> None:
    """What runs in the nodes' own networks finds its peers, as ever."""
    hosts = cluster.peers("host")
    assert meet(cluster, hosts, hosts, "tcp") == []


def test_large_transfers(cluster: Cluster) -> None:
    """64 MB arrive whole: from each pod of the own node and of another one, and from a node."""
    asker = cluster.peers("one")[0]
    requests = [{**peer.target("bytes"), "count": _LARGE} for peer in (*cluster.peers("other"), *cluster.peers("host"))]
    answers = cluster.ask(asker, requests)
    assert [answer.get("bytes", answer) for answer in answers] == [_LARGE] * len(requests)


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_cluster_ip(cluster: Cluster, kind: str) -> None:
    """A service's address leads pods and nodes to its pods, on all nodes."""
    address = cluster.get("-n", cluster.namespace, "service", "one")["spec"]["clusterIP"]
    names = {peer.name for peer in cluster.peers("one")}
    for asker in (*pods(cluster), *cluster.peers("host")):
        answers = cluster.ask(asker, [{"kind": kind, "address": address, "port": 80}] * 20)
        assert {answer.get("name", str(answer)) for answer in answers} == names, asker


@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_node_port(cluster: Cluster, kind: str) -> None:
    """A service's port on any node's address leads to its pods: for other nodes, for pods, and on the node itself."""
    ports = cluster.get("-n", cluster.namespace, "service", "one")["spec"]["ports"]
    port = next(each["nodePort"] for each in ports if each["name"] == kind)
    names = {peer.name for peer in cluster.peers("one")}
    hosts = cluster.peers("host")
    for asker in (*pods(cluster), *hosts):
        requests = [{"kind": kind, "address": host.address, "port": port} for host in hosts for _ in range(10)]
        answers = cluster.ask(asker, requests)
        assert {answer.get("name", str(answer)) for answer in answers} <= names, asker


def test_hairpin(cluster: Cluster) -> None:
    """A pod reaches itself by the address of a service that nobody else stands behind."""
    namespace, peer = cluster.namespace, cluster.peers("one")[0]
    cluster.kubectl("-n", namespace, "label", "pod", peer.name, "alone=yes")
    cluster.apply(service(namespace, "alone", {"alone": "yes"}, kind="ClusterIP"))
    address = cluster.get("-n", namespace, "service", "alone")["spec"]["clusterIP"]

    def answers() -> list[Document]:
        return cluster.ask(peer, [{"kind": "tcp", "address": address, "port": 80}])

    cluster.wait(lambda: answers()[0].get("name") == peer.name, "the service's rules", 60)
    assert [answer.get("name") for answer in cluster.ask(peer, [{"kind": "tcp", "address": address, "port": 80}] * 10)]

"""Peers that watch others while something is done to the cluster, which they must not feel."""

from __future__ import annotations

from collections.abc import Collection

from tests.kubernetes.cluster import Cluster, Document, Peer


def watch(cluster: Cluster, nodes: Collection[str] | None = None) -> None:
    """Have peers watch all pods and a service; or only the pods of some nodes, from there.

    Those who watch are a pod on each node, and one in the node's network.
    """
    requests: list[Document] = [peer.target("watch") for peer in _of(nodes, cluster.peers("other"))]
    if nodes is None:
        address = cluster.get("-n", cluster.namespace, "service", "one")["spec"]["clusterIP"]
        requests.append({"kind": "watch", "address": address, "port": 80})
    for asker in _askers(cluster, nodes):
        cluster.ask(asker, requests)


def assert_undisturbed(cluster: Cluster, nodes: Collection[str] | None = None, *, at_least: int = 20) -> None:
    """End what `watch` began: nothing may have gone wrong, and this much of everything must have gone well."""
    for asker in _askers(cluster, nodes):
        (report,) = cluster.ask(asker, [{"kind": "report"}])
        assert report["watches"], asker
        for seen in report["watches"]:
            assert seen["faults"] == [], (asker, seen)
            assert min(seen["lines"], seen["asked"], seen["datagrams"]) > at_least, (asker, seen)


def _askers(cluster: Cluster, nodes: Collection[str] | None) -> list[Peer]:
    return _of(nodes, [*cluster.peers("one"), *cluster.peers("host")])


def _of(nodes: Collection[str] | None, peers: list[Peer]) -> list[Peer]:
    return [peer for peer in peers if nodes is None or peer.node in nodes]

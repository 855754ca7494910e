"""Everybody asks everybody else."""

from __future__ import annotations

from collections.abc import Sequence

from tests.kubernetes.cluster import Cluster, Document, Peer, pod


def pods(cluster: Cluster) -> list[Peer]:
    """Return all pods that have an address of their own."""
    return [*cluster.peers("one"), *cluster.peers("other")]


def meet(cluster: Cluster, askers: Sequence[Peer], asked: Sequence[Peer], kind: str) -> list[Document]:
    """Have everybody ask everybody else; return what went wrong, and who was seen under a name not its own."""
    wrong = []
    for asker in askers:
        others = [peer for peer in asked if peer != asker]
        for peer, answer in zip(others, cluster.ask(asker, [peer.target(kind) for peer in others]), strict=True):
            wanted = {"client": peer.address} if kind == "ping" else _expected(asker, peer)
            if wanted != {key: answer.get(key) for key in wanted}:
                wrong.append({"asker": asker, "asked": peer, "kind": kind, "answer": answer, "wanted": wanted})
    return wrong


def _expected(asker: Peer, asked: Peer) -> Document:
    """Return the right answer. A pod is seen under its own address; what a node is seen under depends on the way."""
    name = asked.node if asked.app == "host" else asked.name
    return {"name": name} if asker.app == "host" else {"name": name, "client": asker.address}


def assert_converged(cluster: Cluster) -> None:
    """All is as it should be again: a new pod starts on each node, and old and new ones reach each other."""
    cluster.wait_rolled_out()
    cluster.wait_peers()
    nodes = [peer.node for peer in cluster.peers("host")]
    started = []
    try:
        for node in nodes:
            started.append(cluster.start(pod(cluster.namespace, f"new-{node}", cluster.image, node)))
        everybody = [*pods(cluster), *started]
        assert meet(cluster, everybody, everybody, "tcp") == []
        assert meet(cluster, started, everybody, "udp") == []
        assert meet(cluster, cluster.peers("host"), everybody, "tcp") == []
    finally:
        for peer in started:
            cluster.end(peer)

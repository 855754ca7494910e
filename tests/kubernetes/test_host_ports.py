"""A pod's `hostPort`: who reaches it by its node's address, and that it goes with the pod."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from tests.kubernetes.cluster import PORT, Cluster, Document, Peer, pod

pytestmark = pytest.mark.timeout(600)  # for clusters that are slower than the tests' own

_HOST_PORT = 18090
_KINDS = ("tcp", "udp")


@pytest.fixture(scope="module")
def server(cluster: Cluster) -> Iterator[Peer]:
    """Start a pod with a host port for TCP and UDP."""
    server = _start(cluster, "server")
    yield server
    cluster.end(server)


def _start(cluster: Cluster, app: str) -> Peer:
    node = cluster.peers("host")[0].node
    document = pod(cluster.namespace, app, cluster.image, node)
    ports = [{"containerPort": PORT, "hostPort": _HOST_PORT, "protocol": kind.upper()} for kind in _KINDS]
    document["spec"]["containers"][0]["ports"] = ports
    return cluster.start(document)


def _answers(cluster: Cluster, asker: Peer) -> list[Document]:
    """Have somebody ask the host port, by each protocol."""
    address = cluster.peers("host")[0].address
    return cluster.ask(asker, [{"kind": kind, "address": address, "port": _HOST_PORT} for kind in _KINDS])


def _is_silent(cluster: Cluster, asker: Peer) -> bool:
    return all("error" in answer for answer in _answers(cluster, asker))


def test_pods(cluster: Cluster, server: Peer) -> None:
    """Each pod, on the same node and on others, reaches the pod by its host port, and is seen under its own address."""
    for asker in (*cluster.peers("one"), *cluster.peers("other")):
        assert _answers(cluster, asker) == [{"name": server.name, "client": asker.address}] * len(_KINDS), asker


def test_nodes(cluster: Cluster, server: Peer) -> None:
    """So does what runs in the network of a node: of the same one, where no packet comes in, and of others."""
    for asker in cluster.peers("host"):
        answers = _answers(cluster, asker)
        assert [answer.get("name", answer) for answer in answers] == [server.name] * len(_KINDS), asker


def test_it_goes_with_the_pod(cluster: Cluster, server: Peer) -> None:
    """Without the pod nobody answers at its host port; the next one that wants it has it."""
    askers = [cluster.peers("host")[0], cluster.peers("one")[-1]]
    cluster.end(server)
    for asker in askers:
        cluster.wait(partial(_is_silent, cluster, asker), "the port's end", 30)
    successor = _start(cluster, "successor")
    try:
        for asker in askers:
            assert [answer.get("name", answer) for answer in _answers(cluster, asker)] == ["successor"] * len(_KINDS)
    finally:
        cluster.end(successor)

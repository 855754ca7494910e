"""Pods, nodes and the world of a cluster, in every lane: who reaches whom, and as whom everybody is seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.node.mesh import Mesh, mesh
from tests.node.nodes import BOTH, PLACES, V6, nodes

KINDS = {"direct": BOTH, "vxlan": BOTH, "auto": BOTH, "vxlan by IPv6": (V6,), "auto by IPv6": (V6,)}
"""Of cluster: the routing, and the families of the nodes' own addresses. Pods always have both."""


@pytest.fixture(scope="module", params=KINDS)
def it(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Yield a cluster of each kind. Only with `direct` does the router know the way to pods."""
    routing = request.param.split()[0]
    with (
        nodes(tmp_path_factory.mktemp("mesh"), KINDS[request.param], routing=routing) as made,
        ExitStack() as stack,
    ):
        if routing == "direct":
            stack.enter_context(made.router_knows_pods(*PLACES))
        yield stack.enter_context(mesh(made))


def test_pod_to_pod(it: Mesh) -> None:
    """Every pod reaches every other one, which sees the address that the asking pod has."""
    it.check((asker, asked, asker) for asker in it.pods for asked in it.pods if asker is not asked)


def test_node_to_pod(it: Mesh) -> None:
    """Every node reaches every pod, which sees the node's address."""
    it.check((host, pod, host) for host in it.hosts for pod in it.pods)


def test_pod_to_node(it: Mesh) -> None:
    """Every pod reaches every node, which sees the pod's own address: within the cluster nothing is masqueraded."""
    it.check((pod, host, pod) for pod in it.pods for host in it.hosts)


def test_node_to_node(it: Mesh) -> None:
    """Nodes reach each other under their own addresses, as without podlane."""
    it.check((asker, asked, asker) for asker in it.hosts for asked in it.hosts if asker is not asked)


def test_pod_to_world(it: Mesh) -> None:
    """Pods of every node reach the world, which sees their node."""
    it.check((pod, it.world, host) for pod, host in zip(it.pods, it.hosts, strict=True))


def test_world_to_pod(it: Mesh) -> None:
    """Where the network knows the way to pods, the world reaches them by their own addresses, and is seen as itself."""
    with it.nodes.router_knows_pods(*PLACES):
        it.check((it.world, pod, it.world) for pod in it.pods)

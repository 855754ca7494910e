"""Fixtures of the node tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.kubernetes import Api
from tests.node.api.followers import Following, numbered
from tests.node.api.server import ApiServer
from tests.node.cluster import Cluster, made_cluster
from tests.node.contract import Container, container
from tests.node.internet import Internet
from tests.node.machine import Machine, machine


@pytest.fixture(scope="module")
def shared_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Yield a node with an uplink and a ready agent, for tests that leave it as they found it."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture(scope="module")
def clean_node(shared_node: Machine) -> Iterator[Machine]:
    """Yield such a node; in the end there must be nothing on it."""
    yield shared_node
    assert not any(shared_node.traces().values())


@pytest.fixture
def it(node: Machine) -> Iterator[Container]:
    """Yield a container without interfaces on the test's node."""
    with container(node) as made:
        yield made


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Machine]:
    """Yield a node with an uplink and a ready agent."""
    with machine(tmp_path) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture(scope="module")
def internet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Internet]:
    """Yield routers and a world behind a node's uplink; its agent is ready."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        made = Internet.behind(it)
        it.start_agent()
        yield made


@pytest.fixture(scope="module")
def routed_node(internet: Internet) -> Machine:
    """Return the node that the internet is behind."""
    return internet.node


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Yield a node with services and host ports, for tests that leave it as they found it."""
    with made_cluster(tmp_path_factory.mktemp("node")) as it:
        yield it


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ApiServer]:
    """Serve three nodes by a Kubernetes API."""
    it = ApiServer(tmp_path)
    it.objects.put(*(numbered(number) for number in range(3)))
    it.start()
    yield it
    it.stop()


@pytest.fixture
def following(server: ApiServer) -> Iterator[Following]:
    """Follow these nodes, with a kubeconfig; the watch has begun."""
    kubeconfig = server.write_kubeconfig()
    it = Following(lambda: Api(kubeconfig))
    it.wait_until_known("node-000", "node-001", "node-002")
    it.wait_for(lambda: server.watches == 1, "a watch")
    yield it
    it.source.stop()

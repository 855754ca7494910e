"""DEL as a runtime sees it: it takes everything away, whatever is gone already, and succeeds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial

import pytest

from tests.node.machine import Machine, Netns, machine
from tests.node.verbs import add, assert_refused, delete, traces


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture
def netns() -> Iterator[Netns]:
    """Make a network namespace for a container."""
    it = Netns("verbs")
    yield it
    it.delete()


def test_delete_is_idempotent(node: Machine, netns: Netns) -> None:
    """DEL succeeds again and again, also for a container that never was."""
    before = traces(node)
    delete(node, netns)
    add(node, netns)
    for _ in range(3):
        delete(node, netns)
    assert traces(node) == before


@pytest.mark.parametrize("path", ["", "/run/netns/plt-there-is-no-such", __file__, "/proc/self/ns/uts"])
def test_delete_without_namespace(node: Machine, netns: Netns, path: str) -> None:
    """DEL needs no namespace: with CNI_NETNS empty, dangling or something else it still takes everything away."""
    before = traces(node)
    add(node, netns)
    netns.delete()
    outcome = node.cni("DEL", container_id=netns.name, netns=path)
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert traces(node) == before


def test_delete_with_foreign_things(node: Machine, netns: Netns) -> None:
    """DEL goes by container id and interface: a namespace and a prevResult of others are not looked at, nor harmed."""
    other = node.make_pod("other")
    before = traces(node)
    add(node, netns)
    config = {"prevResult": {**other.result, "ips": []}}
    done = node.cni("DEL", container_id=netns.name, netns=str(other.netns.path), config=config)
    assert (done.exit_code, done.stdout) == (0, "")
    assert traces(node) == before
    node.netns.run("ping", "-c", "1", "-W", "2", other.addresses[0])
    node.delete_pod(other)


def test_delete_after_a_failed_add(node: Machine, netns: Netns) -> None:
    """DEL succeeds after an ADD that failed, without a prevResult; what the ADD had begun is gone already."""
    before = traces(node)
    config = {"ipam": {"type": "podlane", "subnet": "10.77.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}}
    netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    assert_refused(add(node, netns, **config), 102, "eth0")
    assert traces(node) == before
    delete(node, netns, **config)


def test_delete_of_an_add_that_the_agent_never_saw(node: Machine, netns: Netns) -> None:
    """When ADD and DEL have both given up on an agent that hangs, it does the DEL once it goes on, and no ADD."""
    assert node.agent is not None
    before = traces(node)
    env = {"PODLANE_TIMEOUT_MS": "200"}
    call = partial(node.cni, container_id=netns.name, netns=str(netns.path), env=env)
    os.kill(node.agent.pid, signal.SIGSTOP)
    try:
        assert_refused(call("ADD"), 11)
        assert call("DEL").exit_code == 0
    finally:
        os.kill(node.agent.pid, signal.SIGCONT)
    node.wait_for(lambda: "ADD comes too late" in node.log_tail(), "the ADD to be left undone")
    node.wait_for(lambda: traces(node) == before, "the spooled DEL to be done")

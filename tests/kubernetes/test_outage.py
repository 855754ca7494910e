"""The API server is away for minutes. One outage is for all of these tests."""

from __future__ import annotations

import time
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

import pytest

from tests.kubernetes.caller import Caller
from tests.kubernetes.cluster import Cluster, Document
from tests.kubernetes.reach import assert_converged
from tests.kubernetes.static import StaticPods, asker
from tests.kubernetes.watching import assert_undisturbed, watch

pytestmark = pytest.mark.timeout(900)

_SECONDS = 150  # longer than a node's lease, its grace period, and all that waits for an answer
_LINES = 1000  # of the 3,000 that come in that time


@dataclass
class Outage:
    """What was seen of it."""

    before: list[dict[str, str]]
    """Each node's containers, by application."""
    requests: list[Document]
    told: list[Document]
    """What the pod that was started meanwhile got for an answer."""


@pytest.fixture(scope="module")
def outage(cluster: Cluster, caller: Caller) -> Outage:
    """Stop the API server, start a pod without it, and start it again."""
    caller.need("API_STOP", "API_START", "NODE_SHELL")
    node = cluster.worker()
    static = StaticPods(cluster, caller, node)
    requests = [peer.target(kind) for peer in cluster.peers("one") + cluster.peers("host") for kind in ("tcp", "udp")]
    seen = Outage(_containers(cluster), requests, [])
    pod = asker(cluster, "amid-outage", requests)
    watch(cluster)
    with caller.without_api(cluster):
        begin = time.monotonic()
        with static.started(pod):
            cluster.wait(lambda: static.printed(pod), "a pod that starts without the API server")
            seen.told = static.printed(pod)
        time.sleep(max(0.0, begin + _SECONDS - time.monotonic()))
    return seen


def _containers(cluster: Cluster) -> list[dict[str, str]]:
    return [cluster.containers(peer.node) for peer in cluster.peers("host")]


def test_a_pod_starts(cluster: Cluster, outage: Outage) -> None:
    """A pod that a kubelet starts by itself gets an address of its node's and reaches pods and nodes, all of them."""
    assert [answer for answer in outage.told if "error" in answer] == []
    assert len(outage.told) == len(outage.requests)
    ranges = cluster.get("node", cluster.worker())["spec"]["podCIDRs"]
    (address,) = {answer["client"] for answer in outage.told}
    assert any(ip_address(address) in ip_network(each) for each in ranges)


@pytest.mark.usefixtures("outage")
def test_nobody_is_disturbed(cluster: Cluster) -> None:
    """Between pods, nodes and services nothing is lost: no connection, old or new, and no datagram."""
    assert_undisturbed(cluster, at_least=_LINES)


def test_no_agent_has_ended(cluster: Cluster, outage: Outage) -> None:
    """Agents and pods are those of before, in the same containers."""
    assert _containers(cluster) == outage.before


@pytest.mark.usefixtures("outage")
def test_afterwards_all_is_well(cluster: Cluster) -> None:
    """When it is back, pods start on every node, and everybody reaches everybody."""
    assert_converged(cluster)

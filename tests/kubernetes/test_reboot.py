"""A node ends as if its power were cut, and comes back with what is on its disk."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from tests.kubernetes.caller import Caller
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.reach import assert_converged
from tests.kubernetes.static import StaticPods, agent, asker
from tests.kubernetes.watching import assert_undisturbed, watch

pytestmark = pytest.mark.timeout(900)


def test_a_node_reboots(cluster: Cluster, caller: Caller) -> None:
    """Its pods get links and addresses anew, and are reached again; pods of other nodes feel nothing of it."""
    caller.need("NODE_STOP", "NODE_START")
    node = cluster.worker()
    before, others = cluster.containers(node), _others(cluster, node)
    watch(cluster, others)
    caller.run("NODE_STOP", node=node)
    caller.run("NODE_START", node=node)
    cluster.wait_restarted(node, before)
    assert_converged(cluster)
    assert_undisturbed(cluster, others)


def test_a_node_reboots_without_the_api(cluster: Cluster, caller: Caller) -> None:
    """Its agent, once somebody starts it there, gives pods addresses of the node's old range, and they reach all.

    A kubelet that has just started knows nothing of DaemonSets until the API server answers; static pods it does start.
    """
    caller.need("API_STOP", "API_START", "NODE_STOP", "NODE_START", "NODE_SHELL")
    node = cluster.worker()
    static = StaticPods(cluster, caller, node)
    before, others = cluster.containers(node), _others(cluster, node)
    ranges = cluster.get("node", node)["spec"]["podCIDRs"]
    asked = [peer for peer in cluster.peers("one") + cluster.peers("host") if peer.node in others]
    pod = asker(cluster, "amid-reboot", [peer.target("tcp") for peer in asked])
    manifest, files = agent(cluster)
    watch(cluster, others)
    with caller.without_api(cluster):
        caller.run("NODE_STOP", node=node)
        caller.run("NODE_START", node=node)
        cluster.wait(static.is_possible, f"a shell on {node}")
        with static.started(manifest, files), static.started(pod):
            cluster.wait(lambda: static.printed(pod), "a pod on the rebooted node", 300)
            told = static.printed(pod)
    cluster.wait_restarted(node, before)
    assert_undisturbed(cluster, others)
    assert [answer.get("name") for answer in told] == [peer.node if peer.app == "host" else peer.name for peer in asked]
    (address,) = {answer["client"] for answer in told}
    assert any(ip_address(address) in ip_network(each) for each in ranges)
    assert_converged(cluster)


def _others(cluster: Cluster, node: str) -> set[str]:
    return {peer.node for peer in cluster.peers("host")} - {node}

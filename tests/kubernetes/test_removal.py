"""A node leaves the cluster for good; and one joins."""

from __future__ import annotations

from functools import partial
from ipaddress import ip_network

import pytest

from tests.kubernetes.caller import Caller
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.reach import assert_converged
from tests.kubernetes.remains import known_prefixes
from tests.kubernetes.watching import assert_undisturbed, watch

pytestmark = pytest.mark.timeout(900)


def test_a_node_goes_and_comes(cluster: Cluster, caller: Caller) -> None:
    """A node that is deleted is forgotten by all others, which talk on; as a new one it is one of them again."""
    caller.need("NODE_STOP", "NODE_START", "NODE_SHELL")
    node = cluster.worker()
    before, (*others,) = cluster.containers(node), (n for n in _names(cluster) if n != node)
    prefixes = _prefixes(cluster, node)
    for other in others:
        assert known_prefixes(caller, other) >= prefixes
    watch(cluster, others)
    caller.run("NODE_STOP", node=node)
    try:
        cluster.kubectl("delete", "node", node)
        for other in others:
            cluster.wait(partial(_has_forgotten, caller, other, prefixes), f"{other} to forget {node}")
        assert_undisturbed(cluster, others)
        watch(cluster, others)
    finally:
        caller.run("NODE_START", node=node)
    cluster.wait(lambda: node in _names(cluster), "the node's return")
    cluster.wait_restarted(node, before)
    assert_converged(cluster)
    assert_undisturbed(cluster, others)
    for other in others:
        assert known_prefixes(caller, other) >= _prefixes(cluster, node)


def _has_forgotten(caller: Caller, node: str, prefixes: set[str]) -> bool:
    return not known_prefixes(caller, node) & prefixes


def _names(cluster: Cluster) -> list[str]:
    return [node["metadata"]["name"] for node in cluster.get("nodes")["items"]]


def _prefixes(cluster: Cluster, node: str) -> set[str]:
    """Return what is a node's: its pod CIDRs, and its own addresses."""
    found = cluster.get("node", node)
    addresses = [each["address"] for each in found["status"]["addresses"] if each["type"] == "InternalIP"]
    return {str(ip_network(each)) for each in (*found["spec"]["podCIDRs"], *addresses)}

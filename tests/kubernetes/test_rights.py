"""The agent's rights in the cluster: each is needed, and one that is missing shows; none is lost for good."""

from __future__ import annotations

import copy
import json

import pytest

from tests.kubernetes.cluster import SYSTEM, Cluster, Document

pytestmark = pytest.mark.timeout(600)

_TAINT = "podlane.io/agent-not-ready"


@pytest.mark.parametrize(
    ("verb", "resource"), [("list", "nodes"), ("watch", "nodes"), ("patch", "nodes"), ("patch", "nodes/status")]
)
def test_a_missing_right_shows(cluster: Cluster, verb: str, resource: str) -> None:
    """Without a right, the agent says that it was forbidden something; with it again, it makes up for it by itself."""
    rules = cluster.get("clusterrole", "podlane")["rules"]
    node = cluster.podlane_pods()[0]["spec"]["nodeName"]
    _set_rules(cluster, _without(rules, verb, resource))
    try:
        if resource == "nodes/status":
            _claim_no_network(cluster, node)
        elif verb == "patch":
            cluster.kubectl("taint", "node", node, f"{_TAINT}=:NoSchedule")
        else:
            _restart_agent(cluster, node)
        cluster.wait(lambda: "forbidden" in _log(cluster, node), "the agent's complaint")
    finally:
        _set_rules(cluster, rules)
    cluster.wait(lambda: _is_well(cluster, node), "the agent to make up for it")


def _without(rules: list[Document], verb: str, resource: str) -> list[Document]:
    less = copy.deepcopy(rules)
    for rule in less:
        if rule["resources"] == [resource] and verb in rule["verbs"]:
            rule["verbs"].remove(verb)
    assert less != rules
    return [rule for rule in less if rule["verbs"]]


def _set_rules(cluster: Cluster, rules: list[Document]) -> None:
    cluster.kubectl("patch", "clusterrole", "podlane", "--type=merge", "-p", json.dumps({"rules": rules}))


def _claim_no_network(cluster: Cluster, node: str) -> None:
    found = cluster.get("node", node)
    del found["metadata"]["resourceVersion"]  # whatever the kubelet has reported meanwhile
    for condition in found["status"]["conditions"]:
        if condition["type"] == "NetworkUnavailable":
            condition.update(status="True", reason="Test")
    cluster.kubectl("replace", "--raw", f"/api/v1/nodes/{node}/status", "-f", "-", document=found)


def _restart_agent(cluster: Cluster, node: str) -> None:
    name = _agent(cluster, node)
    cluster.kubectl("-n", SYSTEM, "delete", "pod", name, "--grace-period=1")
    cluster.wait(lambda: _agent(cluster, node) not in ("", name), "another agent")


def _agent(cluster: Cluster, node: str) -> str:
    names = [each["metadata"]["name"] for each in cluster.podlane_pods() if each["spec"].get("nodeName") == node]
    return str(names[0]) if names else ""


def _log(cluster: Cluster, node: str) -> str:
    name = _agent(cluster, node)
    return cluster.kubectl("-n", SYSTEM, "logs", name, "-c", "agent", check=False) if name else ""


def _is_well(cluster: Cluster, node: str) -> bool:
    found = cluster.get("node", node)
    conditions = {each["type"]: each["status"] for each in found["status"]["conditions"]}
    taints = [taint["key"] for taint in found["spec"].get("taints", [])]
    last = _log(cluster, node).splitlines()
    told = [line for line in last if "cannot follow" in line or "following the cluster" in line]
    return conditions["NetworkUnavailable"] == "False" and _TAINT not in taints and "cannot follow" not in told[-1]

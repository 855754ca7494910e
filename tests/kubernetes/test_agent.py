"""The agent as a part of the cluster: what it tells, what it may do, and what its end does to others."""

from __future__ import annotations

import pytest

from tests.kubernetes.cluster import SYSTEM, Cluster
from tests.kubernetes.watching import assert_undisturbed, watch
from tests.manifests import FOLDER, find, render

pytestmark = pytest.mark.timeout(600)  # for clusters that are slower than the tests' own

_ACCOUNT = "system:serviceaccount:kube-system:podlane"
_MANY = 100


def test_nodes_are_ready(cluster: Cluster) -> None:
    """Every node is ready, its network is available because podlane says so, and the start-up taint is gone."""
    for node in cluster.get("nodes")["items"]:
        conditions = {each["type"]: each for each in node["status"]["conditions"]}
        assert conditions["Ready"]["status"] == "True"
        network = conditions["NetworkUnavailable"]
        assert (network["status"], network["reason"]) == ("False", "PodlaneIsUp")
        assert "podlane.io/agent-not-ready" not in [taint["key"] for taint in node["spec"].get("taints", [])]


def test_many_pods(cluster: Cluster) -> None:
    """A hundred pods start, each ready by a probe of its kubelet's and with an address of its node's podCIDR alone."""
    template = cluster.get("-n", cluster.namespace, "daemonset", "one")["spec"]["template"]
    template["metadata"]["labels"] = {"app": "many"}
    cluster.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "many", "namespace": cluster.namespace},
            "spec": {"replicas": _MANY, "selector": {"matchLabels": {"app": "many"}}, "template": template},
        }
    )
    status = ("-n", cluster.namespace, "rollout", "status", "deployment/many", "--timeout=400s")
    try:
        cluster.kubectl(*status, seconds=420)
        assert len({peer.address for peer in cluster.peers("many")}) == _MANY
    finally:
        cluster.kubectl("-n", cluster.namespace, "delete", "deployment", "many", "--wait=false")
    cluster.wait(lambda: not cluster.peers("many"), "the pods' end")


def test_an_agents_death_is_not_felt(cluster: Cluster) -> None:
    """Connections last, and new ones succeed, while an agent's pod is killed and another one takes over."""
    watch(cluster)
    (victim, *_) = cluster.podlane_pods()
    name = victim["metadata"]["name"]
    cluster.kubectl("-n", SYSTEM, "delete", "pod", name, "--grace-period=0", "--force")
    cluster.wait(lambda: name not in names(cluster), "the end of the old one")
    cluster.wait_rolled_out()
    assert_undisturbed(cluster)


def test_rolling_update_is_not_felt(cluster: Cluster) -> None:
    """Connections last, and new ones succeed, while all agents are replaced, one after the other."""
    before = names(cluster)
    watch(cluster)
    for daemonset in cluster.get("-n", SYSTEM, "daemonsets", "-l", "app.kubernetes.io/name=podlane")["items"]:
        cluster.kubectl("-n", SYSTEM, "rollout", "restart", f"daemonset/{daemonset['metadata']['name']}")
    cluster.wait_rolled_out()
    assert not names(cluster) & before
    assert_undisturbed(cluster)


def test_agents_complain_of_nothing(cluster: Cluster) -> None:
    """No agent was forbidden anything, or met with an error, after all of the above."""
    for pod in cluster.podlane_pods():
        log = cluster.kubectl("-n", SYSTEM, "logs", pod["metadata"]["name"])
        assert [line for line in log.splitlines() if "forbidden" in line or "level=error" in line] == []


def test_rights_are_those_of_the_manifest(cluster: Cluster) -> None:
    """The agent's account may do what the manifest grants, and neither read pods or secrets nor delete nodes."""
    granted = {
        (verb, resource)
        for rule in find(render(FOLDER / "base"), "ClusterRole")["rules"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    asked = {*granted, ("get", "nodes"), ("update", "nodes"), ("delete", "nodes"), ("list", "pods"), ("get", "secrets")}
    allowed = {pair for pair in asked if _may(cluster, *pair)}
    assert allowed == granted


def _may(cluster: Cluster, verb: str, resource: str) -> bool:
    return cluster.kubectl("auth", "can-i", verb, resource, f"--as={_ACCOUNT}", check=False).strip() == "yes"


def names(cluster: Cluster) -> set[str]:
    """Return the names of podlane's pods."""
    return {pod["metadata"]["name"] for pod in cluster.podlane_pods()}

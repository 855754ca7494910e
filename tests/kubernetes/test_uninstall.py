"""Podlane goes, and comes again, by the commands of README.md."""

from __future__ import annotations

import pytest

from tests.kubernetes import remains
from tests.kubernetes.caller import Caller
from tests.kubernetes.cluster import SYSTEM, Cluster, daemonset
from tests.kubernetes.reach import assert_converged
from tests.manifests import FOLDER, render

pytestmark = pytest.mark.timeout(900)

_UNINSTALL = "podlane-uninstall"
_APPS = ("one", "other")


def test_uninstall(cluster: Cluster, caller: Caller) -> None:
    """It refuses while pods are attached; then nothing is left on any node; and installed again it works as before."""
    caller.need("REINSTALL", "NODE_SHELL")
    assert _strangers(cluster) == [], "pods that are not the tests' would lose their network"
    image, kustomization = cluster.image, caller.value("REINSTALL")
    nodes = [peer.node for peer in cluster.peers("host")]
    settings = {node: remains.settings(caller, node) for node in nodes}
    assert all(remains.found(caller, node) for node in nodes)
    cluster.kubectl("delete", "-k", kustomization)
    try:
        _uninstall(cluster, image)
        left = {node: remains.found(caller, node) for node in nodes}
        assert left == {node: [] for node in nodes}
        for node, before in settings.items():
            assert remains.current(caller, node, [*before]) == before, node
    finally:
        cluster.kubectl("apply", "-k", kustomization)
    cluster.apply(*(daemonset(cluster.namespace, app, image) for app in _APPS))
    assert_converged(cluster)


def _strangers(cluster: Cluster) -> list[str]:
    return [
        pod["metadata"]["name"]
        for pod in cluster.get("pods", "--all-namespaces")["items"]
        if pod["metadata"]["namespace"] != cluster.namespace and not pod["spec"].get("hostNetwork")
    ]


def _uninstall(cluster: Cluster, image: str) -> None:
    """Take podlane from all nodes; the tests' pods go only when that has been refused for their sake."""
    manifests = render(FOLDER / "uninstall")
    for pod in (each["spec"]["template"]["spec"] for each in manifests):
        for container in (*pod["initContainers"], *pod["containers"]):
            container["image"] = image
    cluster.kubectl("apply", "-f", "-", document={"apiVersion": "v1", "kind": "List", "items": manifests})
    try:
        cluster.wait(lambda: "pods are attached" in _log(cluster), "a refusal")
        cluster.kubectl("-n", cluster.namespace, "delete", "daemonset", *_APPS, "--cascade=foreground")
        cluster.kubectl("-n", SYSTEM, "rollout", "status", f"daemonset/{_UNINSTALL}", "--timeout=240s", seconds=260)
    finally:
        cluster.kubectl("-n", SYSTEM, "delete", "daemonset", _UNINSTALL)


def _log(cluster: Cluster) -> str:
    selector = f"app.kubernetes.io/name={_UNINSTALL}"
    return cluster.kubectl("-n", SYSTEM, "logs", "-l", selector, "-c", "uninstall", check=False)

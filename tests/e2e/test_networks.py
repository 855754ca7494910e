"""containerd with configurations of a user's own: delegated addresses, a chain, a version that its libcni lacks.

Debian's containerd 1.6 has libcni 1.1.2. What it says is what a recording plugin in podlane's place passes on to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster_of_one import NODE_ADDRESSES, Cluster, cluster_of_one, fetch, fetch_command
from tests.e2e.cri import CriError

pytestmark = pytest.mark.root

_PLUGINS = Path("/usr/lib/cni")  # of Debian's containernetworking-plugins
_FIRST = "05-own.conflist"  # in lexical order before podlane's
_RECORDER = """#!/bin/sh
stdin=$(cat)
printf '%s\\n' "$CNI_COMMAND $CNI_ARGS $stdin" >> "$0.calls"
printf %s "$stdin" | exec "${0%recorder}podlane"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Make a cluster with containerd and agent; in the end nothing of its pods is left."""
    with cluster_of_one(tmp_path_factory.mktemp("networks")) as cluster:
        cluster.node.start_agent()
        for plugin in ("host-local", "portmap"):
            (cluster.node.directory / "bin" / plugin).symlink_to(_PLUGINS / plugin)
        recorder = cluster.node.directory / "bin" / "recorder"
        recorder.write_text(_RECORDER)
        recorder.chmod(0o755)
        cluster.start_runtime()
        cluster.runtime.wait_ready()
        yield cluster
        assert not any(cluster.node.traces().values())


@contextmanager
def network(cluster: Cluster, version: str, *plugins: Mapping[str, Any]) -> Iterator[None]:
    """Have containerd use another list for the time of the block: it loads whatever is renamed or removed."""
    file = cluster.node.directory / "conf" / _FIRST
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps({"cniVersion": version, "name": "own", "plugins": plugins}))
    draft.rename(file)
    cluster.node.wait_for(lambda: "own" in cluster.runtime.networks(), "containerd to load the configuration")
    yield
    file.unlink()
    cluster.node.wait_for(lambda: "podlane" in cluster.runtime.networks(), "containerd to load podlane's own again")


def test_host_local(cluster: Cluster, tmp_path: Path) -> None:
    """Pods have the addresses that host-local gives, reach each other by them, and host-local gets them back."""
    ranges = [[{"subnet": "10.50.0.0/24"}], [{"subnet": "fd50::/64"}]]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    ipam = {"type": "host-local", "dataDir": str(tmp_path), "ranges": ranges, "routes": routes}
    with network(cluster, "1.0.0", {"type": "podlane", "ipam": ipam}):
        pods = cluster.runtime.run_pods(2)
        held = {path.name for path in (tmp_path / "own").iterdir() if path.name[0].isdigit() or ":" in path.name}
        assert held == {ip for pod in pods for ip in pod.ips}
        assert held == {"10.50.0.2", "10.50.0.3", "fd50::2", "fd50::3"}
        for client, server in (pods, pods[::-1]):
            assert [fetch(client, ip) for ip in server.ips] == [server.name] * 2
        for pod in pods:
            pod.remove()
        assert {path.name for path in (tmp_path / "own").iterdir()} == {
            "last_reserved_ip.0",
            "last_reserved_ip.1",
            "lock",
        }
    assert not any(cluster.node.traces().values())


def test_chain_with_portmap(cluster: Cluster) -> None:
    """A pod's hostPort, by portmap behind podlane, leads world, node and other pods to the pod; it goes with it."""
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    with network(cluster, "1.0.0", {"type": "podlane"}, portmap):
        pod, client = cluster.runtime.run_pod("web", host_ports={8888: 8080}), cluster.runtime.run_pod("client")
        page = f"http://{NODE_ADDRESSES[0]}:8888/"
        command = [*fetch_command(NODE_ADDRESSES[0])[:-1], page]
        assert client.exec(command).stdout == "web\n"
        for netns in (cluster.world, cluster.node.netns):
            assert netns.run("busybox", *command).stdout == "web\n"
        for each in (pod, client):
            each.remove()
    assert "8888" not in cluster.node.netns.run("iptables-save").stdout
    assert not any(cluster.node.traces().values())


def test_own_host_ports(cluster: Cluster) -> None:
    """A pod's hostPort, by podlane's own configuration, leads world and pods to the pod; a second pod cannot have it.

    It goes with the pod, and then the second one can.
    """
    command = [*fetch_command(NODE_ADDRESSES[0])[:-1], f"http://{NODE_ADDRESSES[0]}:8888/"]
    pod, client = cluster.runtime.run_pod("web", host_ports={8888: 8080}), cluster.runtime.run_pod("client")
    for each in (client, pod):
        assert each.exec(command).stdout == "web\n"
    assert cluster.world.run("busybox", *command).stdout == "web\n"
    with pytest.raises(CriError, match=r"host port 0\.0\.0\.0:8888/tcp is in use by .*default/web"):
        cluster.runtime.run_pod("late", host_ports={8888: 8080})
    pod.remove()
    late = cluster.runtime.run_pod("late", host_ports={8888: 8080})
    assert client.exec(command).stdout == "late\n"
    for each in (late, client):
        each.remove()


def test_what_containerd_says(cluster: Cluster) -> None:
    """2.2: the Kubernetes pod's names come in CNI_ARGS and are in the store; no CHECK comes, and each DEL twice.

    The first DEL has what ADD printed as prevResult, the second, when libcni's cache is gone, has none.
    """
    with network(cluster, "1.0.0", {"type": "recorder"}):
        pod = cluster.runtime.run_pod("named")
        assert cluster.query_store("SELECT pod_name FROM attachment") == [("default/named",)]
        pod.remove()
    lines = (cluster.node.directory / "bin" / "recorder.calls").read_text().splitlines()
    calls = [line.split(" ", 2) for line in lines]
    configs = [json.loads(stdin) for _, _, stdin in calls]
    assert [command for command, _, _ in calls] == ["ADD", "DEL", "DEL"]
    assert sorted(calls[0][1].split(";"))[:4] == [
        "IgnoreUnknown=1",
        f"K8S_POD_INFRA_CONTAINER_ID={pod.id}",
        "K8S_POD_NAME=named",
        "K8S_POD_NAMESPACE=default",
    ]
    assert [config["cniVersion"] for config in configs] == ["1.0.0"] * 3
    printed = [
        [ip["address"].partition("/")[0] for ip in config.get("prevResult", {}).get("ips", [])] for config in configs
    ]
    assert printed == [[], pod.ips, []]


def test_too_new_for_this_libcni(cluster: Cluster) -> None:
    """2.1: a list of version 1.1.0 is refused by libcni 1.1.2, which cannot read the result; its DEL takes all away.

    The list that the agent installs is of version 1.0.0, and names the newer one as `cniVersions` for those that can.
    """
    with network(cluster, "1.1.0", {"type": "podlane"}):
        with pytest.raises(CriError, match=r'unsupported CNI result version "1\.1\.0"'):
            cluster.runtime.run_pod("early")
        assert not any(cluster.node.traces().values())
    pod = cluster.runtime.run_pod("late")
    assert cluster.fetch_from_node(pod.ips[0]) == "late"
    pod.remove()

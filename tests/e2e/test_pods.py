"""Fifty pods that a real containerd starts through podlane: who reaches whom, who is told what, and what remains.

All tests but the last find fifty pods and a ready agent, and leave them so.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from agent.config import Config
from agent.netlink.netns import is_netns
from tests.e2e.cluster_of_one import NODE_ADDRESSES, Cluster, cluster_of_one, fetch, url
from tests.e2e.containerd import ContainerdError, Pod
from tests.e2e.cri import CriError

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("pods")]

_PODS = 50
_PARALLEL = 4  # pods that fetch at a time
_FETCH_ALL_SECONDS = 60  # for one pod to fetch a hundred pages


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Make a cluster whose containerd runs before its agent, and becomes ready through it."""
    with cluster_of_one(tmp_path_factory.mktemp("pods")) as cluster:
        cluster.start_runtime()
        with pytest.raises(ContainerdError, match="cni plugin not initialized"):
            cluster.runtime.wait_ready(timeout=0)
        cluster.node.start_agent()
        cluster.runtime.wait_ready()
        yield cluster


@pytest.fixture(scope="module")
def pods(cluster: Cluster) -> list[Pod]:
    """Run fifty pods."""
    return cluster.runtime.run_pods(_PODS)


@contextmanager
def agent_away(cluster: Cluster) -> Iterator[None]:
    """Kill the agent; start it again after the block."""
    cluster.node.kill_agent()
    try:
        yield
    finally:
        cluster.node.start_agent()


def mistakes(clients: Sequence[Pod], servers: Sequence[Sequence[Pod]]) -> list[str]:
    """Let each client fetch the pages of its servers by all their addresses; return what was not as it should be."""

    def wrong_pages(client: Pod, others: Sequence[Pod]) -> list[str]:
        expected = {url(address): server.name for server in others for address in server.ips}
        script = f'for url in {" ".join(expected)}; do echo "$url $(wget -qO- $url 2>&1)"; done'
        output = client.exec(["sh", "-c", script], timeout=_FETCH_ALL_SECONDS).stdout
        seen = dict(line.split(" ", 1) for line in output.splitlines())
        return [f"{client.name}: {url}: {seen.get(url)}" for url, page in expected.items() if seen.get(url) != page]

    with ThreadPoolExecutor(_PARALLEL) as pool:
        return [mistake for found in pool.map(wrong_pages, clients, servers) for mistake in found]


def in_a_ring(pods: Sequence[Pod]) -> list[list[Pod]]:
    """Give each pod the next one as its server."""
    return [[pod] for pod in (*pods[1:], pods[0])]


def traces(cluster: Cluster) -> dict[str, list[str]]:
    """Return all that podlane has made for pods on the node, in a fixed order, once their programs have settled."""
    found = cluster.node.traces()

    def have_settled() -> bool:
        found.update(cluster.node.traces())
        return len(found["links"]) == 2 * len(found["devices"])

    cluster.node.wait_for(have_settled, "two links for every device")
    return {kind: sorted(lines) for kind, lines in found.items()}


def test_every_pod_reaches_every_other(cluster: Cluster, pods: list[Pod]) -> None:
    """Each of 50 pods gets the right page from each of the others by IPv4 and IPv6, all of it past the host stack."""
    before = cluster.node.packets()
    assert mistakes(pods, [[server for server in pods if server is not client] for client in pods]) == []
    grown = {name: count - before[name] for name, count in cluster.node.packets().items()}
    connections = 2 * _PODS * (_PODS - 1)
    assert grown["fwd_local"] > 6 * connections  # SYN, its answer, request, page, two FINs, some acknowledgements
    assert grown["punt_host"] == 0
    assert sum(count for name, count in grown.items() if name.startswith("drop_")) == 0


def test_addresses_are_those_of_the_store(cluster: Cluster, pods: list[Pod]) -> None:
    """CRI reports what podlane's store holds, IPv4 first and IPv6 as additional address, no address twice."""
    stored = {pod: list(map(str, addresses)) for pod, addresses in cluster.stored_addresses().items()}
    assert stored == {pod.id: pod.ips for pod in pods}
    ranges = [each.subnet for each in Config().ranges]
    assert [each.version for each in ranges] == [4, 6]
    assert all(ip_address(ip) in subnet for pod in pods for ip, subnet in zip(pod.ips, ranges, strict=True))
    assert len({ip for pod in pods for ip in pod.ips}) == 2 * _PODS


def test_node_reaches_pods(cluster: Cluster, pods: list[Pod]) -> None:
    """The node gets each pod's page by IPv4 and IPv6."""
    assert {ip: cluster.fetch_from_node(ip) for pod in pods for ip in pod.ips} == {
        ip: pod.name for pod in pods for ip in pod.ips
    }


@pytest.fixture
def node_page(cluster: Cluster, tmp_path: Path) -> Iterator[str]:
    """Let the node itself serve a page, where pods serve theirs."""
    (tmp_path / "index.html").write_text("the node\n")
    command = cluster.node.netns.command("busybox", "httpd", "-f", "-p", "8080", "-h", str(tmp_path))
    with subprocess.Popen(command) as server:
        try:
            listening = ["ss", "-Hltn", "sport = :8080"]
            cluster.node.wait_for(lambda: cluster.node.netns.run(*listening).stdout != "", "the node's web server")
            yield "the node"
        finally:
            server.terminate()


def test_pods_reach_node(pods: list[Pod], node_page: str) -> None:
    """Pods get the node's page by IPv4 and IPv6."""
    assert [fetch(pod, address) for pod in pods[:5] for address in NODE_ADDRESSES] == [node_page] * 10


def test_namespaces_are_containerds_own(cluster: Cluster, pods: list[Pod]) -> None:
    """The paths in CNI_NETNS lead nowhere in the agent's file system, as it is handed the open file; pods are wired."""
    assert cluster.node.agent
    rows = dict(cluster.query_store("SELECT container_id, netns_path FROM attachment"))
    for pod in pods:
        inside = Path(rows[pod.id])
        assert pod.netns_path == Path(f"/proc/{cluster.runtime.pid}/root{inside}")
        agents = Path(f"/proc/{cluster.node.agent.pid}/root{inside}")
        assert opens_netns(pod.netns_path)
        assert not opens_netns(agents)


def opens_netns(path: Path) -> bool:
    """Say whether a network namespace can be opened by a path."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return is_netns(file.fileno())


def test_removed_pod_leaves_nothing(cluster: Cluster) -> None:
    """StopPodSandbox and RemovePodSandbox reach podlane as DELs, which take just what the ADD brought."""
    before = traces(cluster)
    calls = cni_calls(cluster)
    pod = cluster.runtime.run_pod("short-lived")
    assert pod.exec(["hostname"]).stdout == "short-lived\n"
    during = traces(cluster)
    assert [kind for kind in during if len(during[kind]) <= len(before[kind])] == ["spool"]
    pod.remove()
    assert traces(cluster) == before
    assert {key: value - calls.get(key, 0) for key, value in cni_calls(cluster).items()} == {
        ("ADD", "success"): 1,
        ("DEL", "success"): 2,
    }


def cni_calls(cluster: Cluster) -> dict[tuple[str, ...], float]:
    """Return the CNI calls that the agent has served, by command and result."""
    metrics = cluster.node.metrics().items()
    return {labels: value for (name, labels), value in metrics if name == "podlane_cni_operations_total"}


def test_pods_talk_while_agent_is_away(cluster: Cluster, pods: list[Pod]) -> None:
    """With the agent killed, all pods still reach each other in a ring, by IPv4 and IPv6."""
    with agent_away(cluster):
        assert mistakes(pods, in_a_ring(pods)) == []


def test_restart_leaves_pods_alone(cluster: Cluster, pods: list[Pod]) -> None:
    """After a crash with 50 pods running, a new agent takes all over as it is and repairs only what the test breaks."""
    before, pins_before = traces(cluster), pins(cluster)
    with agent_away(cluster):
        pass
    # This repair shows that the kernel was read once more since the start, and that repairs are counted.
    cluster.node.netns.run("ip", "route", "del", pods[0].ips[0])
    cluster.node.wait_for(lambda: cluster.node.repairs() != {}, "the route to be put back")
    assert cluster.node.repairs() == {"routes": 1}
    assert (traces(cluster), pins(cluster)) == (before, pins_before)
    assert mistakes(pods, in_a_ring(pods)) == []


def pins(cluster: Cluster) -> dict[str, int]:
    """Return the pinned links with their inodes, which change when a link is made anew."""
    return {path.name: path.stat().st_ino for path in (cluster.node.bpffs / "links").glob("*")}


def test_removal_while_agent_is_away(cluster: Cluster) -> None:
    """A pod is removed without the agent; when it is back, the pod's addresses are free and nothing is left of it."""
    before = traces(cluster)
    pod = cluster.runtime.run_pod("orphan")
    with agent_away(cluster):
        pod.remove()
        assert cluster.spooled() != []
        assert list(map(str, cluster.stored_addresses()[pod.id])) == pod.ips
    assert pod.id not in cluster.stored_addresses()
    assert traces(cluster) == before


def test_new_pod_while_agent_is_away(cluster: Cluster) -> None:
    """Without the agent a pod is refused, and the runtime hears why and what to do; when it is back, pods start."""
    before = cluster.stored_addresses()
    reason = r"RunPodSandbox of early: .*no answer to ADD from the podlane agent at .*try again later"
    with agent_away(cluster), pytest.raises(CriError, match=reason):
        cluster.runtime.run_pod("early")
    assert cluster.stored_addresses() == before
    pod = cluster.runtime.run_pod("early")
    assert cluster.fetch_from_node(pod.ips[1]) == "early"
    pod.remove()


def test_all_pods_gone(cluster: Cluster, pods: list[Pod]) -> None:
    """When the last of 50 pods is removed, not a device, route, neighbour, link, map entry or row is left."""
    with ThreadPoolExecutor(_PARALLEL) as pool:
        list(pool.map(Pod.remove, pods))
    assert [kind for kind, left in cluster.node.traces().items() if left] == []

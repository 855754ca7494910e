"""An agent that has its addresses from a Kubernetes API server, with and without that server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest

from tests.node.api.node import Node, api_node
from tests.node.api.objects import make_node
from tests.node.echo import UDP, bound
from tests.node.machine import own_routes
from tests.node.verbs import add, assert_refused

V4, V6 = "10.77.0.0/24", "fd00:77::/64"
OUTSIDE = (
    "is not within cluster_cidrs (10.77.0.0/16, fd00:77::/48): "
    "extend these if it is the cluster's, else give the node another one"
)
PAGE_KB = 3 * 2500  # one of 100 Nodes, as it comes in pieces, as a whole, and before its pieces are given back
TAINT = {"key": "podlane.io/agent-not-ready", "effect": "NoSchedule"}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Make a machine whose API server is up; the agent is not."""
    with api_node(tmp_path) as it:
        yield it


def test_a_node_waits_for_its_pod_cidr(node: Node) -> None:
    """Until the cluster assigns a pod CIDR, the node is not ready, and says why; then it is, and its pods are of it."""
    node.start_agent(wait=False)
    node.wait_for(lambda: "the cluster has no node n" in node.get("/readyz")[1], "the agent to miss its Node")
    node.register()
    node.wait_for(lambda: "node n has no pod CIDR yet" in node.get("/readyz")[1], "the agent to miss its pod CIDR")
    assert node.status()[0] == 50
    netns = node.add_netns("early")
    assert_refused(add(node, netns), 11, "node n has no pod CIDR yet")
    assert not node.conflist.exists()
    own = {"name": "own", "ipam": {"type": "podlane", "subnet": "10.79.0.0/24"}}
    assert add(node, netns, **own).exit_code == 0  # which needs no pod CIDR
    node.register(V4, V6)
    node.wait_ready()
    assert node.conflist.exists()
    assert node.status() == (0, "")
    assert node.make_pod("a").addresses == ["10.77.0.1", "fd00:77::1"]
    assert {V4, V6} <= node.native()


def test_the_cluster_is_told(node: Node) -> None:
    """A ready node loses its start-up taint, and its network is said to be available, never before."""
    it = make_node("n", [], ["192.0.2.10"])
    it["spec"]["taints"] = [TAINT]
    node.api.objects.put(it)
    node.start_agent(wait=False)
    node.wait_for(lambda: "no pod CIDR" in node.get("/readyz")[1], "the agent to miss its pod CIDR")
    assert node.api.requests("PATCH") == []
    node.api.objects.put({**it, "spec": {**it["spec"], "podCIDRs": [V4]}})
    node.wait_for(lambda: not node.api.objects.get("n")["spec"]["taints"], "the taint to go")
    node.wait_for(lambda: "NetworkUnavailable" in str(node.api.objects.get("n")["status"]), "the condition")
    assert node.get("/readyz")[0] == 200


def test_a_new_pod_cidr(node: Node) -> None:
    """When the pod CIDR changes, new pods are of the new one; the others live on, and all reach each other."""
    node.register(V4, V6)
    node.start_agent()
    old = node.make_pod("old")
    node.register("10.78.0.0/24", "fd00:78::/64")
    node.wait_for(lambda: node.native() == {"10.78.0.0/24", "fd00:78::/64"}, "the new ranges")
    new = node.make_pod("new")
    assert new.addresses == ["10.78.0.1", "fd00:78::1"]
    node.wait_for(lambda: "PodsOutsidePodCIDR" in str(node.api.objects.events), "an event about the old one")
    assert all(node.pings(old, each) for each in new.addresses)
    assert all(node.pings(new, each) for each in old.addresses)
    node.delete_pod(old)
    node.delete_pod(new)
    assert not any(node.traces().values())


def test_other_nodes_are_by_another_device(node: Node) -> None:
    """Pods' packets fit through the device that leads to other nodes, if that takes less than the one to the world."""
    for command in (
        "link add inner mtu 1400 type veth peer name beyond",
        "address add 198.51.100.10/24 dev inner",
        "link set inner up",
        "link set beyond up",
    ):
        node.netns.run("ip", *command.split())
    node.api.objects.put(make_node("n", [V4], ["198.51.100.10"]))
    node.start_agent()
    pod = node.make_pod("a")
    assert "mtu 1350 " in pod.netns.run("ip", "link", "show", "eth0").stdout


def test_an_outage_concerns_no_pod(node: Node) -> None:
    """While the API server is away, ADD and DEL work, also for an agent that starts then; later it follows again."""
    node.register(V4, V6)
    node.start_agent()
    first = node.make_pod("first")
    node.api.stop()
    second = node.make_pod("second")
    assert all(node.pings(first, each) for each in second.addresses)
    node.kill_agent()
    node.start_agent()
    assert node.metrics()[("podlane_cluster_followed", ())] == 0
    third = node.make_pod("third")
    assert third.addresses == ["10.77.0.3", "fd00:77::3"]
    assert all(node.pings(third, each) for each in (*first.addresses, *second.addresses))
    node.delete_pod(second)
    node.api.start()
    node.wait_for(lambda: node.metrics()[("podlane_cluster_followed", ())] == 1, "the agent to follow the cluster")
    assert node.repairs() == {}


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_reboot_during_an_outage(node: Node, is_silent: bool) -> None:
    """A node whose first start was long ago serves pods after a reboot, though the API server is away, or is silent.

    It also knows the ways to other nodes.
    """
    node.register(V4, V6)
    for name, address, cidr in (("near", "192.0.2.1", "10.80.0.0/24"), ("far", "203.0.113.1", "10.81.0.0/24")):
        node.api.objects.put(make_node(name, [cidr], [address]))
    node.start_agent()
    node.wait_for(lambda: "10.81.0.0/24" in ways(node), "the ways to other nodes")
    before = ways(node)
    node.stop_agent()
    if is_silent:
        node.api.faults.frozen = True
    else:
        node.api.stop()
    (node.directory / "state" / "ipam.db").unlink()
    node.netns.run("ip", "link", "delete", "podlane.vx")
    for family, protocol in product(("-4", "-6"), ("111", "112")):
        node.netns.run("ip", family, "route", "flush", "proto", protocol)
    node.start_agent()
    assert ways(node) == before
    assert node.make_pod("a").addresses == ["10.77.0.1", "fd00:77::1"]


def ways(node: Node) -> str:
    """Return the routes that are podlane's."""
    return "\n".join(own_routes(node.netns))


def test_a_first_start_during_an_outage(node: Node) -> None:
    """An agent that never heard of its pod CIDR waits for the API server, and says so."""
    node.register(V4, V6)
    node.api.stop()
    node.start_agent(wait=False)
    node.wait_for(lambda: "Connection refused" in node.get("/readyz")[1], "the agent to say what it waits for")
    code, reason = node.status()
    assert code == 50
    assert reason.startswith("the pod CIDR of node n is not known yet: ")
    node.api.start()
    node.wait_ready()


def test_a_pod_cidr_that_an_older_node_has(node: Node) -> None:
    """A node whose pod CIDR overlaps with that of an older one gives no addresses, and says so: STATUS, log, event."""
    node.register(V4)
    node.start_agent()
    pod = node.make_pod("a")
    node.api.objects.put(make_node("older", ["10.77.0.0/16"], ["192.0.2.11"], age=60))
    node.wait_for(lambda: node.status()[0] == 50, "STATUS to say 50")
    why = "pod CIDR 10.77.0.0/24 overlaps with 10.77.0.0/16 of node older, which is older"
    assert node.status()[1] == why
    assert_refused(add(node, node.add_netns("b")), 11, why)
    node.wait_for(lambda: bool(node.api.objects.events), "an event")
    (event,) = node.api.objects.events
    assert (event["reason"], event["message"]) == ("PodCIDRConflict", why)
    assert node.pings(pod, "192.0.2.10")
    assert node.metrics()[("podlane_cluster_nodes", ())] == node.metrics()[("podlane_cluster_nodes_refused", ())] == 1
    node.api.objects.delete("older")
    node.wait_ready()
    node.make_pod("c")


def test_a_pod_cidr_that_holds_the_next_hop(node: Node) -> None:
    """Another node's pod CIDR that would cut this one off is refused; that is told, and nothing else is disturbed."""
    node.register(V4)
    node.start_agent()
    node.api.objects.put(make_node("other", ["192.0.2.0/29"], ["192.0.2.11"]))
    node.wait_for(lambda: bool(node.api.objects.events), "an event")
    (event,) = node.api.objects.events
    why = "node other: pod CIDR 192.0.2.0/29 holds 192.0.2.1, the next hop of a route of this node's"
    assert (event["reason"], event["message"]) == ("PodCIDRRefused", why)
    assert node.metrics()[("podlane_cluster_nodes_refused", ())] == 1
    assert node.get("/readyz")[0] == 200
    assert node.netns.run("ip", "route", "show", "192.0.2.0/29").stdout == ""
    assert node.pings(node.make_pod("a"), "192.0.2.1")


def test_a_pod_cidr_outside_of_the_clusters(tmp_path: Path) -> None:
    """With `cluster_cidrs`, no node draws traffic to anything else: an event tells of it, and the others are reached.

    A node whose own pod CIDR is elsewhere gives no addresses.
    """
    with api_node(tmp_path, cluster_cidrs=["10.77.0.0/16", "fd00:77::/48"]) as node:
        node.world.run("ip", "address", "add", "198.51.100.1/32", "dev", "lo")
        node.register(V4, V6)
        node.start_agent()
        pod = node.make_pod("a")
        node.api.objects.put(make_node("thief", ["198.51.100.0/24", "10.77.1.0/24"], ["192.0.2.11"], age=60))
        node.wait_for(lambda: "10.77.1.0/24" in ways(node), "the way to what may be claimed")
        node.wait_for(lambda: bool(node.api.objects.events), "an event")
        assert "198.51.100." not in ways(node)
        assert node.pings(pod, "198.51.100.1")
        assert told(node) == ("PodCIDRRefused", f"node thief: pod CIDR 198.51.100.0/24 {OUTSIDE}")
        assert node.metrics()[("podlane_cluster_nodes_refused", ())] == 1
        assert node.get("/readyz")[0] == 200
        node.register("10.78.0.0/24", V6)
        why = f"pod CIDR 10.78.0.0/24 {OUTSIDE}"
        node.wait_for(lambda: node.status() == (50, why), "STATUS to say 50")
        assert_refused(add(node, node.add_netns("b")), 11, why)
        node.wait_for(lambda: told(node) == ("PodCIDRConflict", why), "an event about the own one")
        assert all(node.pings(pod, each) for each in ("192.0.2.10", "198.51.100.1"))


def told(node: Node) -> tuple[str, str]:
    """Return reason and message of the last event, but for those of pods that a new pod CIDR has left behind."""
    event = [each for each in node.api.objects.events if each["reason"] != "PodsOutsidePodCIDR"][-1]
    return event["reason"], event["message"]


def test_a_tunnel_port_that_is_taken(node: Node) -> None:
    """A taken port is told of by an event; once a node needs the tunnel, all say that this one is cut off. It heals."""
    node.register(V4, V6)
    node.api.objects.put(make_node("other", ["10.77.1.0/24"], ["192.0.2.11"]))
    port = "UDP port 4789 is in use, by a program"
    with bound(node.netns, UDP, "192.0.2.10", 4789):
        node.start_agent()
        node.wait_for(lambda: [each["reason"] for each in node.api.objects.events] == ["TunnelUnavailable"], "an event")
        told = node.api.objects.events[0]["message"]
        assert told.startswith(f"no node needs the tunnel now, but set podlane.vx up: {port}")
        node.wait_for(lambda: node.network_unavailable == "False", "the condition")
        node.api.objects.put(make_node("other", ["10.77.1.0/24"], ["203.0.113.11"]))
        node.wait_for(lambda: node.network_unavailable == "True", "the condition to change")
        code, reason = node.status()
        assert code == 51
        assert reason.startswith(f"other nodes cannot be reached: set podlane.vx up: {port}")
        assert node.get("/readyz") == (503, f"{reason}\n")
        node.wait_for(lambda: node.api.objects.events[-1]["message"] == reason, "another event")
        node.kill_agent()
        node.conflist.unlink()
        node.start_agent(wait=False)
        node.wait_for(lambda: node.get("/readyz") == (503, f"{reason}\n"), "the next agent to say so, too")
        assert not node.conflist.exists()
    node.wait_ready()
    node.wait_for(lambda: node.network_unavailable == "False", "the condition to be put right")


def test_a_node_under_a_strange_address(node: Node) -> None:
    """A node that has none of its Node's InternalIPs says so, for others take what it wraps for forged."""
    node.api.objects.put(make_node("n", [V4], ["192.0.2.99"]), make_node("m", ["10.78.0.0/24"], ["203.0.113.1"]))
    node.start_agent()
    words = "other nodes do not know this one by an address that it has, and drop what it wraps known=192.0.2.99"
    node.wait_for(lambda: words in node.log_tail(), "the complaint")
    node.register(V4)
    node.wait_for(lambda: "other nodes know this one by its own addresses" in node.log_tail(), "its end")


def test_memory_does_not_grow_with_what_is_not_used(node: Node) -> None:
    """1,000 Nodes of 25 kB each, listed, watched and remembered, take a tenth of that in the agent."""
    node.register(V4, V6)
    node.start_agent()
    node.make_pod("before")
    alone = peak_kb(node)
    node.stop_agent()
    crowd = [
        make_node(
            f"node-{n:04}",
            [f"10.128.{n >> 4}.{(n & 15) << 4}/28", f"fd00:{n:x}::/64"],
            [f"10.9.{n >> 8}.{n & 255}"],
            images=50,
        )
        for n in range(1000)
    ]
    size_kb = sum(len(json.dumps(each)) for each in crowd) >> 10
    node.api.objects.put(*crowd)
    node.start_agent()
    node.wait_for(lambda: "nodes count=1001" in node.log_tail(), "the cluster")
    node.api.objects.put(*crowd)
    last = make_node("n", [V4, V6])
    last["spec"]["taints"] = [TAINT]
    node.api.objects.put(last)
    node.wait_for(lambda: not node.api.objects.get("n")["spec"]["taints"], "the agent to read all of it")
    node.make_pod("after")
    assert peak_kb(node) - alone < size_kb / 10 + PAGE_KB


def peak_kb(node: Node) -> int:
    """Return the most that the agent has had in memory, with what it has from files."""
    assert node.agent
    status = Path(f"/proc/{node.agent.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])


def test_a_start_that_fails_is_told(node: Node, tmp_path: Path) -> None:
    """An agent that cannot start, such as without a bpf file system, leaves an event that says why."""
    node.register(V4)
    kubeconfig = {"kubeconfig": str(node.directory / "api" / "kubeconfig")}
    node.configure(node_name="n", kubernetes=kubeconfig, paths={"bpffs": tmp_path / "no" / "podlane"})
    node.start_agent(wait=False)
    assert node.agent
    assert node.agent.wait(30) == 1
    node.agent = None
    (event,) = node.api.objects.events
    assert event["reason"] == "StartFailed"
    assert "bpf" in event["message"]


def test_ranges_and_kubernetes_exclude_each_other(node: Node) -> None:
    """Ranges beside kubernetes are refused, with what to do."""
    node.configure(kubernetes={}, ranges=[{"subnet": "10.0.0.0/24"}])
    node.start_agent(wait=False)
    assert node.agent
    assert node.agent.wait(30) == 2
    node.agent = None
    assert "kubernetes takes the place of ranges" in node.log_tail()

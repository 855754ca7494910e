"""The list and watch of all Nodes, as they are on a good day."""

from __future__ import annotations

import threading
from ipaddress import ip_address, ip_network

from agent.cluster import ClusterNode
from agent.kubernetes import Api
from tests.node.api.followers import Following, numbered
from tests.node.api.objects import make_node
from tests.node.api.server import ApiServer


def test_what_is_kept_of_a_node(server: ApiServer, following: Following) -> None:
    """A node's name, InternalIPs, pod CIDRs and age are reported, and the own Node's version, taints and condition."""
    assert following.nodes["node-001"] == ClusterNode(
        "node-001",
        (ip_address("192.168.0.1"), ip_address("fd01::1")),
        (ip_network("10.0.1.0/24"), ip_network("fd00:1::/64")),
        "2026-01-01T00:00:00Z",
    )
    own = following.source.own
    assert own is not None
    assert (own.version, own.network_unavailable, own.taints) == ("1002", None, ())
    node = numbered(1)
    node["spec"] |= {"taints": [{"key": "a", "effect": "NoExecute", "timeAdded": "2026-01-01T00:00:00Z"}]}  # type: ignore[operator]
    server.objects.put(node)
    following.wait_for(lambda: (it := following.source.own) and it.taints == tuple(node["spec"]["taints"]), "taints")  # type: ignore[index]


def test_a_node_that_says_less(server: ApiServer, following: Following) -> None:
    """A new Node without addresses and pod CIDRs, with nulls or with nonsense in their place, is a node without."""
    server.objects.put(
        {"metadata": {"name": "bare"}},
        {
            "metadata": {"name": "null", "creationTimestamp": None},
            "spec": {"podCIDRs": None},
            "status": {"addresses": None},
        },
        make_node("odd", ["nonsense", "10.9.0.7/24", "fd00::%1/64"], ["not-an-address", "192.168.9.9", "fd01::1%eth0"]),
    )
    following.wait_for(lambda: len(following.nodes) == 6, "six nodes")
    assert following.nodes["bare"] == ClusterNode("bare")
    assert following.nodes["null"] == ClusterNode("null")
    assert following.nodes["odd"].pod_cidrs == (ip_network("10.9.0.0/24"),)
    assert following.nodes["odd"].addresses == (ip_address("192.168.9.9"),)


def test_pages(server: ApiServer) -> None:
    """A long list comes in pages, and is reported once, as a whole."""
    server.objects.put(*(numbered(number) for number in range(250)))
    kubeconfig = server.write_kubeconfig()
    it = Following(lambda: Api(kubeconfig))
    it.wait_for(lambda: it.nodes, "a report")
    assert len(it.nodes) == 250
    assert [each.query["limit"] for each in server.requests("LIST")] == ["100"] * 3
    it.source.stop()


def test_changes_are_followed(server: ApiServer, following: Following) -> None:
    """A node that comes, changes or goes is reported, by one watch and no second list."""
    server.objects.put(numbered(7))
    following.wait_until_known("node-000", "node-001", "node-002", "node-007")
    server.objects.put(numbered(7, address="192.168.77.77"))
    following.wait_for(lambda: ip_address("192.168.77.77") in following.nodes["node-007"].addresses, "the change")
    server.objects.delete("node-000")
    following.wait_until_known("node-001", "node-002", "node-007")
    assert len(server.requests("LIST")) == 1
    assert [each.query["resourceVersion"] for each in server.requests("WATCH")] == ["1003"]


def test_a_line_ends_by_a_newline_only(server: ApiServer, following: Following) -> None:
    """Characters that Python takes for the end of a line, too, are part of an object as any others (RFC 8259)."""
    node = make_node("node-007")
    node["metadata"]["annotations"]["words"] = "one\u0085two\u2028three"
    server.objects.put(node)
    following.wait_until_known("node-000", "node-001", "node-002", "node-007")


def test_many_changes_make_few_reports(server: ApiServer, following: Following) -> None:
    """Changes in quick succession share reports."""
    before = len(following.reports)
    for number in range(300):
        server.objects.put(numbered(number))
    following.wait_for(lambda: len(following.nodes) == 300, "all nodes")
    assert len(following.reports) - before < 30


def test_heartbeats_make_no_reports(server: ApiServer, following: Following) -> None:
    """What changes of a Node without being of interest, as its kubelet does every few minutes, is not reported."""
    before = len(following.reports)
    for number in (0, 2, 1):
        server.objects.put(numbered(number))
    version = str(server.objects.version)
    following.wait_for(lambda: (it := following.source.own) and it.version == version, "the last of them")
    threading.Event().wait(0.5)
    assert len(following.reports) == before


def test_a_watch_goes_on_where_it_ended(server: ApiServer, following: Following) -> None:
    """When the server ends a watch, the next one begins with the last version: nothing is missed or read again."""
    server.objects.put(numbered(7))
    following.wait_until_known("node-000", "node-001", "node-002", "node-007")
    version = server.objects.version
    server.break_watches()
    server.objects.put(numbered(8))
    following.wait_for(lambda: "node-008" in following.nodes, "the new node")
    assert server.requests("WATCH")[-1].query["resourceVersion"] == str(version)
    assert len(server.requests("LIST")) == 1


def test_a_bookmark_keeps_a_quiet_watch_young(server: ApiServer, following: Following) -> None:
    """After a bookmark, a watch can go on though the version of the last Node was compacted away."""
    server.objects.compact()
    server.bookmark()
    bookmarked = str(server.objects.version)
    server.break_watches()
    following.wait_for(lambda: len(server.requests("WATCH")) == 2, "another watch")
    assert server.requests("WATCH")[-1].query["resourceVersion"] == bookmarked
    assert len(server.requests("LIST")) == 1

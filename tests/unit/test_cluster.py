"""Who is in the cluster, and whose pod CIDRs count."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cluster import NOBODYS, ClusterNode, settle
from agent.membership import Membership


def node(name: str, *cidrs: str, created: str = "2026-01-01T00:00:00Z") -> ClusterNode:
    """Return a node with these pod CIDRs."""
    return ClusterNode(name, (), tuple(map(ip_network, cidrs)), created)


def test_the_own_node_and_its_peers_are_told_apart() -> None:
    """A cluster is seen from one of its nodes: itself, and the others."""
    cluster = settle([node("a", "10.0.0.0/24"), node("b", "10.0.1.0/24")], "b", live=True)
    assert cluster.own == node("b", "10.0.1.0/24")
    assert cluster.peers == (node("a", "10.0.0.0/24"),)
    assert not cluster.refused


def test_the_younger_of_two_overlapping_nodes_is_refused() -> None:
    """Of two nodes whose pod CIDRs overlap, the older one keeps its own, and the other is named with the reason."""
    young, old = node("a", "10.0.0.0/16", "fd00::/64", created="2026-02-01T00:00:00Z"), node("z", "10.0.7.0/24")
    cluster = settle([young, old], "a", live=True)
    assert cluster.peers == (old,)
    assert cluster.own == node("a", "fd00::/64", created="2026-02-01T00:00:00Z")
    assert cluster.refused == {"a": "pod CIDR 10.0.0.0/16 overlaps with 10.0.7.0/24 of node z, which is older"}


def test_every_prefix_that_is_refused_is_told() -> None:
    """A node that loses several pod CIDRs is told of each."""
    old = node("a", "10.0.0.0/24", "10.0.1.0/24", created="2025-01-01T00:00:00Z")
    told = settle([old, node("b", "10.0.0.0/25", "10.0.1.0/25")], "a", live=True).refused["b"]
    assert "10.0.0.0/25 overlaps with 10.0.0.0/24" in told
    assert "10.0.1.0/25 overlaps with 10.0.1.0/24" in told


def cidrs_of(lengths: st.SearchStrategy[int]) -> st.SearchStrategy[IPv4Network]:
    """Make prefixes of these lengths."""
    return st.builds(
        lambda address, length: IPv4Network((address, length), strict=False), st.integers(0, 2**32 - 1), lengths
    )


CIDRS = cidrs_of(st.integers(4, 28))


@given(st.lists(CIDRS, max_size=12))
def test_what_is_kept_is_disjoint_and_what_is_refused_overlaps(cidrs: list[object]) -> None:
    """No two prefixes that are kept overlap, and each one refused overlaps with one that is kept, or is nobody's."""
    nodes = [node(f"n{index:02}", str(cidr)) for index, cidr in enumerate(cidrs)]
    cluster = settle(nodes, "n00", live=True)
    everyone = [*cluster.peers, *([cluster.own] if cluster.own else [])]
    kept = [cidr for each in everyone for cidr in each.pod_cidrs]
    assert not any(one.overlaps(other) for one in kept for other in kept if one is not other)
    for each in nodes:
        is_kept = each.pod_cidrs[0] in kept and each.name not in cluster.refused
        assert is_kept or any(each.pod_cidrs[0].overlaps(one) for one in (*kept, *NOBODYS))


@pytest.mark.parametrize(
    "cidr",
    ["0.0.0.0/0", "::/0", "127.1.0.0/16", "169.254.169.254/32", "224.0.0.0/24", "::ffff:a00:0/120", "fe80::/64"],
)
def test_nobody_has_what_is_no_nodes(cidr: str) -> None:
    """A default route, loopback, link-local, multicast and IPv4 in the guise of IPv6 are no pod CIDR, even alone."""
    cluster = settle([node("a", cidr), node("b", "10.0.0.0/24")], "b", live=True)
    assert cluster.peers == (node("a"),)
    assert cluster.own == node("b", "10.0.0.0/24")
    assert "which is no node's" in cluster.refused["a"]


BOUNDS = (ip_network("10.0.0.0/16"), ip_network("10.1.0.0/24"), ip_network("fd00::/48"))


@pytest.mark.parametrize(
    ("cidr", "is_kept"),
    [
        *((each, True) for each in ("10.0.0.0/16", "10.0.255.0/24", "10.1.0.255/32", "fd00:0:0:ffff::/64")),
        *((each, False) for each in ("10.0.0.0/15", "10.1.0.0/23", "10.1.1.0/24", "fd00:0:1::/64", "192.0.2.0/24")),
    ],
)
def test_the_clusters_prefixes_bound_the_pod_cidrs(cidr: str, is_kept: bool) -> None:
    """A pod CIDR, of the own node or another, that is not within one of the cluster's is refused, with what to do."""
    nodes = [node("a", cidr, "10.1.0.0/25"), node("b", "fd00:0:0:b::/64")]
    why = f"pod CIDR {cidr} is not within cluster_cidrs (10.0.0.0/16, 10.1.0.0/24, fd00::/48): extend these if it is"
    settled = nodes[0] if is_kept else node("a", "10.1.0.0/25")
    own, other = (settle(nodes, name, BOUNDS, live=True) for name in "ab")
    assert own.own == other.peers[0] == settled
    assert own.refused.get("a", "").startswith(why) is not is_kept
    assert own.refused == other.refused
    assert (own.outlying, other.outlying) == ({}, {} if is_kept else own.refused)


@given(st.lists(CIDRS, max_size=12), st.lists(cidrs_of(st.integers(1, 6)), min_size=1, max_size=3))
def test_what_lies_outside_is_in_nobodys_way(cidrs: list[IPv4Network], bounds: list[IPv4Network]) -> None:
    """Where the cluster's prefixes are known, the others fare as if what lies outside of these were not claimed."""
    nodes = [node(f"n{index:02}", str(cidr)) for index, cidr in enumerate(cidrs)]
    outside = {each.name for each, cidr in zip(nodes, cidrs, strict=True) if not any(map(cidr.subnet_of, bounds))}
    honest = [node(each.name) if each.name in outside else each for each in nodes]
    bounded, unclaimed = settle(nodes, "n00", bounds, live=True), settle(honest, "n00", live=True)
    assert (bounded.own, bounded.peers) == (unclaimed.own, unclaimed.peers)
    assert bounded.refused.keys() == unclaimed.refused.keys() | outside
    assert bounded.outlying.keys() == outside - {"n00"}


@pytest.mark.parametrize("created", ["2025-01-01T00:00:00Z", "2027-01-01T00:00:00Z"])
def test_an_address_of_anothers_pods_is_not_believed(created: str) -> None:
    """A node, old or young, that names an address of another node's pods as its own has not got it; the rest stays."""
    addresses = tuple(map(ip_address, ("192.0.2.9", "10.0.0.7", "10.0.9.1", "::ffff:192.0.2.1")))
    liar = ClusterNode("b", addresses, (ip_network("10.0.9.0/24"),), created)
    cluster = settle([node("a", "10.0.0.0/24"), liar], "a", live=True)
    assert cluster.own == node("a", "10.0.0.0/24")
    assert cluster.peers[0].addresses == tuple(map(ip_address, ("192.0.2.9", "10.0.9.1")))
    assert cluster.peers[0].pod_cidrs == liar.pod_cidrs
    told = cluster.refused["b"]
    assert "address 10.0.0.7 is in 10.0.0.0/24, a pod CIDR of node a" in told
    assert "address ::ffff:c000:201 is in ::ffff:0:0/96, which is no node's" in told


def test_so_many_addresses_count() -> None:
    """Of other nodes' addresses the first eight count, and it is told; the own node has as many as it likes."""
    addresses = tuple(ip_address(0xC0000200 + number) for number in range(9))
    cluster = settle([ClusterNode("a", addresses), ClusterNode("b", addresses)], "a", live=True)
    assert cluster.own == ClusterNode("a", addresses)
    assert cluster.peers == (ClusterNode("b", addresses[:8]),)
    assert cluster.refused == {"b": "of its 9 addresses, the first 8 count"}


def test_a_pod_cidr_in_which_nodes_live() -> None:
    """A young node that is given the nodes' own network for its pods is refused it, and takes nobody's address.

    That is no excuse for what lies outside of the cluster's prefixes.
    """
    cidrs = [(ip_network(f"10.0.{number}.0/24"),) for number in (1, 2, 50)]
    nodes = [
        ClusterNode(name, (ip_address(f"10.0.50.{number}"),), cidrs[number], f"2026-01-0{number + 1}T00:00:00Z")
        for number, name in enumerate("abc")
    ]
    cluster = settle(nodes, "c", live=True)
    assert cluster.peers == tuple(nodes[:2])
    assert cluster.own == replace(nodes[2], pod_cidrs=())
    assert cluster.refused == {"c": "pod CIDR 10.0.50.0/24 has addresses of older nodes in it, a among them"}
    bounded = settle([*nodes, node("d", "192.0.2.0/24", created=nodes[2].created)], "c", BOUNDS, live=True)
    assert bounded.refused.keys() == {"c", "d"}
    assert (*bounded.peers, bounded.own) == (*nodes[:2], node("d", created=nodes[2].created), cluster.own)


def test_only_a_report_that_changes_something_is_passed_on() -> None:
    """Who follows the membership is woken by changes, not by repetitions."""
    calls: list[int] = []
    membership = Membership("a", lambda: calls.append(1))
    membership.report([node("a", "10.0.0.0/24")])
    membership.report([node("a", "10.0.0.0/24")])
    assert len(calls) == 1
    assert membership.cluster.live
    membership.report([node("a", "10.0.0.0/24"), node("b", "10.0.1.0/24")])
    assert len(calls) == 2

"""The ways to other nodes: which lane, which routes, which prefixes; for thousands of nodes, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cluster import Cluster, ClusterNode
from agent.peers import Peers, Place, Way, Ways
from agent.state import Address, Lanes, Network, PeerRoute, Prefix, Routing, Sources, Uplink
from tests.support import prefix

UPLINK, TUNNEL = 2, 9
NEAR, NEAR6 = ip_address("192.0.2.7"), ip_address("2001:db8::7")
FAR, FAR6 = ip_address("203.0.113.7"), ip_address("2001:db8:3::7")
OWN = (ip_address("192.0.2.1"), ip_address("2001:db8::1"))
CIDRS = ip_network("10.244.7.0/24"), ip_network("fd00:7::/64")
PREFIXES = V4, V6 = Prefix.of(CIDRS[0]), Prefix.of(CIDRS[1])
LINKS = frozenset({ip_network("192.0.2.0/24"), ip_network("2001:db8::/64")})


def place(routing: Routing = "auto", links: frozenset[Network] = LINKS, own: tuple[Address, ...] = OWN) -> Place:
    """Return this end: one uplink, and a tunnel unless there is no use for one."""
    tunnel = 0 if routing == "direct" else TUNNEL
    return Place(routing, (Uplink(UPLINK, Sources(), links),), own, tunnel, mtu=1500, tunnel_mtu=1450)


def node(*addresses: Address, cidrs: Sequence[Network] = CIDRS, name: str = "other") -> ClusterNode:
    """Return a node."""
    return ClusterNode(name, addresses, tuple(cidrs))


def find(where: Place, *nodes: ClusterNode) -> Peers:
    """Return the ways."""
    return Ways().find(where, Cluster(None, nodes, {}, True))


def way(where: Place, *addresses: Address) -> Way:
    """Return the way to a node with these addresses."""
    return find(where, node(*addresses)).ways["other"]


@pytest.mark.parametrize("routing", ["auto", "direct"])
def test_on_link(routing: Routing) -> None:
    """A node on the link is the next hop to its pods, by its address of their family."""
    found = way(place(routing), NEAR, NEAR6)
    assert found.lanes == {4: "direct", 6: "direct"}
    assert found.routes == {4: PeerRoute(UPLINK, NEAR), 6: PeerRoute(UPLINK, NEAR6)}
    assert find(place(routing), node(NEAR, NEAR6)).routes == {V4: found.routes[4], V6: found.routes[6]}
    pods = Lanes(native=True, peer=NEAR)
    assert found.prefixes == {
        **dict.fromkeys(PREFIXES, pods),
        **dict.fromkeys(map(prefix, (NEAR, NEAR6)), replace(pods, node=True)),
    }


def test_behind_a_router() -> None:
    """A node behind a router, and all that is its own, is reached by the tunnel, from the address that it knows."""
    found = way(place(), FAR, FAR6)
    assert found.lanes == {4: "vxlan", 6: "vxlan"}
    assert found.routes == {4: PeerRoute(TUNNEL, source=OWN[0]), 6: PeerRoute(TUNNEL, source=OWN[1])}
    assert find(place(), node(FAR, FAR6)).routes == {V4: found.routes[4], V6: found.routes[6]}
    pods = Lanes(native=True, peer=FAR, tunnel=TUNNEL)
    assert found.prefixes == {
        **dict.fromkeys(PREFIXES, pods),
        **dict.fromkeys(map(prefix, (FAR, FAR6)), replace(pods, node=True)),
    }


def test_vxlan_for_all() -> None:
    """With `vxlan`, nodes on the link are reached by the tunnel as well."""
    assert find(place("vxlan"), node(NEAR, NEAR6)).routes.keys() == {V4, V6}
    assert set(way(place("vxlan"), NEAR, NEAR6).lanes.values()) == {"vxlan"}


def test_direct_behind_a_router() -> None:
    """With `direct`, routers have to know the way to pods behind them; these are not masqueraded all the same."""
    found = way(place("direct"), FAR, FAR6)
    assert (found.lanes, found.routes) == ({4: "routed", 6: "routed"}, {})
    assert {(lanes.native, lanes.tunnel) for lanes in found.prefixes.values()} == {(True, 0)}


def test_families_apart() -> None:
    """IPv4 goes by an IPv6 next hop where there is no other; IPv6 does not go by one of IPv4, but by the tunnel."""
    by_ipv6 = way(place(own=OWN[1:]), NEAR6)
    assert by_ipv6.routes == {4: PeerRoute(UPLINK, NEAR6), 6: PeerRoute(UPLINK, NEAR6)}
    by_ipv4 = way(place(own=OWN[:1]), NEAR)
    assert by_ipv4.routes == {4: PeerRoute(UPLINK, NEAR), 6: PeerRoute(TUNNEL)}
    assert by_ipv4.lanes == {4: "direct", 6: "vxlan"}


def test_called_by_a_common_family() -> None:
    """A node is called by its first address of a family that this one has, too; if there is none, not at all."""
    assert way(place(own=OWN[1:]), FAR, FAR6).peer == FAR6
    strange = way(place(own=OWN[:1]), FAR6)
    assert strange.peer is None
    assert {lanes.tunnel for lanes in strange.prefixes.values()} == {0}


def test_no_way_leads_to_oneself() -> None:
    """A node that is said to have this one's address, as one whose machine this is now, is called at its others."""
    assert way(place(), OWN[0], FAR).peer == FAR
    gone = way(place(), *OWN)
    assert gone.peer is None
    assert {lanes.tunnel for lanes in gone.prefixes.values()} == {0}
    assert [each.gateway for each in gone.routes.values()] == [None, None]  # but into the tunnel, which drops it


def test_called_by_another_family() -> None:
    """A node without an address of the family that the tunnel's MTU is made for has less room inside."""
    assert way(place(), FAR6).routes[4].mtu == way(place(), FAR6).prefixes[V4].mtu == 1430
    assert way(replace(place(own=OWN[::-1]), tunnel_mtu=1430), FAR).routes[4].mtu == 0


def test_two_claim_an_address() -> None:
    """An address is the node's that is called at it, older or younger; who adds it to others moves nothing."""
    right, wrong = node(FAR, cidrs=()), node(ip_address("203.0.113.9"), FAR, name="liar", cidrs=())
    for nodes in ((right, wrong), (wrong, right)):
        assert find(place(), *nodes).prefixes[prefix(FAR)].peer == FAR


def test_called_by_the_family_that_the_tunnel_leaves_room_for() -> None:
    """Of several addresses, a node is called by one of this one's family: the MTU is made for it."""
    assert way(place(), FAR6, FAR).peer == FAR
    assert way(place(own=OWN[::-1]), FAR, FAR6).peer == FAR6


def test_room_for_what_goes_to_a_node_itself() -> None:
    """What goes to a node's own address is wrapped for that one, if there is room: the MTU is that of the way there."""
    second = ip_address("203.0.113.8")
    narrow = {FAR: 1400, second: 1360, FAR6: 1300}

    def room(where: Place, *addresses: Address) -> dict[Address, int]:
        prefixes = Ways().find(where, Cluster(None, (node(*addresses),), {}, True), narrow).prefixes
        return {address: prefixes[prefix(address)].mtu for address in addresses}

    assert room(place(), FAR, second, FAR6) == {FAR: 1350, second: 1310, FAR6: 1350}
    by_ipv6 = replace(place(own=OWN[::-1]), tunnel_mtu=1430)
    assert room(by_ipv6, FAR6, FAR) == {FAR6: 1280, FAR: 1350}
    assert room(replace(by_ipv6, addresses=OWN[1:]), FAR6, FAR) == {FAR6: 1280, FAR: 1280}


def test_next_hops_are_no_pods() -> None:
    """A pod CIDR that holds an uplink's next hop gets no route and no prefix, and why is told; one beside it does."""
    gateways = frozenset(map(ip_address, ("192.0.2.254", "198.51.100.1", "fe80::1")))
    uplinks = tuple(replace(each, gateways=gateways) for each in place().uplinks)
    where = replace(place(), uplinks=uplinks)
    bad, good = ip_network("192.0.2.128/25"), ip_network("192.0.2.64/26")
    for address in (NEAR, FAR):
        found = find(where, node(address, cidrs=[bad, good]))
        assert found.routes.keys() == {Prefix.of(good)}
        assert found.prefixes.keys() == {Prefix.of(good), prefix(address)}
        why = "pod CIDR 192.0.2.128/25 holds 192.0.2.254, the next hop of a route of this node's"
        assert found.refused == {"other": why}
    assert find(where, node(NEAR)).refused == {}
    own = node(*OWN, cidrs=[bad], name="own")
    assert Ways().find(where, Cluster(own, (), {}, True)).refused == {"own": why}


def test_no_tunnel_yet() -> None:
    """As long as the tunnel's device is not there, nothing leads to it."""
    found = way(replace(place(), tunnel=0), FAR, FAR6)
    assert found.routes == {}
    assert {lanes.tunnel for lanes in found.prefixes.values()} == {0}


def test_path_mtu() -> None:
    """Where the path to a node takes less than others, so do the routes to it; where it takes more, nothing changes."""
    ways, cluster = Ways(), Cluster(None, (node(FAR), node(NEAR, name="near", cidrs=())), {}, True)
    assert ways.find(place(), cluster).routes[V4].mtu == 0
    narrow = ways.find(place(), cluster, {FAR: 1400})
    assert narrow.routes[V4] == PeerRoute(TUNNEL, source=OWN[0], mtu=1350)
    assert narrow.prefixes[V4].mtu == 1350
    assert ways.find(place(), cluster, {FAR: 1000}).routes[V4].mtu == 1280
    assert ways.find(place(), cluster, {FAR: 9000}).routes[V4].mtu == 0
    assert ways.find(place(), cluster, {NEAR: 1400}).prefixes[prefix(NEAR)].mtu == 0


def test_prefixes_that_cover_each_other() -> None:
    """A prefix has what longer and shorter ones say: service addresses among pods', exceptions within a pod CIDR."""
    services, within = ip_network("10.244.0.0/16"), ip_network("10.244.7.128/25")
    where = replace(place(), prefixes={services: Lanes(stack=True), within: Lanes(native=True, stack=True)})
    found = find(where, node(FAR)).prefixes
    assert found[Prefix.of(services)] == Lanes(stack=True)
    assert found[V4] == Lanes(native=True, stack=True, peer=FAR, tunnel=TUNNEL)
    assert found[Prefix.of(within)] == Lanes(native=True, stack=True, peer=FAR, tunnel=TUNNEL)


def test_only_what_changes_is_found_anew() -> None:
    """The same cluster has the same ways; if one node changes, the others keep theirs; a new place changes all."""
    ways, nodes = Ways(), [node(NEAR, name=f"n{number}", cidrs=()) for number in range(3)]
    cluster = Cluster(None, tuple(nodes), {}, True)
    first = ways.find(place(), cluster)
    assert ways.find(place(), cluster) is first
    nodes[1] = node(FAR, name="n1", cidrs=())
    second = ways.find(place(), Cluster(None, tuple(nodes), {}, True))
    assert [second.ways[name] is first.ways[name] for name in ("n0", "n1", "n2")] == [True, False, True]
    third = ways.find(place("vxlan"), Cluster(None, tuple(nodes), {}, True))
    assert third.ways["n0"].lanes[4] == "vxlan"


def test_tunnel_is_needed() -> None:
    """The tunnel is needed, be it there or not, where it leads to something of a node that can be called."""
    assert find(place(), node(FAR)).needs_tunnel
    assert find(replace(place(), tunnel=0), node(FAR)).needs_tunnel
    assert find(place("vxlan"), node(NEAR, NEAR6)).needs_tunnel
    assert find(place(), node(NEAR)).needs_tunnel
    for where, nodes in (
        (place(), [node(NEAR, NEAR6)]),
        (place(), [node(NEAR, cidrs=CIDRS[:1])]),
        (place("direct"), [node(FAR)]),
        (place(own=OWN[:1]), [node(FAR6)]),
        (place("vxlan"), []),
    ):
        assert not find(where, *nodes).needs_tunnel


settled = st.lists(
    st.builds(
        node,
        st.sampled_from([NEAR, FAR, FAR6]),
        cidrs=st.lists(st.sampled_from([*CIDRS, ip_network("10.244.8.0/24")]), max_size=2, unique=True),
        name=st.sampled_from("abc"),
    ),
    max_size=3,
    unique_by=lambda each: each.name,
)


@given(st.lists(settled, max_size=6), st.sampled_from([{}, {FAR: 1400}]))
def test_ways_are_those_of_the_last_cluster(clusters: list[list[ClusterNode]], paths: dict[Address, int]) -> None:
    """Whatever nodes were there before, with whatever addresses and pod CIDRs, nothing of it is left."""
    ways = Ways()
    for nodes in clusters:
        cluster = Cluster(None, tuple(nodes), {}, True)
        assert ways.find(place(), cluster, paths) == Ways().find(place(), cluster, paths)


def test_counted() -> None:
    """Nodes are counted by lane and family."""
    found = find(place(), node(NEAR, NEAR6), node(FAR, FAR6, name="far"), node(NEAR, name="old", cidrs=()))
    assert found.counts == {("direct", 4): 2, ("direct", 6): 1, ("vxlan", 4): 1, ("vxlan", 6): 2}


def test_a_node_leaves() -> None:
    """With a node, its routes and prefixes go."""
    ways = Ways()
    ways.find(place(), Cluster(None, (node(FAR),), {}, True))
    assert ways.find(place(), Cluster()) == Peers()

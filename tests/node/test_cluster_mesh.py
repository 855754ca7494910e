"""Pods, nodes and the world of a cluster, in every lane: who reaches whom, and as whom everybody is seen."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.node.echo import transfer
from tests.node.internet import forget_mtu
from tests.node.machine import pings
from tests.node.mesh import Mesh, Party, mesh
from tests.node.nodes import DUAL, FAR, FIRST, PLACES, V4, V6, Families, nodes

KINDS = {
    "direct": DUAL,
    "vxlan": DUAL,
    "auto": DUAL,
    "auto by IPv6": Families(nodes=(V6,)),
    "auto, IPv6 only": Families(nodes=(V6,), pods=(V6,)),
    "auto, IPv4 only": Families(nodes=(V4,), pods=(V4,)),
}
"""Of cluster: the routing, and who has addresses of which families."""
MTU = {
    "direct": 1500,
    "vxlan": 1450,
    "auto": 1450,
    "auto by IPv6": 1430,
    "auto, IPv6 only": 1430,
    "auto, IPv4 only": 1450,
}
"""Of pods: that of the uplinks, less what VXLAN adds by IPv4 (50 bytes) or IPv6 (70) where it may be needed."""
HEADERS = (28, 48)  # of a ping, by family
NARROW = 1400


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Name the kind of cluster."""
    return str(request.param)


@pytest.fixture(scope="module")
def it(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Yield a cluster of each kind. Only with `direct` does the router know the way to pods."""
    routing = re.split("[ ,]", kind)[0]
    with (
        nodes(tmp_path_factory.mktemp("mesh"), KINDS[kind], routing=routing) as made,
        ExitStack() as stack,
    ):
        if routing == "direct":
            stack.enter_context(made.router_knows_pods(*PLACES))
        yield stack.enter_context(mesh(made))


def test_pod_to_pod(it: Mesh) -> None:
    """Every pod reaches every other one, which sees the address that the asking pod has."""
    it.check((asker, asked, asker) for asker in it.pods for asked in it.pods if asker is not asked)


def test_node_to_pod(it: Mesh) -> None:
    """Every node reaches every pod, which sees the node's address."""
    it.check((host, pod, host) for host in it.hosts for pod in it.pods)


def test_pod_to_node(it: Mesh) -> None:
    """Every pod reaches every node, which sees the pod's own address: within the cluster nothing is masqueraded."""
    it.check((pod, host, pod) for pod in it.pods for host in it.hosts)


def test_node_to_node(it: Mesh) -> None:
    """Nodes reach each other under their own addresses, as without podlane."""
    it.check((asker, asked, asker) for asker in it.hosts for asked in it.hosts if asker is not asked)


def test_pod_to_world(it: Mesh) -> None:
    """Pods of every node reach the world, which sees their node."""
    it.check((pod, it.world, host) for pod, host in zip(it.pods, it.hosts, strict=True))


def test_world_to_pod(it: Mesh) -> None:
    """Where the network knows the way to pods, the world reaches them by their own addresses, and is seen as itself."""
    with it.nodes.router_knows_pods(*PLACES):
        it.check((it.world, pod, it.world) for pod in it.pods)


def test_lanes(it: Mesh, kind: str) -> None:
    """Packets take the lane of the configuration; with `auto`, the tunnel only where a router is between the nodes."""
    for here, there in itertools.permutations(PLACES, 2):
        one, node = it.pods[here], it.nodes.members[here]
        is_tunnel = kind == "vxlan" or (kind != "direct" and FAR in (here, there))
        for address in it.pods[there].addresses.values():
            before = node.packets()
            assert pings(one.netns, address, count=5)
            after = node.packets()
            used = {name: after[name] - before[name] for name in ("fwd_uplink", "fwd_tunnel")}
            assert (used["fwd_tunnel"] >= 5) == is_tunnel, f"{one.name} → {address}: {used}"
            assert (used["fwd_uplink"] >= 5) != is_tunnel, f"{one.name} → {address}: {used}"


def mtu_of(party: Party, device: str = "eth0") -> int:
    """Return the MTU of a device in bytes."""
    return int(json.loads(party.netns.run("ip", "-json", "link", "show", device).stdout)[0]["mtu"])


def test_mtu(it: Mesh, kind: str) -> None:
    """Pods know how large their packets may be, whichever lane these take."""
    assert [mtu_of(pod) for pod in it.pods] == [MTU[kind]] * 3


def test_ping_of_any_size(it: Mesh, kind: str) -> None:
    """Packets of just the MTU pass unfragmented between all pods and nodes, and larger ones in fragments."""
    lost = [
        f"{one.name} → {address}, {size} bytes"
        for one in it.pods
        for other in [*it.pods, *it.hosts]
        for family, address in other.addresses.items()
        for size, how in (
            (MTU[kind] - HEADERS[family], "do"),
            (MTU[kind] - HEADERS[family] + 1, "dont"),
            (20000, "dont"),
        )
        if one is not other and not pings(one.netns, address, "-M", how, "-s", str(size), count=1)
    ]
    assert lost == []


def test_bulk(it: Mesh) -> None:
    """Megabytes arrive as they were sent, in large (GSO) packets: few for their size, and none too big."""
    for family in it.nodes.families.pods:
        assert_bulk(it, family)


def assert_bulk(it: Mesh, family: int) -> None:
    """Assert it for a family."""
    first, second, far = it.pods
    before = [member.packets() for member in it.nodes.members]
    for one, other in ((first, second), (second, first), (first, far), (far, first)):
        sent, received, peer = transfer(one.netns, other.netns, other.addresses[family], 8 << 20)
        assert (received, peer) == (sent, one.addresses[family])
    for member, then in zip(it.nodes.members, before, strict=True):
        grown = {name: count - then[name] for name, count in member.packets().items() if count != then[name]}
        assert not any(name.startswith("drop_") for name in grown), grown
        assert grown.get("punt_too_big", 0) == 0, grown
        assert sum(grown.values()) < (32 << 20) / 1500, grown


def test_narrow_link(it: Mesh) -> None:
    """Where the link to a node takes less than all others, both ends learn it, and all that is sent arrives."""
    first, _, far = it.pods
    host = it.hosts[FAR]
    for family in it.nodes.families.pods:
        with narrowed(it):
            for one, other in ((first, far), (far, first), (first, host), (host, first)):
                if family in one.addresses.keys() & other.addresses.keys():
                    assert_moved(one, other, family)


@contextmanager
def narrowed(it: Mesh) -> Iterator[None]:
    """Have the link of the far node take less for the duration, and let everybody forget that it did."""
    first, far = it.pods[FIRST], it.pods[FAR]

    def is_forgotten() -> bool:
        for party in (*it.pods, *it.hosts):
            forget_mtu(party.netns)
        return all(
            pings(one.netns, other.addresses[family], "-M", "do", "-s", str(mtu_of(one) - HEADERS[family]), count=1)
            for one, other in ((first, far), (far, first))
            for family in it.nodes.families.pods
        )

    try:
        with it.nodes.members[FAR].narrowed(NARROW):
            yield
    finally:
        it.nodes.members[FIRST].wait_for(is_forgotten, "the narrow link to be forgotten")


def test_pod_too_large(it: Mesh, kind: str) -> None:
    """Pods whose MTU is larger than the lane's, as after a change of routing, are told by their node what fits."""
    if kind == "direct":
        pytest.skip("there is nothing that takes less than the uplinks")
    for family in it.nodes.families.pods:
        with widened(it, FIRST), widened(it, FAR):
            assert_told(it, kind, family)


def assert_told(it: Mesh, kind: str, family: int) -> None:
    """Assert that the pods of the first and the far node are told what fits."""
    first, _, far = it.pods
    ping = ("ping", "-c", "1", "-W", "5", "-M", "do", "-s", "1452", far.addresses[family])
    refused = first.netns.run(*ping, check=False).stdout
    assert re.search(rf"mtu ?= ?{MTU[kind]}", refused), refused
    forget_mtu(first.netns)
    assert_moved(first, far, family)
    assert_moved(far, first, family)


def assert_moved(one: Party, other: Party, family: int) -> None:
    """Assert that a megabyte arrives as it was sent."""
    sent, received, _ = transfer(one.netns, other.netns, other.addresses[family], 1 << 20, seconds=20)
    assert received == sent, f"{one.name} → {other.name}"


@contextmanager
def widened(it: Mesh, place: int) -> Iterator[None]:
    """Have the link of a node's pod take more, at both ends, for the duration."""
    pod, node = it.wired[place], it.nodes.members[place]
    ends = ((pod.netns, "eth0"), (node.netns, pod.device))
    before = mtu_of(it.pods[place])
    for netns, device in ends:
        netns.run("ip", "link", "set", device, "mtu", "1500")
    try:
        yield
    finally:
        for netns, device in ends:
            netns.run("ip", "link", "set", device, "mtu", str(before))
        forget_mtu(pod.netns)

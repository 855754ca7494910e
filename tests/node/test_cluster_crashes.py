"""The agent is killed with SIGKILL at any step of following its cluster: the next one leaves nothing undone.

Two of the other nodes speak for themselves, without an agent: one on the node's link, and one behind it, by a tunnel of
the kernel's own. Of the rest is only told.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_network

import pytest

from agent.wiring import HOST_MAC
from tests.node.api.node import Node, api_node
from tests.node.api.objects import make_node
from tests.node.forked import start_doomed
from tests.node.machine import Netns, TestPod, own_routes, run
from tests.node.nodes import Entry
from tests.node.programs import wait_settled
from tests.node.steps import labels
from tests.node.traffic import lossless_traffic

OWN = (("10.77.0.0/24", "fd00:77::/64"), ("10.78.0.0/24", "fd00:78::/64"))
ADDRESSES = ("192.0.2.10", "2001:db8::10")
NEAR = Entry("near", ("192.0.2.1", "2001:db8::1"), ("10.244.1.0/24", "fd00:10:244:1::/64"))
FAR = Entry("far", ("198.51.100.1", "2001:db8:f::1"), ("10.244.2.0/24", "fd00:10:244:2::/64"))
Told = tuple[Entry, ...]
ALONE: Told = (Entry("n", ADDRESSES, OWN[0]),)
BEFORE: Told = (
    *(*ALONE, NEAR, FAR),
    Entry("leaves", ("192.0.2.50",), ("10.244.5.0/24", "fd00:10:244:5::/64")),
    Entry("moves", ("192.0.2.60",), ("10.244.6.0/24", "fd00:10:244:6::/64")),
    Entry("gets-others", ("192.0.2.70",), ("10.244.7.0/24", "fd00:10:244:7::/64")),
)
AFTER: Told = (
    *(Entry("n", ADDRESSES, OWN[1]), NEAR, FAR),
    Entry("joins", ("203.0.113.80",), ("10.244.8.0/24", "fd00:10:244:8::/64")),
    Entry("moves", ("203.0.113.60",), ("10.244.6.0/24", "fd00:10:244:6::/64")),
    Entry("gets-others", ("192.0.2.70",), ("10.244.9.0/24", "fd00:10:244:9::/64")),
)
MARKS = {ALONE: "-near", BEFORE: "leaves", AFTER: "joins"}
"""By which a report shows that it is of these nodes, and not of those before; see `tests.node.steps`."""
RATE = 50  # datagrams per second and flow


class Crashes:
    """A node with two pods that live through everything."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._told = ALONE
        self._seen: dict[Told, object] = {}
        self._ages = itertools.count(1)
        self._tell(ALONE)
        node.start_agent()
        self.pods = (node.make_pod("a"), node.make_pod("b"))
        wait_settled(node, *self.pods)
        node.wait_for(self._is_at_rest, "all to come to rest")
        node.kill_agent()

    def _tell(self, nodes: Told) -> None:
        """Have the API server tell of these nodes, and no others, in one report."""
        objects = self.node.api.objects
        age = next(self._ages)
        if objects.nodes:
            objects.put(make_node("n", OWN[self._told == AFTER], ADDRESSES, age=age))
            time.sleep(0.1)  # the source has just reported that, so that it will wait until it has heard of all
        with objects.changed:  # or the source could hear of a part
            for name in objects.nodes.keys() - {each.name for each in nodes}:
                objects.delete(name)
            objects.put(*(make_node(each.name, each.pod_cidrs, each.addresses, age=age) for each in nodes))
        self._told = nodes

    def _is_at_rest(self) -> bool:
        """Note what is seen; say whether it is still so after a while: some things come after the routes."""
        self._seen[self._told] = seen = self.seen()
        time.sleep(0.5)
        return seen["remembered"] == {None, *(each.name for each in self._told)} and self.seen() == seen

    def seen(self) -> dict[str, object]:
        """Return all that depends on the cluster, but for programs, which move to their links by and by."""
        state = self.node.directory / "state"
        return {
            **{kind: lines for kind, lines in self.node.traces().items() if kind != "links"},
            "own": sorted(self.node.native()),
            **{name: keys(self.node, name) for name in ("prefixes", "node_addresses", "uplinks")},
            "tunnels": len(keys(self.node, "tunnels")),
            "tunnel": "podlane.vx" in self.node.netns.run("ip", "-br", "link").stdout,
            "pins": sorted(path.name for path in (self.node.bpffs / "links").glob("podlane.vx*")),
            "files": sorted(path.name for path in state.iterdir() if not path.name.startswith("ipam.db")),
            "remembered": {json.loads(line).get("name") for line in (state / "cluster.json").read_text().splitlines()},
        }

    def steps(self, nodes: Told, *, without: str = "nothing") -> list[int]:
        """Tell of these nodes; return the steps to die before, learned from an agent that does not die.

        Those are left out that match `without`, since they are as in another test.
        """
        start = self.node.log.stat().st_size
        self._begin(nodes, 0)
        self._tell(nodes)
        self.node.wait_for(lambda: ways(self.node) == wanted(nodes), "the node to follow its cluster")
        self.node.wait_for(self._is_at_rest, "all to come to rest")
        found = labels(self.node.log.read_text()[start:])
        self.node.kill_agent()
        chosen = [each for each in choose(found) if not re.search(without, found[each - 1])]
        print(f"{len(chosen)} of {len(found)} steps to {MARKS[nodes]}: {[found[each - 1] for each in chosen]}")
        return chosen

    def die(self, nodes: Told, step: int, since: Told | None = None) -> None:
        """Start an agent, which finds what the one before left undone; tell of these nodes, of which it dies.

        Before that, tell of those that it was `since`. One that gets by with fewer steps is killed afterwards.
        """
        self._begin(nodes, step)
        if since not in (None, self._told):
            self._tell(since)
            self._wait_right()
        self._tell(nodes)
        agent = self.node.agent
        assert agent is not None
        self.node.agent = None  # whose end is no failure
        self.node.wait_for(lambda: agent.poll() is not None or self._is_right(), "the agent to die, or to be done")
        agent.kill()
        assert agent.wait() == -signal.SIGKILL, self.node.log_tail()

    def _begin(self, nodes: Told, step: int) -> None:
        """Start an agent that dies before a step of what it does when told of these nodes; wait until it follows."""
        start_doomed(self.node, "FOLLOW", MARKS[nodes], step)
        self.node.wait_for(lambda: self.node.metrics()[("podlane_cluster_followed", ())] == 1, "the cluster's nodes")
        self._wait_right()

    def recover(self) -> None:
        """Start an agent that finds what the last one left undone, and see it end well."""
        self.node.start_agent()
        self._wait_right()
        assert self.node.repairs() == {}
        self.node.kill_agent()

    def _is_right(self) -> bool:
        return ways(self.node) == wanted(self._told) and self.seen() == self._seen[self._told]

    def _wait_right(self) -> None:
        self.node.wait_for(self._is_right, "all to be as it is when nobody dies")


def keys(node: Node, name: str) -> list[str]:
    """Return the keys of a map, as bpftool prints them."""
    (pin,) = (node.bpffs / "maps").glob(f"{name}:*")
    return sorted(
        str(each["key"]) for each in json.loads(run("bpftool", "-j", "map", "dump", "pinned", str(pin)).stdout)
    )


def ways(node: Node) -> set[str]:
    """Return the prefixes that the node has routes to by podlane's hand, but for its own."""
    return {line.split()[0] for line in own_routes(node.netns) if "/" in line.split()[0]}


def wanted(nodes: Told) -> set[str]:
    """Return the prefixes that the node should have routes to."""
    return {cidr for each in nodes if each.name != "n" for cidr in each.pod_cidrs}


def choose(found: Sequence[str]) -> list[int]:
    """Return the numbers of the steps to die before; of writes to a map, or to files, in a row, the first and another.

    The store is only read, and the directories are there.
    """
    if os.environ.get("PODLANE_CRASH_POINTS") == "all":
        return list(range(1, len(found) + 1))
    chosen = []
    for kind, together in itertools.groupby(enumerate(found, start=1), key=lambda each: each[1]):
        numbers = [number for number, _ in together]
        if kind.startswith(("Map.", "FileIO.")):
            chosen += sorted({numbers[0], numbers[len(numbers) // 2]})
        elif not kind.startswith(("Connection.execute", "mkdir")):
            chosen += numbers
    return chosen


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashes]:
    """Make the node; its agent does not run, and knows of no others."""
    with api_node(tmp_path_factory.mktemp("node")) as node:
        yield Crashes(node)


@pytest.mark.timeout(600)
def test_killed_as_the_tunnel_comes_and_goes(crashes: Crashes) -> None:
    """An agent killed at any step of meeting its first peers, or losing its last ones, leaves the rest to its heir."""
    with lossless_traffic(*crashes.pods, RATE):
        come, go = (crashes.steps(nodes, without="replace_file|rename") for nodes in (BEFORE, ALONE))
        for step in come:
            crashes.die(BEFORE, step, since=ALONE)
            if go:
                crashes.die(ALONE, go.pop(0))
        assert not go
        crashes.recover()


@pytest.mark.timeout(600)
def test_killed_as_the_cluster_changes(crashes: Crashes) -> None:
    """An agent killed at any step of a change disturbs no traffic to peers that stay, by either lane."""
    pod, node = crashes.pods[0], crashes.node
    crashes.die(BEFORE, 0)
    crashes.recover()
    with lossless_traffic(near_pod(node), pod, RATE), lossless_traffic(pod, far_pod(node), RATE):
        for step, nodes in zip(crashes.steps(AFTER), itertools.cycle((BEFORE, AFTER)), strict=False):
            crashes.die(nodes, step)
        crashes.recover()


def near_pod(node: Node) -> TestPod:
    """Let the world be the near node, with a pod."""
    node.world.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    for own, at in zip(OWN[0], ADDRESSES, strict=True):
        node.world.run("ip", "route", "add", own, "via", at)
    return pod_of(NEAR, node.world)


def far_pod(node: Node) -> TestPod:
    """Make the far node behind the world, with a tunnel and a pod."""
    far = node.add_netns("far")
    run("ip", "-n", far.name, "link", "add", "uplink", "type", "veth", "peer", "far", "netns", node.world.name)
    for netns, device, last in ((far, "uplink", "1"), (node.world, "far", "254")):
        netns.run("ip", "address", "add", f"198.51.100.{last}/24", "dev", device)
        netns.run("ip", "link", "set", device, "up")
    far.run("ip", "route", "add", "default", "via", "198.51.100.254")
    kind = ("type", "vxlan", "id", "112", "dstport", "4789", "local", FAR.addresses[0], "remote", ADDRESSES[0])
    far.run("ip", "link", "add", "tunnel", "up", *kind)
    # All nodes' devices have one address, from which none of them may get anything: this one has another.
    rule = 'chain c { type filter hook ingress device "tunnel" priority 0; meta pkttype set host; }'
    far.run("nft", f"table netdev t {{ {rule}\n }}")
    for own, gateway in zip(OWN[0], ("169.254.1.1", "fe80::1"), strict=True):
        far.run("ip", "neigh", "add", gateway, "lladdr", HOST_MAC, "dev", "tunnel")
        far.run("ip", "route", "add", own, "via", gateway, "dev", "tunnel", "onlink")
    return pod_of(FAR, far)


def pod_of(node: Entry, netns: Netns) -> TestPod:
    """Give a node the first addresses of its pod CIDRs, and return what has them as a pod."""
    addresses = [f"{ip_network(cidr)[1]}/{ip_network(cidr).max_prefixlen}" for cidr in node.pod_cidrs]
    for each in addresses:
        netns.run("ip", "address", "add", each, "dev", "lo", *(["nodad"] if ":" in each else []))
    return TestPod(netns, node.name, {"ips": [{"address": each} for each in addresses]})

"""Very many nodes come, go and change without a pause, for a long time: a part of `make soak`.

PODLANE_NODES and PODLANE_CHURN_SECONDS say how many, and how long. `test_peers` has the same in small.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import NamedTuple

import pytest

from agent import netlink
from agent.datapath import libbpf
from agent.datapath.cache import compiled
from agent.datapath.entries import PrefixTable
from agent.datapath.maps import Map
from agent.state import Address, Lanes, PeerRoute, Prefix
from tests.node.api.objects import Object, make_node
from tests.node.api.server import ApiServer
from tests.node.machine import pings
from tests.node.nodes import DUAL, FAR, FIRST, SECOND, Member, Nodes
from tests.node.traffic import lossless_traffic
from tests.support import ROOT

NODES = int(os.environ.get("PODLANE_NODES", "0"))
SECONDS = float(os.environ.get("PODLANE_CHURN_SECONDS", "10"))
PER_SECOND = 10
RATE = 100  # datagrams per second and flow, since all of them wait for the end
GROWTH = 1.1  # of the agent's memory during the churn
PATIENCE = 180.0  # seconds
SEED = 5

pytestmark = pytest.mark.skipif(not NODES, reason="a part of make soak")


class Ways(NamedTuple):
    """What leads to other nodes."""

    prefixes: dict[Prefix, Lanes]
    routes: dict[Prefix, PeerRoute]

    def differing(self, other: Ways) -> list[Prefix]:
        """Return what is not the same in both."""
        pairs = ((self.prefixes, other.prefixes), (self.routes, other.routes))
        return [key for a, b in pairs for key in a.keys() | b.keys() if a.get(key) != b.get(key)]


@dataclass(frozen=True)
class Other:
    """A node that is not really there: `home` numbers its addresses, `block` its pod CIDRs."""

    name: str
    home: int
    block: int

    @property
    def is_near(self) -> bool:
        """Whether it is on the first one's link, by its IPv6 address."""
        return self.home % 2 == 0

    @property
    def addresses(self) -> tuple[Address, Address]:
        """Its own."""
        link = "2001:db8:0:0:1" if self.is_near else "fd01:0:0:0:0"
        texts = f"172.16.{self.home >> 8}.{self.home & 255}", f"{link}::{self.home:x}"
        return ip_address(texts[0]), ip_address(texts[1])

    @property
    def pod_cidrs(self) -> tuple[str, str]:
        """Those of its pods."""
        return f"10.{128 + (self.block >> 8)}.{self.block & 255}.0/24", f"fd00:1:{self.block:x}::/64"

    def node(self) -> Object:
        """Return it as the API server has it."""
        return make_node(self.name, self.pod_cidrs, map(str, self.addresses))

    def ways(self, first: Member, uplink: int, tunnel: int) -> Ways:
        """Return what the first node has because of it; the devices are those of the first node."""
        pods = Lanes(native=True, peer=self.addresses[0], tunnel=0 if self.is_near else tunnel)
        cidrs = [Prefix.of(ip_network(each)) for each in self.pod_cidrs]
        own = [Prefix.of_address(each) for each in self.addresses]
        by_uplink = PeerRoute(uplink, gateway=self.addresses[1])
        by_tunnel = [PeerRoute(tunnel, source=ip_address(each)) for each in first.addresses]
        ways = [by_uplink, by_uplink] if self.is_near else by_tunnel
        prefixes = dict.fromkeys(cidrs, pods) | dict.fromkeys(own, replace(pods, node=True))
        return Ways(prefixes, dict(zip(cidrs, ways, strict=True)))


class Crowd:
    """The model: who is there. What is done to it is told to an API server."""

    def __init__(self, api: ApiServer) -> None:
        self.others: list[Other] = []
        self._api = api
        self._chance = random.Random(SEED)
        self._homes = self._names = 0
        self._free = list(range(2 * NODES))
        self._chance.shuffle(self._free)

    def fill(self) -> None:
        """Have all nodes come at once."""
        self.others = [self._new() for _ in range(NODES)]
        self._api.objects.put(*(each.node() for each in self.others))

    def change(self) -> None:
        """Have a node come, go, get other addresses or other pod CIDRs, which as a rule were another's before."""
        at = self._chance.randrange(len(self.others))
        other = self.others[at]
        match self._chance.choice(["come", "go", "move", "renumber"] if len(self.others) > NODES // 2 else ["come"]):
            case "come":
                self.others.append(self._new())
                self._api.objects.put(self.others[-1].node())
            case "go":
                self._free.append(self.others.pop(at).block)
                self._api.objects.delete(other.name)
            case "move":
                self._put(at, replace(other, home=self._home()))
            case _:
                self._put(at, replace(other, block=self._free.pop()))
                self._free.append(other.block)

    def _put(self, at: int, other: Other) -> None:
        self.others[at] = other
        self._api.objects.put(other.node())

    def _new(self) -> Other:
        self._names += 1
        return Other(f"node-{self._names:05}", self._home(), self._free.pop())

    def _home(self) -> int:
        self._homes += 1
        return self._homes


@dataclass
class Place:
    """The cluster: two nodes that are there, and the first one, which is told of all others by an API server."""

    nodes: Nodes
    first: Member
    api: ApiServer

    def ways(self) -> Ways:
        """Return what the kernel has."""
        (pin,) = (self.first.bpffs / "maps").glob("prefixes:*")
        program = compiled(ROOT / "bpf", self.first.directory / "state" / "cache", defines={})
        spec = replace(next(each for each in program.maps if each.name == "prefixes"), max_entries=1 << 16)
        lanes = {name: program.constants[f"PREFIX_{name.upper()}"] for name in ("native", "stack", "node")}
        descriptor = libbpf.open_pin(pin)
        assert descriptor is not None
        with libbpf.closing(descriptor):
            prefixes = PrefixTable(Map(descriptor, spec), **lanes).read()
        return Ways(prefixes, self.first.netns.call(netlink.PeerRouteTable().read))

    def wait_for(self, base: Ways, crowd: Crowd) -> None:
        """Wait until the kernel has exactly what it had before, and what is of the crowd."""
        uplink, tunnel = self.first.netns.call(lambda: (netlink.index("uplink") or 0, netlink.tunnel_index()))
        wanted = Ways(dict(base.prefixes), dict(base.routes))
        for other in crowd.others:
            its = other.ways(self.first, uplink, tunnel)
            wanted.prefixes.update(its.prefixes)
            wanted.routes.update(its.routes)
        deadline = time.monotonic() + PATIENCE
        while differing := wanted.differing(self.ways()):
            assert time.monotonic() < deadline, f"{len(differing)} ways differ: {differing[:10]}"
            time.sleep(0.1)

    def resident(self) -> int:
        """Return the first agent's memory in KB."""
        assert self.first.agent is not None
        status = Path(f"/proc/{self.first.agent.pid}/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """Make the cluster; its agents are ready."""
    with ExitStack() as stack:
        nodes = Nodes(tmp_path, stack, DUAL)
        nodes.tell()
        first = nodes.members[FIRST]
        (tmp_path / "api").mkdir()
        api = ApiServer(tmp_path / "api", first.netns)
        stack.callback(api.stop)
        api.objects.put(*(make_node(each.name, each.pod_cidrs, each.addresses, age=60) for each in nodes.members))
        first.configure(node_name=first.name, kubernetes={"kubeconfig": str(api.write_kubeconfig())})
        api.start()
        for member in nodes.members:
            member.start_agent(wait=False)
        for member in nodes.members:
            member.wait_ready(PATIENCE)
        yield Place(nodes, first, api)


@pytest.mark.timeout(600 + 2 * SECONDS)
def test_churn(place: Place) -> None:
    """Ten changes a second disturb no other node; then maps and routes are those of who is there, and no more.

    Nor does the agent grow, or take its own work for that of somebody else.
    """
    others = {to: place.nodes.members[to].make_pod() for to in (SECOND, FAR)}
    pods = {to: place.first.make_pod() for to in others}
    place.first.wait_for(lambda: all(pings(pods[to].netns, others[to].addresses[0]) for to in pods), "pods to talk")
    base, crowd = place.ways(), Crowd(place.api)
    crowd.fill()
    place.wait_for(base, crowd)
    with lossless_traffic(pods[SECOND], others[SECOND], RATE), lossless_traffic(pods[FAR], others[FAR], RATE):
        churn(crowd, SECONDS / 4)
        before = place.resident()
        churn(crowd, SECONDS * 3 / 4)
        place.wait_for(base, crowd)
        after = place.resident()
    print(f"{NODES} nodes: resident {before} KB, after {SECONDS:g} s {after} KB")
    assert after < GROWTH * before
    assert place.first.repairs() == {}


def churn(crowd: Crowd, seconds: float) -> None:
    """Change something ten times a second; what was held up is made up for."""
    start = time.monotonic()
    for number in range(round(seconds * PER_SECOND)):
        crowd.change()
        time.sleep(max(start + (number + 1) / PER_SECOND - time.monotonic(), 0))

"""A cluster in namespaces: nodes, each with an agent of its own, two on one link and one behind a router; and a world.

    n1, n2 ── bridge ── router ── n3
                           └───── world

The router knows the way to nodes, and to pods only if it is taught. What is told of the nodes is in the configurations.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.node.machine import START_SECONDS, Machine, Netns, TestPod, run

V4, V6 = 0, 1
BOTH = (V4, V6)
PLACES = FIRST, SECOND, FAR = 0, 1, 2
"""The nodes by their place: the first two are on the link of the bridge, the far one is behind the router."""
WORLD = ("198.51.100.1", "2001:db8:f::1")
MTU = 1500

_BITS = (24, 64)
_SUBNETS = {
    "lan": ("192.0.2.", "2001:db8::"),
    "far": ("203.0.113.", "2001:db8:3::"),
    "out": ("198.51.100.", "2001:db8:f::"),
}
_ROUTER = 254


@dataclass(frozen=True)
class Entry:
    """A node as the others are told of it: an item of `nodes` in their configurations."""

    name: str
    addresses: tuple[str, ...]
    pod_cidrs: tuple[str, ...]

    def item(self) -> dict[str, object]:
        """Return it as the configuration has it."""
        return {"name": self.name, "addresses": list(self.addresses), "pod_cidrs": list(self.pod_cidrs)}


@dataclass(frozen=True)
class Families:
    """Of the addresses that nodes have, and pods."""

    nodes: Sequence[int] = BOTH
    pods: Sequence[int] = BOTH


DUAL = Families()


class Member(Machine):
    """A node of the cluster, plugged into the router, with the `families` of its own addresses and of its pods'.

    The second one is as older and stricter nodes are: it has no tcx, and filters by reverse path.
    """

    def __init__(
        self, directory: Path, stack: ExitStack, router: Netns, number: int, families: Families, **config: object
    ) -> None:
        self.name = f"n{number + 1}"
        self.link = "far" if number == FAR else "lan"
        self.families = families.nodes
        both = (f"10.244.{number + 1}.0/24", f"fd00:10:244:{number + 1}::/64")
        self.pod_cidrs: tuple[str, ...] = tuple(both[family] for family in families.pods)
        self._has_ipv6 = V6 in (*families.nodes, *families.pods)
        self._router = router
        self._is_strict = number == SECOND
        self._config = {"hooks": "clsact", **config} if self._is_strict else config
        self._last = 11 + number
        self._boots = 0
        super().__init__(directory, stack)
        self._plug()

    @property
    def entry(self) -> Entry:
        """What the cluster is told of it."""
        return Entry(self.name, self.addresses, self.pod_cidrs)

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its own addresses, IPv4 first."""
        return tuple(f"{_SUBNETS[self.link][family]}{self._last}" for family in self.families)

    def told(self, entries: Sequence[Entry]) -> None:
        """Write its configuration, with these nodes in it; a running agent reads them again."""
        ranges = [{"subnet": cidr} for cidr in self.pod_cidrs]
        nodes = [each.item() for each in entries]
        self.configure(node_name=self.name, ranges=ranges, nodes=nodes, **self._config)

    def move(self, last: int) -> None:
        """Change its own addresses; they end in `last` from now on."""
        for family in ("-4", "-6"):
            self.netns.run("ip", family, "address", "flush", "dev", "uplink", "scope", "global")
        self._last = last
        self._address()

    def restart_uplink(self) -> None:
        """Set the uplink down and up, and give it its addresses and default routes again, as network managers do."""
        self.netns.run("ip", "link", "set", "uplink", "down")
        self.netns.run("ip", "link", "set", "uplink", "up")
        self.move(self._last)

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Take its link down at the router's end for the duration: both sides lose the carrier."""
        self._router.run("ip", "link", "set", self.name, "down")
        try:
            yield
        finally:
            self._router.run("ip", "link", "set", self.name, "up")

    @contextmanager
    def narrowed(self, mtu: int) -> Iterator[None]:
        """Have its link take less, at both ends, for the duration."""
        self._set_mtu(mtu)
        try:
            yield
        finally:
            self._set_mtu(MTU)

    def _set_mtu(self, mtu: int) -> None:
        self._router.run("ip", "link", "set", self.name, "mtu", str(mtu))
        self.netns.run("ip", "link", "set", "uplink", "mtu", str(mtu))

    def reboot(self, *pods: TestPod) -> None:
        """Take away what a reboot takes: the agent, pods, devices, routes and all that was pinned; no agent runs then.

        The state directory stays, and the next agent sees another boot id.
        """
        self.kill_agent()
        for pod in pods:
            pod.netns.delete()
        self._router.run("ip", "link", "delete", self.name)
        self.netns.delete()
        shutil.rmtree(self.bpffs)
        self.netns = self.add_netns("node")
        self._plug()
        self._boots += 1
        boot_id = self.directory / "boot_id"
        boot_id.write_text(f"boot {self._boots} of {self.name}\n")
        mount = f'mount --bind {boot_id} /proc/sys/kernel/random/boot_id && exec "$@"'
        self.agent_command = ("unshare", "--mount", "sh", "-c", mount, "sh", *self.agent_command[-3:])

    def _plug(self) -> None:
        if not self._has_ipv6:
            self.netns.run("sysctl", "-qw", *(f"net.ipv6.conf.{each}.disable_ipv6=1" for each in ("all", "default")))
        if self._is_strict:
            self.netns.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1")
        link = ["ip", "-n", self._router.name, "link", "add", self.name, "type", "veth"]
        run(*link, "peer", "name", "uplink", "address", f"02:00:00:00:00:{self._last}", "netns", self.netns.name)
        if self.link == "lan":
            self._router.run("ip", "link", "set", self.name, "master", "lan")
        else:
            _give(self._router, self.name, self.link, _ROUTER)
        self._router.run("ip", "link", "set", self.name, "up")
        self.netns.run("ip", "link", "set", "uplink", "up")
        _more_icmp_errors(self.netns)
        self._address()

    def _address(self) -> None:
        _give(self.netns, "uplink", self.link, self._last, self.families)
        for family in self.families:
            self.netns.run("ip", "route", "replace", "default", "via", f"{_SUBNETS[self.link][family]}{_ROUTER}")


class Nodes:
    """The cluster. Nothing runs on its nodes until `start`. `config` is part of every agent's configuration."""

    def __init__(self, directory: Path, stack: ExitStack, families: Families, **config: object) -> None:
        self.families = families
        self.router, self.world = Netns("router"), Netns("world")
        for netns in (self.router, self.world):
            stack.callback(netns.delete)
        self.router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        _more_icmp_errors(self.router)
        bridge = ["address", "02:00:00:00:00:fe"]  # its own address would change with its ports
        self.router.run("ip", "link", "add", "lan", *bridge, "type", "bridge", "mcast_snooping", "0")
        _give(self.router, "lan", "lan", _ROUTER)
        run("ip", "-n", self.router.name, "link", "add", "out", "type", "veth", "peer", "out", "netns", self.world.name)
        _give(self.router, "out", "out", _ROUTER)
        _give(self.world, "out", "out", 1)
        for prefix in _SUBNETS["out"]:
            self.world.run("ip", "route", "add", "default", "via", f"{prefix}{_ROUTER}")
        self.members: list[Member] = []
        for number in PLACES:
            place = directory / f"n{number + 1}"
            place.mkdir()
            self.members.append(Member(place, stack, self.router, number, families, **config))

    def start(self, entries: Sequence[Entry] | None = None) -> None:
        """Start the agents, which are told of these nodes (by default: all of them), and wait until all are ready."""
        self.tell(entries)
        for member in self.members:
            member.start_agent(wait=False)
        for member in self.members:
            member.wait_ready(START_SECONDS * len(self.members))
        for netns in (self.router, self.world, *(member.netns for member in self.members)):
            self.members[FIRST].wait_for(
                partial(_has_usable_addresses, netns), "link-local addresses, without which no neighbour is asked for"
            )

    def tell(self, entries: Sequence[Entry] | None = None) -> None:
        """Tell every agent of these nodes, by default all there are."""
        for member in self.members:
            member.told([each.entry for each in self.members] if entries is None else entries)

    def make_pods(self) -> list[TestPod]:
        """Make a pod on each node."""
        return [member.make_pod(member.name) for member in self.members]

    @contextmanager
    def router_knows_pods(self, *numbers: int) -> Iterator[None]:
        """Let the router know the way to the pods of these nodes for the duration, if it does not yet."""
        ways = [
            (cidr, address)
            for number in numbers
            for cidr in self.members[number].pod_cidrs
            for address in self.members[number].addresses
            if (":" in cidr) == (":" in address)
            if not self.router.run("ip", "-6" if ":" in cidr else "-4", "route", "show", cidr).stdout
        ]
        for cidr, address in ways:
            self.router.run("ip", "route", "add", cidr, "via", address)
        try:
            yield
        finally:
            for cidr, _ in ways:
                self.router.run("ip", "route", "delete", cidr)


@contextmanager
def nodes(directory: Path, families: Families = DUAL, **config: object) -> Iterator[Nodes]:
    """Yield a cluster in a directory of its own; its agents do not run yet."""
    with ExitStack() as stack:
        yield Nodes(directory, stack, families, **config)


def _give(netns: Netns, device: str, link: str, last: int, families: Sequence[int] = BOTH) -> None:
    """Give a device, which is then up, the addresses of a link that end in `last`."""
    for family in families:
        address = f"{_SUBNETS[link][family]}{last}/{_BITS[family]}"
        netns.run("ip", "address", "add", address, "dev", device, *(["nodad"] if family == V6 else []))
    netns.run("ip", "link", "set", device, "up")


def _has_usable_addresses(netns: Netns) -> bool:
    """Say whether no IPv6 address waits any more for somebody else to say that it is theirs, as those of links do."""
    return not netns.run("ip", "-6", "address", "show", "tentative").stdout


def _more_icmp_errors(netns: Netns) -> None:
    """Have as many errors as there are reasons: left alone, the kernel sends one a second to each destination."""
    netns.run("sysctl", "-qw", "net.ipv4.icmp_ratelimit=0", "net.ipv6.icmp.ratelimit=0")

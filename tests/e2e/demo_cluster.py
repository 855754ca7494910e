"""The demo's story of three nodes: who reaches whom, by which lane, as the datapath itself has counted."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import ip_address, ip_network
from pathlib import Path

from tests.e2e.cluster_of_one import fetch, url
from tests.e2e.cluster_of_three import Cluster, cluster_of_three, fetch_from
from tests.e2e.containerd import Pod
from tests.e2e.remains import Remains
from tests.e2e.story import Story
from tests.e2e.world import world_server
from tests.node.nodes import BOTH, FAR, FIRST, SECOND, V4, WORLD

_PICTURE = """\
podlane: one flat network of three nodes, wired by eBPF

    ╭─ n1 ────────────╮  ╭─ n2 ────────────╮               ╭─ n3 ────────────╮
    │  pod a   pod b  │  │  pod c          │               │  pod d          │
    │   ╰──┬─────╯    │  │   │             │               │   │             │
    │   agent, eBPF   │  │   agent, eBPF   │               │   agent, eBPF   │
    ╰──────┬──────────╯  ╰──────┬──────────╯               ╰──────┬──────────╯
           ╰─────── one link ───┴───────────── router ────────────╯
                                                 ╰─────────── the world
    on one node: local      on one link: direct      behind a router: vxlan"""

_PLACES = {"a": FIRST, "b": FIRST, "c": SECOND, "d": FAR}
"""Pods, and the nodes that they run on."""

_LANES = {
    "local": ("fwd_local",),
    "direct": ("fwd_uplink", "fwd_inbound"),
    "vxlan": ("fwd_tunnel", "fwd_from_peer"),
}
"""What a node counts when one of its pods asks another one, and is answered, by each of them."""

_BETWEEN = {
    frozenset((FIRST,)): "local",
    frozenset((FIRST, SECOND)): "direct",
    frozenset((FIRST, FAR)): "vxlan",
    frozenset((SECOND, FAR)): "vxlan",
}
"""Which lane should be between which nodes."""

_TUNNEL_PORT, _TUNNEL_NUMBER = 4789, 112
_FORGED = 5  # packets
_PINGS, _PING_PAUSE = 60, "0.05"  # seconds


def tell(story: Story, home: Path, stack: ExitStack) -> Remains:
    """Tell all steps in a directory of their own; return what must be gone after the stack is closed."""
    story.say(_PICTURE)
    cluster = stack.enter_context(cluster_of_three(home))
    _Steps(story, cluster).tell()
    return Remains.of(home, cluster.nodes.members, cluster.runtimes, [cluster.nodes.router, cluster.nodes.world])


class _Steps:
    """The steps of the story, in their order; each builds on those before it."""

    def __init__(self, story: Story, cluster: Cluster) -> None:
        self._story = story
        self._cluster = cluster
        self._members = cluster.nodes.members
        self._pods: dict[str, Pod] = {}

    def tell(self) -> None:
        """Tell all of them."""
        self._start_nodes()
        self._start_pods()
        self._fetch_pages()
        self._visit_nodes()
        self._visit_world()
        self._forge()
        self._leave_and_join()

    def _start_nodes(self) -> None:
        story = self._story
        with story.step("Three nodes, each with containerd and podlane's agent; each agent is told who the nodes are"):
            start = time.monotonic()
            self._cluster.start()
            story.note(f"all ready after {time.monotonic() - start:.1f} s")
            for member in self._members:
                story.note(f"{member.name}  {' '.join(member.addresses):28}  pods in {' and '.join(member.pod_cidrs)}")
            story.command("n1", "ip route show proto 111    # podlane's own routes to the others")
            shown = self._members[FIRST].netns.run("ip", "route", "show", "proto", "111").stdout
            for place, device in ((SECOND, "uplink"), (FAR, "podlane.vx")):
                cidr = self._members[place].pod_cidrs[V4]
                line = story.find(f"a route to {cidr}", f"{cidr} .*", shown)
                found = story.find("its device", r"dev (\S+)", line)
                story.fact(f"the device to {cidr}", expected=device, seen=found, shown=line.strip())

    def _start_pods(self) -> None:
        story = self._story
        with story.step("Four pods, started through CRI as kubelets do"):
            for name, place in _PLACES.items():
                pod, member = self._cluster.runtimes[place].run_pod(name), self._members[place]
                self._pods[name] = pod
                within = [str(address) for address in pod.ips if _is_within(address, member.pod_cidrs)]
                shown = f"pod {name} on {member.name} has {' and '.join(pod.ips)}"
                story.fact(f"pod {name}'s addresses in its node's range", expected=pod.ips, seen=within, shown=shown)
            mtu = self._pods["a"].exec(["cat", "/sys/class/net/eth0/mtu"]).stdout.strip()
            story.fact("the pods' MTU", expected="1450", seen=mtu, shown=f"their MTU is {mtu}: 1500, less VXLAN's 50")

    def _fetch_pages(self) -> None:
        story = self._story
        with story.step("Each fetches the page of each other, by IPv4 and IPv6: by which lane, the counters tell"):
            rows: list[Sequence[str]] = [("who → whom", "lane", "IPv4", "IPv6", "counted by the asking node")]
            for here in self._pods.values():
                for there in self._pods.values():
                    if here is not there:
                        rows.append(self._meet(here, there))
            story.table(rows)
            met = len(rows) - 1
            story.fact(
                "pairs", expected=12, seen=met, shown=f"{met} pairs, both families: every page was the right one"
            )

    def _meet(self, here: Pod, there: Pod) -> Sequence[str]:
        """Fetch a page by both families, and check the lane; return the row that tells of it."""
        story, member, other = self._story, self._members[_PLACES[here.name]], self._members[_PLACES[there.name]]
        expected = _BETWEEN[frozenset((_PLACES[here.name], _PLACES[there.name]))]
        packets, counted = [], dict.fromkeys(_LANES[expected], 0)
        for address in there.ips:
            before = member.packets()
            page = fetch(here, address)
            after = member.packets()
            grown = {name: after[name] - before[name] for name in after}
            story.check(f"the page that {here.name} gets from {address}", expected=there.name, seen=page)
            story.check(f"the lane from {here.name} to {address}", expected=expected, seen=_lane(grown))
            packets.append(sum(grown[name] for name in _LANES[expected]))
            counted = {name: count + grown[name] for name, count in counted.items()}
        who = f"{here.name} on {member.name} → {there.name} on {other.name}"
        return (who, expected, *map(str, packets), ", ".join(f"{name} {count}" for name, count in counted.items()))

    def _visit_nodes(self) -> None:
        story, a = self._story, self._pods["a"]
        with story.step("Pods and nodes reach each other as what they are: within the cluster nothing is masqueraded"):
            for member in (self._members[SECOND], self._members[FAR]):
                with world_server(member.netns) as server:
                    for family in BOTH:
                        address = member.addresses[family]
                        story.command("a", f"wget -qO- {url(address)}    # {member.name} itself")
                        fetch(a, address)
                        shown = f"{member.name} has logged a visit of {server.clients[-1]}: the pod's own address"
                        story.fact("who visited", expected=a.ips[family], seen=server.clients[-1], shown=shown)
            for name in ("c", "d"):
                for address in self._pods[name].ips:
                    page = fetch_from(self._members[FIRST].netns, address)
                    shown = f"n1$ wget -qO- {url(address)}".ljust(48) + f" ▶ {page}"
                    story.fact(f"the page that n1 gets from {address}", expected=name, seen=page, shown=shown)
            masqueraded = sum(member.packets()["masq_out"] for member in self._members)
            story.fact("packets masqueraded so far", expected=0, seen=masqueraded)

    def _visit_world(self) -> None:
        story = self._story
        with story.step("The world sees the nodes"), world_server(self._cluster.nodes.world) as server:
            for name in ("a", "c", "d"):
                member = self._members[_PLACES[name]]
                for family in BOTH:
                    page = fetch(self._pods[name], WORLD[family])
                    story.check(f"the page that {name} gets", expected="the world", seen=page)
                    seen = server.clients[-1]
                    shown = f"{name}$ wget -qO- {url(WORLD[family])}".ljust(48) + f" ▶ seen as {seen}, {member.name}"
                    story.fact("who visited", expected=member.addresses[family], seen=seen, shown=shown)

    def _forge(self) -> None:
        story, member = self._story, self._members[FIRST]
        with story.step("What comes through the tunnel is believed only if the node sent it that has the source"):
            a, d = self._pods["a"], self._pods["d"]
            before = member.packets()["drop_forged_peer"]
            story.note(f"the world sends n1 VXLAN packets, inside of which d ({d.ips[V4]}) seems to write to a")
            sender = self._cluster.nodes.world.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with sender:
                for _ in range(_FORGED):
                    sender.sendto(_wrapped(d.ips[V4], a.ips[V4]), (member.addresses[V4], _TUNNEL_PORT))
            member.wait_for(lambda: member.packets()["drop_forged_peer"] >= before + _FORGED, "n1 to count them")
            dropped = member.packets()["drop_forged_peer"] - before
            story.fact("forged packets dropped", expected=_FORGED, seen=dropped, shown=f"drop_forged_peer: {dropped}")

    def _leave_and_join(self) -> None:
        story, nodes = self._story, self._cluster.nodes
        a, c, d = (self._pods[name] for name in "acd")
        with story.step("A node leaves and comes back. The others do not notice"), ThreadPoolExecutor(1) as pool:
            story.command("a", f"ping -c {_PINGS} -i {_PING_PAUSE} {c.ips[V4]} &")
            pings = pool.submit(a.exec, ["ping", "-c", str(_PINGS), "-i", _PING_PAUSE, c.ips[V4]])
            nodes.tell([member.entry for member in self._members[:FAR]])
            self._members[FIRST].wait_for(lambda: not self._knows_far(), "n3 to be forgotten")
            shown = "n3 is no longer listed, and n1 has no route to its pods"
            story.fact("n1 has a route to n3's pods", expected=False, seen=self._knows_far(), shown=shown)
            nodes.tell()
            self._members[FIRST].wait_for(self._knows_far, "n3 to be known again")
            page = fetch(a, d.ips[V4])
            shown = f"n3 is listed again: a$ wget -qO- {url(d.ips[V4])} ▶ {page}"
            story.fact("the page that a gets from d", expected="d", seen=page, shown=shown)
            result = story.find("a summary of the pings", ".*packets transmitted.*", pings.result().stdout)
            lost = story.find("packet loss", r"(\d+)% packet loss", result)
            story.fact("packet loss from a to c in %", expected="0", seen=lost, shown=f"a to c: {result}")

    def _knows_far(self) -> bool:
        cidr = self._members[FAR].pod_cidrs[V4]
        return bool(self._members[FIRST].netns.run("ip", "route", "show", cidr).stdout)


def _lane(grown: Mapping[str, int]) -> str:
    """Return the lane whose outcomes have grown most: the end of an earlier connection may be counted late."""
    return max(_LANES, key=lambda lane: min(grown[name] for name in _LANES[lane]))


def _is_within(address: str, cidrs: Sequence[str]) -> bool:
    return any(ip_address(address) in ip_network(cidr) for cidr in cidrs)


def _wrapped(source: str, destination: str) -> bytes:
    """Return what a datagram of VXLAN holds (RFC 7348 section 5): here an IPv4 header, and no more."""
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20, 0, 0, 64, socket.IPPROTO_ICMP, 0)
    packet = header + ip_address(source).packed + ip_address(destination).packed
    return struct.pack("!II", 0x08000000, _TUNNEL_NUMBER << 8) + bytes(12) + b"\x08\x00" + packet

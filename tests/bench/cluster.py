"""What a cluster of thousands of nodes costs one of them: time to follow it, memory, CPU time, and what pods notice."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.bench.places import Podlane, sink
from tests.bench.world import Visitor
from tests.node.api.objects import Object, make_node
from tests.node.api.server import ApiServer
from tests.node.machine import Machine, Netns

Measure = Callable[[], float]
NODES = 5000
CHURN_PER_SECOND = 10
_SECONDS = 10  # of each measurement of CPU time
_PACKETS = 60_000
_VXLAN = 4789
_TICKS = os.sysconf("SC_CLK_TCK")
_OWN = ("10.77.0.0/24", "fd00:77::/64")
# The two others that answer: one on the link of the uplink, one behind the router. Both are the world.
_ON_LINK = ("192.0.2.1", "2001:db8::1")
_FAR = ("198.51.100.1",)
_PODS = {"direct": ("10.78.0.7", "fd00:78::7"), "tunnel": ("10.79.0.7", "fd00:79::7")}


class Member:
    """A node with an API server of its own, whose cluster has two others to begin with."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        directory.mkdir()
        (directory / "api").mkdir()
        self._machine = Machine(directory, stack)
        self.world = self._machine.add_world()
        self.api = ApiServer(directory / "api", self._machine.netns)
        stack.callback(self.api.stop)
        kubeconfig = self.api.write_kubeconfig()
        self._machine.configure(node_name="n", resync_seconds=5.0, kubernetes={"kubeconfig": str(kubeconfig)})
        self.api.objects.put(
            make_node("n", _OWN, ["192.0.2.10", "2001:db8::10"]),
            make_node("near", ["10.78.0.0/24", "fd00:78::/64"], _ON_LINK),
            make_node("far", ["10.79.0.0/24", "fd00:79::/64"], _FAR),
        )
        self.api.start()
        self.runtime = Podlane(self._machine)

    def start(self) -> None:
        """Start the agent; return when it is ready."""
        self._machine.start_agent()

    def wait_for(self, nodes: int) -> None:
        """Wait until the ways to so many others are in force."""
        self._machine.wait_for(lambda: self._routes() == 2 * nodes, f"the routes to {nodes} nodes", 120)

    def _routes(self) -> int:
        shown = (self._machine.netns.run("ip", each, "route", "show", "proto", "111").stdout for each in ("-4", "-6"))
        return sum("via" in line or "podlane.vx" in line for text in shown for line in text.splitlines())

    def resident(self) -> float:
        """Return the agent's memory in MB."""
        line = next(each for each in self._process("status").splitlines() if each.startswith("VmRSS:"))
        return int(line.split()[1]) / 1024

    def processor(self) -> float:
        """Return the processor time, in seconds, that the agent has used so far."""
        user, system = self._process("stat").rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICKS

    def _process(self, file: str) -> str:
        assert self._machine.agent
        return Path(f"/proc/{self._machine.agent.pid}/{file}").read_text()


def follow(alone: Member, crowded: Member) -> Iterator[str]:
    """Start both agents, the second one in the large cluster, and yield lines that tell what that took."""
    alone.start()
    alone.wait_for(2)
    crowded.api.objects.put(*(_node(number) for number in range(NODES - 2)))
    start = time.perf_counter()
    crowded.start()
    crowded.wait_for(NODES)
    seconds = time.perf_counter() - start
    yield f"\n{NODES:,} nodes with two pod CIDRs of 110 pods each, as the API server lists them"
    yield f"  from the agent's start to the last way in force: {seconds:.1f} s, {crowded.processor():.1f} s of CPU time"
    time.sleep(2 * _SECONDS)
    yield f"  resident: {crowded.resident():.1f} MB, with 2 nodes {alone.resident():.1f} MB"
    yield f"  idle: {_share(crowded, time.sleep, _SECONDS):.2%} of a processor"
    churn = _share(crowded, lambda seconds: _churn(crowded.api, seconds), _SECONDS)
    yield f"  {CHURN_PER_SECOND} nodes come or go per second: {churn:.2%} of a processor"
    crowded.wait_for(NODES)
    yield f"  resident after that: {crowded.resident():.1f} MB"


def _share(member: Member, work: Callable[[float], None], seconds: float) -> float:
    start, used = time.perf_counter(), member.processor()
    work(seconds)
    return (member.processor() - used) / (time.perf_counter() - start)


def _churn(api: ApiServer, seconds: float) -> None:
    """Have nodes go and come again."""
    deadline, gone = time.perf_counter() + seconds, 0
    while time.perf_counter() < deadline or gone % 2:
        number = gone // 2 * 7
        if gone % 2:
            api.objects.put(_node(number))
        else:
            api.objects.delete(f"node-{number:05}")
        gone += 1
        time.sleep(1 / CHURN_PER_SECOND)


def _node(number: int) -> Object:
    cidrs = [f"10.{128 + (number >> 8)}.{number & 255}.0/24", f"fd00:1:{number:x}::/64"]
    return make_node(f"node-{number:05}", cidrs, [f"172.16.{number >> 8}.{number & 255}", f"fd01::{number:x}"])


def measures(visitors: Mapping[str, Visitor], sender: Path, stack: ExitStack) -> dict[str, dict[str, Measure]]:
    """Return, by lane and family, what measures a packet's cost once. Nobody reads what arrives."""
    found: dict[str, dict[str, Measure]] = {}
    for name, each in visitors.items():
        stack.enter_context(sink(each.world, _FAR[0], _VXLAN))
        for lane, addresses in _PODS.items():
            for address in addresses:
                if lane == "direct":
                    each.world.run("ip", "address", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
                    stack.enter_context(sink(each.world, address))
                title = f"{lane}, IPv{6 if ':' in address else 4}"
                found.setdefault(title, {})[name] = _cost(each.pod, address, sender)
    return found


def _cost(pod: Netns, address: str, sender: Path) -> Measure:
    return lambda: float(pod.run("taskset", "-c", "1", str(sender), address, str(_PACKETS)).stdout)

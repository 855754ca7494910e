"""What it costs a pod to talk to the world, masqueraded: CPU per packet, throughput, round trips, connections."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.bench.places import Runtime, sink
from tests.node.machine import Netns, run

Measure = Callable[[], float]
WORLD = "192.0.2.1"
CONNECTIONS, ROUNDS = 2000, 10_000


@dataclass(frozen=True)
class Visitor:
    """A pod, and the world that its node leads to."""

    pod: Netns
    world: Netns


def visitor(runtime: Runtime, stack: ExitStack) -> Visitor:
    """Wire a pod of a node that has an uplink."""
    pod = Netns("bench")
    stack.callback(pod.delete)
    runtime.add(pod)
    return Visitor(pod, runtime.world)


def measures(
    visitors: Mapping[str, Visitor], directory: Path, sender: Path, stack: ExitStack
) -> dict[str, dict[str, Measure]]:
    """Return, by title and candidate, what measures it once. The servers run until `stack` ends."""
    talk = directory / "talk"
    run("gcc", "-O2", "-o", str(talk), str(Path(__file__).with_name("talk.c")))
    for each in visitors.values():
        stack.enter_context(sink(each.world, WORLD))
        for command in ((str(talk), "serve", WORLD), ("iperf3", "-s", "-B", WORLD)):
            server = subprocess.Popen(
                each.world.command(*command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            stack.callback(server.wait)
            stack.callback(server.kill)
    return {
        "CPU time per 18-byte UDP packet (ns)": {
            name: _printed(each.pod, "taskset", "-c", "1", str(sender), WORLD, "60000")
            for name, each in visitors.items()
        },
        "TCP throughput, one stream (Gb/s)": {name: _throughput(each.pod) for name, each in visitors.items()},
        "TCP round trip of one byte (µs)": {
            name: _printed(each.pod, str(talk), "rr", WORLD, str(ROUNDS)) for name, each in visitors.items()
        },
        "TCP connections, one after the other (per second)": {
            name: _printed(each.pod, str(talk), "crr", WORLD, str(CONNECTIONS)) for name, each in visitors.items()
        },
    }


def _printed(pod: Netns, *command: str) -> Measure:
    return lambda: float(pod.run(*command).stdout)


def _throughput(pod: Netns) -> Measure:
    def measure() -> float:
        report = json.loads(pod.run("iperf3", "-c", WORLD, "-t", "1", "-J").stdout)
        return float(report["end"]["sum_received"]["bits_per_second"]) / 1e9

    return measure

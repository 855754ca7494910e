"""The benchmark: podlane against a bare veth pair and the reference plugins, interleaved, medians and ratios.

Each round measures every candidate once, in a random order, so that a busy moment of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from tests.bench import cluster, world
from tests.bench.places import Pair, Reference, Runtime, direct, host_local, joined, podlane, sink
from tests.node.machine import Netns, run

SENDER = Path(__file__).with_name("sender.c")
PACKETS = 60_000
SETTLE_SECONDS = 3  # until podlane has moved new pods' programs to where they stay

Measure = Callable[[], float]


def main() -> None:
    """Run what the command line asks for, by default everything."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parts = ["packets", "calls", "world", "cluster"]
    parser.add_argument("what", nargs="*", choices=[*parts, []], default=parts)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="podlane-bench-") as directory, ExitStack() as stack:
        places = Path(directory)
        sender = places / "sender"
        run("gcc", "-O2", "-o", str(sender), str(SENDER))
        if "cluster" in arguments.what:
            _cluster(places, sender, arguments.rounds)
        if set(arguments.what) <= {"cluster"}:
            return
        ours: dict[str, Runtime] = {
            "podlane": podlane(places / "auto", stack),
            "podlane (tcx)": podlane(places / "tcx", stack, hooks="tcx"),
            "podlane (clsact)": podlane(places / "clsact", stack, hooks="clsact"),
            "with host-local": podlane(places / "host-local", stack, ipam=host_local(87)),
        }
        peers: dict[str, Runtime] = {
            "bridge": Reference(places / "bridge", stack, "bridge", 88, bridge="br0", isGateway=True, ipMasq=True),
            "ptp": Reference(places / "ptp", stack, "ptp", 89, ipMasq=True),
        }
        if "packets" in arguments.what:
            _packets(sender, ours | peers, arguments.rounds, stack)
        if "world" in arguments.what:
            _world(places, sender, {name: (ours | peers)[name] for name in ("podlane", "bridge")}, arguments.rounds)
        if "calls" in arguments.what:
            _calls(ours | peers, arguments.rounds)


def _cluster(places: Path, sender: Path, rounds: int) -> None:
    with ExitStack() as stack:
        alone, crowded = (cluster.Member(places / name, stack) for name in ("alone", "crowded"))
        for line in cluster.follow(alone, crowded):
            print(line, flush=True)
        members: dict[str, Runtime] = {"2 others": alone.runtime, f"{cluster.NODES:,} others": crowded.runtime}
        _calls(members, rounds, "2 others")
        senders = {name: world.visitor(each, stack) for name, each in members.items()}
        time.sleep(SETTLE_SECONDS)
        for title, measures in cluster.measures(senders, sender, stack).items():
            _report(f"CPU time per 18-byte UDP packet to a pod elsewhere, {title}", "ns", measures, rounds, "2 others")


def _world(places: Path, sender: Path, runtimes: Mapping[str, Runtime], rounds: int) -> None:
    with ExitStack() as stack:
        visitors = {name: world.visitor(runtime, stack) for name, runtime in runtimes.items()}
        time.sleep(SETTLE_SECONDS)
        for title, measures in world.measures(visitors, places, sender, stack).items():
            _report(f"Masqueraded to the world: {title}", "", measures, rounds, "bridge")


def _packets(sender: Path, runtimes: Mapping[str, Runtime], rounds: int, stack: ExitStack) -> None:
    pairs = {"direct veth": direct(stack), **{name: joined(each, stack) for name, each in runtimes.items()}}
    time.sleep(SETTLE_SECONDS)
    for family, name in enumerate(("IPv4", "IPv6")):
        measures = {label: _cost(pair, family, sender, stack) for label, pair in pairs.items()}
        _report(f"CPU time per 18-byte UDP packet, {name}, pod to pod", "ns", measures, rounds, "direct veth")


def _cost(pair: Pair, family: int, sender: Path, stack: ExitStack) -> Measure:
    """Return a measure of the sender's CPU time per packet to a bound socket that nobody reads."""
    address = pair.addresses[family]
    stack.enter_context(sink(pair.b, address))
    return lambda: float(pair.a.run("taskset", "-c", "1", str(sender), address, str(PACKETS)).stdout)


def _calls(runtimes: Mapping[str, Runtime], rounds: int, reference: str = "bridge") -> None:
    results: dict[str, dict[str, list[float]]] = {}
    names = list(runtimes)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            for command, milliseconds in _life(runtimes[name]).items():
                results.setdefault(command, {}).setdefault(name, []).append(milliseconds)
    for command, rows in results.items():
        _table(f"CNI {command}, whole process", "ms", {name: rows[name] for name in runtimes}, reference)


def _life(runtime: Runtime) -> dict[str, float]:
    """Return how many milliseconds each call took in the life of a pod."""
    netns = Netns("bench")
    try:
        return {
            "ADD": _milliseconds(lambda: runtime.add(netns)),
            "CHECK": _milliseconds(lambda: runtime.check(netns)),
            "DEL": _milliseconds(lambda: runtime.delete(netns)),
        }
    finally:
        netns.delete()


def _milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _interleaved(measures: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    results: dict[str, list[float]] = {name: [] for name in measures}
    names = list(measures)
    for _ in range(rounds):
        random.shuffle(names)
        for name in names:
            results[name].append(measures[name]())
    return results


def _report(title: str, unit: str, measures: Mapping[str, Measure], rounds: int, reference: str) -> None:
    _table(title, unit, _interleaved(measures, rounds), reference)


def _table(title: str, unit: str, rows: Mapping[str, list[float]], reference: str) -> None:
    base = statistics.median(rows[reference])
    inside = "; ".join(filter(None, [unit, f"{len(rows[reference])} rounds, interleaved"]))
    print(f"\n{title} ({inside})")
    print(f"  {'':18}{'minimum':>10}{'median':>10}{'maximum':>10}{'ratio to ' + reference:>24}")
    for name, values in rows.items():
        median = statistics.median(values)
        print(f"  {name:18}{min(values):10.1f}{median:10.1f}{max(values):10.1f}{median / base:24.3f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

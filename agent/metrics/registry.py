"""All metrics of one agent."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from agent.cluster import Cluster
from agent.collector import Collector
from agent.datapath.tables import Masqueraded
from agent.gc import Reason
from agent.metrics.scraped import Flows, Outcomes, Pods, Traffic, Usage
from agent.node import Readiness
from agent.peers import FAMILIES, Lane, Peers
from agent.state import Uplink

# ADD takes some milliseconds; what matters is when it does not.
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS")
_REPAIR_KINDS = (
    "devices",
    "endpoints",
    "gateways",
    "hooks",
    "host_ports",
    "neighbours",
    "node_addresses",
    "peer_routes",
    "prefixes",
    "queues",
    "routes",
    "settings",
    "sockets",
    "subnets",
    "sysctls",
    "tunnel_devices",
    "tunnels",
    "uplinks",
)


class Metrics:
    """All metrics of one agent, in a registry of its own."""

    def __init__(self, version: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each, which nobody reads
        self.registry = CollectorRegistry()
        self._operations = Counter(
            "podlane_cni_operations", "CNI calls served.", ["command", "result"], registry=self.registry
        )
        self._latency = Histogram(
            "podlane_cni_operation_duration_seconds",
            "Time to serve a CNI call.",
            ["command"],
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self._repairs = Counter(
            "podlane_repairs", "Kernel objects changed behind podlane's back and put right.", ["kind"],
            registry=self.registry,
        )  # fmt: skip
        self._gc_released = Counter(
            "podlane_gc_released", "Attachments released without a DEL, by the agent itself.", ["reason"],
            registry=self.registry,
        )  # fmt: skip
        self._phases = Gauge(
            "podlane_start_duration_seconds",
            "Time the phases of the last start took.",
            ["phase"],
            registry=self.registry,
        )
        self._ready = Gauge("podlane_ready", "1 if ADD can be served.", registry=self.registry)
        self._peers = Gauge(
            "podlane_cluster_peers", "Other nodes, by the lane that leads to their pods.", ["lane", "family"],
            registry=self.registry,
        )  # fmt: skip
        self._nodes = Gauge("podlane_cluster_nodes", "Other nodes that are known.", registry=self.registry)
        self._refused = Gauge(
            "podlane_cluster_nodes_refused", "Nodes, this one among them, that are refused what they claim.",
            registry=self.registry,
        )  # fmt: skip
        build = Gauge(
            "podlane_build_info", "Always 1; the labels say what runs.", ["version", "python", "kernel"],
            registry=self.registry,
        )  # fmt: skip
        build.labels(version, platform.python_version(), platform.release()).set(1)
        for kind in _REPAIR_KINDS:
            self._repairs.labels(kind)
        for reason in Reason:
            self._gc_released.labels(reason)

    def observe_call(self, command: str, exit_code: int, seconds: float) -> None:
        """Count a CNI call. Commands that do not exist share one label value, so that nobody can invent labels."""
        label = command if command in _COMMANDS else "other"
        self._operations.labels(label, "error" if exit_code else "success").inc()
        self._latency.labels(label).observe(seconds)

    def repaired(self, kind: str, count: int) -> None:
        """Count objects put right; `kind` is the name of a table."""
        self._repairs.labels(kind).inc(count)

    def gc_released(self, reason: Reason) -> None:
        """Count an attachment that the self-GC has released."""
        self._gc_released.labels(reason).inc()

    def start_phase(self, phase: str, seconds: float) -> None:
        """Record how long a phase of the start took."""
        self._phases.labels(phase).set(seconds)

    def watch_readiness(self, readiness: Readiness) -> None:
        """Read at every scrape whether ADD can be served, as the probe does."""
        self._ready.set_function(lambda: not readiness.reason)

    def watch_cluster(self, cluster: Callable[[], Cluster], peers: Callable[[], Peers]) -> None:
        """Read at every scrape which other nodes are known, and how they are reached."""
        for lane, family in product(get_args(Lane), FAMILIES):
            count = partial(_count, peers, (lane, family))
            self._peers.labels(lane, f"ipv{family}").set_function(count)
        self._nodes.set_function(lambda: len(cluster().peers))
        self._refused.set_function(lambda: len(cluster().refused.keys() | peers().refused.keys()))

    def watch_source(self, is_followed: Callable[[], bool]) -> None:
        """Likewise, whether the cluster that the configuration names is followed at present."""
        self._followed = Gauge(
            "podlane_cluster_followed", "1 if changes of the cluster arrive.", registry=self.registry
        )
        self._followed.set_function(is_followed)

    def watch(self, outcomes: Outcomes, usage: Usage, pods: Pods) -> None:
        """Read these at every scrape, rather than keep copies of them."""
        self.registry.register(Traffic(outcomes, usage, pods))

    def watch_masquerade(
        self, flows: Collector, masqueraded: Callable[[], Masqueraded], uplinks: Callable[[], Mapping[str, Uplink]]
    ) -> None:
        """Likewise; of flows, what the last scan left."""
        self.registry.register(Flows(flows, masqueraded, uplinks))


def _count(peers: Callable[[], Peers], key: tuple[Lane, int]) -> int:
    return peers().counts.get(key, 0)

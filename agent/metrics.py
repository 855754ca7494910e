"""What Prometheus scrapes, and the two probes. Names follow prometheus.io/docs/practices/naming."""

from __future__ import annotations

import platform
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, get_args
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    make_wsgi_app,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.cluster import Cluster
from agent.collector import Census
from agent.collector import Collector as FlowCollector
from agent.datapath.tables import Masqueraded
from agent.expiry import PROTOCOLS
from agent.gc import Reason
from agent.node import Readiness
from agent.peers import FAMILIES, Lane, Peers
from agent.ranges import Range
from agent.state import KernelError, Uplink
from agent.store import Pod, StoreError

# ADD takes some milliseconds; what matters is when it does not.
_LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_CONNECTIONS = 64  # at a time, of scrapers and probes
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

Outcomes = Callable[[], Mapping[str, tuple[int, int]]]
"""Returns packets and bytes by outcome."""
Pods = Callable[[], Sequence[Pod]]


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
            "podlane_cluster_nodes_refused", "Nodes, this one among them, that claim what is another's.",
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
        self._refused.set_function(lambda: len(cluster().refused))

    def watch_source(self, is_followed: Callable[[], bool]) -> None:
        """Likewise, whether the cluster that the configuration names is followed at present."""
        self._followed = Gauge(
            "podlane_cluster_followed", "1 if changes of the cluster arrive.", registry=self.registry
        )
        self._followed.set_function(is_followed)

    def watch(self, outcomes: Outcomes, usage: Callable[[], list[tuple[Range, int]]], pods: Pods) -> None:
        """Read these at every scrape, rather than keep copies of them."""
        self.registry.register(_Scraped(outcomes, usage, pods))

    def watch_masquerade(
        self, flows: FlowCollector, masqueraded: Callable[[], Masqueraded], uplinks: Callable[[], Mapping[str, Uplink]]
    ) -> None:
        """Likewise; of flows, what the last scan left."""
        self.registry.register(_Masquerade(flows, masqueraded, uplinks))


def _count(peers: Callable[[], Peers], key: tuple[Lane, int]) -> int:
    return peers().counts.get(key, 0)


class _Scraped(Collector):
    def __init__(self, outcomes: Outcomes, usage: Callable[[], list[tuple[Range, int]]], pods: Pods) -> None:
        self._outcomes = outcomes
        self._usage = usage
        self._pods = pods

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        packets = CounterMetricFamily(
            "podlane_datapath_packets", "Packets by what became of them (bpf/README.md).", labels=["outcome"]
        )
        size = CounterMetricFamily(
            "podlane_datapath_bytes", "Bytes, with Ethernet headers, by what became of them.", labels=["outcome"]
        )
        for name, (packet_count, byte_count) in self._outcomes().items():
            packets.add_metric([name], packet_count)
            size.add_metric([name], byte_count)
        yield from (packets, size)
        pods = self._pods()
        yield GaugeMetricFamily("podlane_pods", "Attachments that have addresses.", value=len(pods))
        yield _pod_info(pods)
        yield from self._addresses()

    def _addresses(self) -> Iterator[Metric]:
        used = GaugeMetricFamily("podlane_ipam_addresses_used", "Addresses in use.", labels=["range"])
        free = GaugeMetricFamily("podlane_ipam_addresses_free", "Addresses left.", labels=["range"])
        for each, count in self._usage():
            used.add_metric([str(each.subnet)], count)
            free.add_metric([str(each.subnet)], each.size - count)
        yield from (used, free)


def _pod_info(pods: Sequence[Pod]) -> Metric:
    """Return whose each device is: Kubernetes' names, where the runtime told them, to join with other metrics."""
    labels = ["namespace", "pod", "network", "container", "interface", "device"]
    info = GaugeMetricFamily("podlane_pod_info", "Always 1: an attachment, and its device on the node.", labels=labels)
    for pod in pods:
        namespace, _, name = pod.pod_name.rpartition("/")
        its = pod.attachment
        info.add_metric([namespace, name, its.network, its.container_id, its.ifname, pod.device], 1)
    return info


class _Masquerade(Collector):
    def __init__(
        self, flows: FlowCollector, masqueraded: Callable[[], Masqueraded], uplinks: Callable[[], Mapping[str, Uplink]]
    ) -> None:
        self._flows = flows
        self._masqueraded = masqueraded
        self._uplinks = uplinks

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        collected = CounterMetricFamily(
            "podlane_masquerade_collected", "Expired flows, and halves of flows, that were removed.", labels=["kind"]
        )
        for kind, count in self._flows.collected.items():
            collected.add_metric([kind], count)
        yield from (collected, *self._traffic(), *self._census(), self._uplink_info())

    def _traffic(self) -> Iterator[Metric]:
        labels = ["direction", "protocol"]
        packets = CounterMetricFamily(
            "podlane_masqueraded_packets", "Packets of masqueraded flows, out of the node and in.", labels=labels
        )
        size = CounterMetricFamily(
            "podlane_masqueraded_bytes", "Bytes of masqueraded flows, with Ethernet headers.", labels=labels
        )
        counted = self._masqueraded()
        for (protocol, direction), (packet_count, byte_count) in counted.flows.items():
            packets.add_metric([direction, protocol], packet_count)
            size.add_metric([direction, protocol], byte_count)
        yield from (packets, size)
        yield CounterMetricFamily(
            "podlane_masquerade_allocations", "New flows that got a port.", value=counted.allocations
        )
        yield CounterMetricFamily(
            "podlane_masquerade_retries", "Ports tried for new flows beyond the first: they were taken.",
            value=counted.retries,
        )  # fmt: skip

    def _census(self) -> Iterator[Metric]:
        """Yield what the last scan left: before the first one, metrics without any series."""
        last = self._flows.census
        census = last or Census(flows={}, fill={}, destinations={})
        flows = GaugeMetricFamily(
            "podlane_masquerade_flows", "Masqueraded flows, as of the last scan.", labels=["protocol"]
        )
        known = dict.fromkeys(PROTOCOLS, 0) if last else {}
        for protocol, count in (known | dict(census.flows)).items():
            flows.add_metric([_protocol(protocol)], count)
        fill = GaugeMetricFamily(
            "podlane_map_fill_ratio", "How full a map is, of 1: at 1, new flows fail.", labels=["map"]
        )
        for name, ratio in census.fill.items():
            fill.add_metric([name], ratio)
        destinations = GaugeMetricFamily(
            "podlane_masquerade_destination_ports",
            "Ports in use to the ten busiest destinations: when all are, new flows there fail.",
            labels=["destination"],
        )
        for (address, port, protocol), ports in census.destinations.items():
            host = f"[{address}]" if address.version == 6 else str(address)
            destinations.add_metric([f"{host}:{port}/{_protocol(protocol)}"], ports)
        yield from (flows, fill, destinations)

    def _uplink_info(self) -> Metric:
        info = GaugeMetricFamily(
            "podlane_uplink_info", "Always 1: a device that leads out.", labels=["device", "ipv4", "ipv6"]
        )
        for device, uplink in self._uplinks().items():
            info.add_metric([device, str(uplink.sources.ipv4 or ""), str(uplink.sources.ipv6 or "")], 1)
        return info


def _protocol(number: int) -> str:
    return PROTOCOLS.get(number, str(number))


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """Serves some at a time; one more is hung up on, for any process of the node's may open connections."""

    daemon_threads = True
    request_queue_size = 128  # those that come at once; the default of 5 makes others wait for a second

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # as the base class has it
        self._room = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # not HTTPServer's: that asks DNS for this host's name, which may take for ever
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _IPv6Server(_ThreadingServer):
    address_family = socket.AF_INET6


class _QuietHandler(WSGIRequestHandler):
    timeout = 5.0  # seconds to wait for the request

    def log_message(self, format: str, *args: object) -> None:  # the base class's name
        """Scrapes are not news."""


def serve(address: str, registry: CollectorRegistry, readiness: Readiness) -> WSGIServer:
    """Serve /metrics, /healthz and /readyz on "host:port" or "[host]:port" (IPv6), in a thread. Raises OSError.

    `shutdown()` ends the server.
    """
    metrics_app = make_wsgi_app(registry)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return _scrape(metrics_app, environ, start_response)
        if path == "/healthz":
            return _answer(start_response, "200 OK", "ok")
        if path == "/readyz":
            reason = readiness.reason
            return _answer(start_response, "503 Service Unavailable" if reason else "200 OK", reason or "ready")
        return _answer(start_response, "404 Not Found", "there are /metrics, /healthz and /readyz")

    host, _, port = address.rpartition(":")
    kind = _IPv6Server if host.startswith("[") else _ThreadingServer
    server = make_server(host.strip("[]"), int(port), app, kind, _QuietHandler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def _scrape(app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    try:
        return app(environ, start_response)
    except (KernelError, StoreError) as error:
        return _answer(start_response, "500 Internal Server Error", str(error))


def _answer(start_response: StartResponse, status: str, text: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode() + b"\n"]

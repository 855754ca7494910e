"""Metrics that are read where they are kept, at every scrape, rather than counted a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from agent.collector import Census
from agent.collector import Collector as FlowCollector
from agent.datapath.tables import Masqueraded
from agent.expiry import PROTOCOLS
from agent.ranges import Range
from agent.state import Uplink
from agent.store import Pod

Outcomes = Callable[[], Mapping[str, tuple[int, int]]]
"""Returns packets and bytes by outcome."""
Pods = Callable[[], Sequence[Pod]]
Usage = Callable[[], list[tuple[Range, int]]]
"""Returns how many addresses are in use, by range."""


class Traffic(Collector):
    """What the datapath carried, and for whom: outcomes, attachments, addresses."""

    def __init__(self, outcomes: Outcomes, usage: Usage, pods: Pods) -> None:
        self._outcomes = outcomes
        self._usage = usage
        self._pods = pods

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read, and yield the metrics. Raises KernelError and StoreError."""
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


class Flows(Collector):
    """What is masqueraded, and at which uplinks; of flows, what the last scan left."""

    def __init__(
        self, flows: FlowCollector, masqueraded: Callable[[], Masqueraded], uplinks: Callable[[], Mapping[str, Uplink]]
    ) -> None:
        self._flows = flows
        self._masqueraded = masqueraded
        self._uplinks = uplinks

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registering reads nothing."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Read, and yield the metrics. Raises KernelError and StoreError."""
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

"""Collecting expired flows from the real maps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from agent.collector import Census, Collector
from agent.datapath.entries import from_address
from agent.datapath.libbpf import possible_cpus
from agent.datapath.loader import Datapath, load
from agent.datapath.object import Object
from agent.datapath.tables import masqueraded
from agent.expiry import GRE, ICMP, ICMPV6, SCTP, TCP, UDP
from agent.metrics import Metrics
from agent.state import Address, Settings

SIZE = 4096
NOW = 10**15  # nanoseconds
SETTINGS = Settings(
    first_port=50000,
    last_port=59999,
    tcp_open=240,
    tcp_established=7440,
    tcp_closed=60,
    udp=300,
    icmp=50,
    other=600,
    other_protocols="masquerade",
    stack_routes=False,
)
POD: dict[int, Address] = {4: IPv4Address("10.1.0.10"), 6: IPv6Address("fd00::a")}
NODE: dict[int, Address] = {4: IPv4Address("192.0.2.10"), 6: IPv6Address("2001:db8::10")}
FAR: dict[int, Address] = {4: IPv4Address("198.51.100.1"), 6: IPv6Address("2001:db8:f::1")}

Entry = dict[str, Any]


@pytest.fixture
def datapath(datapath_object: Object, pins: Path) -> Iterator[Datapath]:
    """Load the datapath with room for some flows."""
    with load(datapath_object, pins, {"flows": SIZE, "owners": SIZE}) as loaded:
        yield loaded


@pytest.fixture
def collector(datapath: Datapath) -> Collector:
    """Make a collector, not running."""
    return Collector(
        flows=datapath.maps["flows"],
        owners=datapath.maps["owners"],
        settings=SETTINGS,
        constants=datapath.constants,
        refused=lambda: 0,
        clock=lambda: NOW,
    )


def network_order(port: int) -> int:
    """Return a port as it stands in a key."""
    return int.from_bytes(port.to_bytes(2, "big"), "little")


def flow(number: int, protocol: int, *, version: int = 4, far: Address | None = None) -> tuple[Entry, Entry]:
    """Return the keys of a flow in `flows` and in `owners`: from the pod's port `number` to port 443 of far away."""
    outside = 0 if protocol in (ICMP, ICMPV6) else network_order(443)
    key = {
        "source": from_address(POD[version]),
        "destination": from_address(far or FAR[version]),
        "source_port": network_order(number),
        "destination_port": outside,
        "protocol": protocol,
    }
    answer = {
        "source": key["destination"],
        "destination": from_address(NODE[version]),
        "source_port": outside,
        "destination_port": network_order(number + 1),
        "protocol": protocol,
    }
    return key, answer


def put(
    datapath: Datapath,
    number: int,
    protocol: int,
    *,
    idle: float,
    state: int = 0,
    version: int = 4,
    far: Address | None = None,
) -> None:
    """Make both halves of a flow whose last packet was `idle` seconds ago."""
    key, answer = flow(number, protocol, version=version, far=far)
    seen = NOW - int(idle * 1e9)
    value = {
        "address": from_address(NODE[version]),
        "port": network_order(number + 1),
        "state": state,
        "seen": seen,
    }
    datapath.maps["flows"].update(key, value)
    owner = {"address": from_address(POD[version]), "port": network_order(number)}
    datapath.maps["owners"].update(answer, owner)


def sizes(datapath: Datapath) -> tuple[int, int]:
    """Return how many entries the two maps have."""
    return len(list(datapath.maps["flows"].items())), len(list(datapath.maps["owners"].items()))


def census(collector: Collector) -> Census:
    """Return what the last scan left."""
    assert collector.census
    return collector.census


def series_of(datapath: Datapath, collector: Collector) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return what a scrape finds, by name and label values in the labels' alphabetical order."""
    metrics = Metrics("1")
    metrics.watch_masquerade(collector, lambda: masqueraded(datapath), dict)
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
    }


def states(datapath: Datapath) -> dict[str, int]:
    """Return the bits of a flow's state."""
    return {name.removeprefix("FLOW_"): bit for name, bit in datapath.constants.items() if name.startswith("FLOW_")}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(
    ("protocol", "names", "lifetime"),
    [
        (TCP, [], 240),
        (TCP, ["REPLIED"], 7440),
        (TCP, ["REPLIED", "FIN_OUT", "FIN_IN"], 60),
        (TCP, ["REPLIED", "RESET"], 60),
        (UDP, ["REPLIED"], 300),
        (ICMP, [], 50),
        (ICMPV6, [], 50),
        (SCTP, ["REPLIED"], 600),
        (GRE, [], 600),
        (255, [], 600),
    ],
)
def test_expired_and_not(
    datapath: Datapath, collector: Collector, version: int, protocol: int, names: list[str], lifetime: int
) -> None:
    """A flow goes, with both halves, when its time is over; one that has some seconds left stays."""
    state = sum(states(datapath)[name] for name in names)
    put(datapath, 1, protocol, idle=lifetime + 0.1, state=state, version=version)
    put(datapath, 2, protocol, idle=lifetime - 0.1, state=state, version=version)
    collector.scan()
    left, left_answer = flow(2, protocol, version=version)
    assert sizes(datapath) == (1, 1)
    assert datapath.maps["flows"].get(left) is not None
    assert datapath.maps["owners"].get(left_answer) is not None
    assert collector.collected == {"flow": 1, "orphan": 0}


def test_flow_that_is_just_being_made(datapath: Datapath, collector: Collector) -> None:
    """A flow without a time stamp yet is younger than any other."""
    put(datapath, 1, UDP, idle=0)
    key, _ = flow(1, UDP)
    value = datapath.maps["flows"].get(key)
    assert value is not None
    datapath.maps["flows"].update(key, {**value, "seen": 0})
    collector.scan()
    assert sizes(datapath) == (1, 1)


def test_flow_that_comes_back_to_life(
    datapath: Datapath, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packet between the scan and the deletion saves its flow (cilium#46298)."""
    put(datapath, 1, UDP, idle=400)
    flows = datapath.maps["flows"]
    read = flows.batches

    def then_a_packet() -> Iterator[tuple[bytes, bytes]]:
        for batch in read():
            put(datapath, 1, UDP, idle=0)
            yield batch

    monkeypatch.setattr(flows, "batches", then_a_packet)
    collector.scan()
    assert sizes(datapath) == (1, 1)
    assert collector.collected["flow"] == 0


def test_flow_that_is_made_again_at_once(
    datapath: Datapath, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packet between the deletion of the two halves makes the flow again, and the collector leaves both halves.

    cilium#46298, calico#9356
    """
    put(datapath, 1, UDP, idle=400)
    flows, owners = datapath.maps["flows"], datapath.maps["owners"]
    delete = owners.delete_bytes
    key, answer = flow(1, UDP)
    before = flows.get(key)
    assert before is not None

    def after_a_packet(raw: bytes) -> bool:
        flows.update(key, {**before, "seen": NOW})
        return delete(raw)

    monkeypatch.setattr(owners, "delete_bytes", after_a_packet)
    collector.scan()
    assert sizes(datapath) == (1, 1)
    assert owners.get(answer) is not None


def test_port_that_is_somebody_elses_by_now(datapath: Datapath, collector: Collector) -> None:
    """An expired flow whose port another one has got does not take it along."""
    put(datapath, 1, UDP, idle=400)
    _, answer = flow(1, UDP)
    other = {"address": from_address(ip_address("10.1.0.11")), "port": network_order(1)}
    datapath.maps["owners"].update(answer, other)
    collector.scan()
    assert sizes(datapath) == (0, 1)


def test_orphans(datapath: Datapath, collector: Collector) -> None:
    """An owner without a flow goes when it is found twice; one that has its flow again by then stays."""
    for number in (1, 2):
        put(datapath, number, UDP, idle=0)
        datapath.maps["flows"].delete(flow(number, UDP)[0])
    for _ in range(16):
        collector.scan()
    assert sizes(datapath) == (0, 2)
    assert census(collector).fill["owners"] == 2 / SIZE
    put(datapath, 2, UDP, idle=0)
    for _ in range(16):
        collector.scan()
    assert sizes(datapath) == (1, 1)
    assert collector.collected == {"flow": 0, "orphan": 1}
    assert census(collector).fill["owners"] == 1 / SIZE


def test_census(datapath: Datapath, collector: Collector) -> None:
    """The census has the flows by protocol, the busiest destinations, and how full the maps are."""
    for number in range(100):
        put(datapath, number, TCP, idle=0)
    for number in range(50):
        put(datapath, number, UDP, idle=0, version=6)
    for number in range(20):
        put(datapath, number, ICMP, idle=0, far=ip_address(f"203.0.113.{number}"))
    assert collector.census is None
    collector.scan()
    found = census(collector)
    assert found.flows == {TCP: 100, UDP: 50, ICMP: 20}
    assert found.fill == {"flows": 170 / SIZE, "owners": 170 / SIZE}
    assert list(found.destinations.items())[:2] == [((FAR[4], 443, TCP), 100), ((FAR[6], 443, UDP), 50)]
    assert len(found.destinations) == 10


def test_census_is_of_what_is_left(datapath: Datapath, collector: Collector) -> None:
    """What a scan collects is not in its own census, neither by protocol, nor by map, nor by destination."""
    for number in range(30):
        put(datapath, number, UDP, idle=0 if number < 10 else 400)
    for number in range(20):
        put(datapath, number, ICMP, idle=400, far=ip_address(f"203.0.113.{number}"))
    collector.scan()
    assert collector.collected["flow"] == 40
    assert sizes(datapath) == (10, 10)
    assert census(collector) == Census({UDP: 10}, {"flows": 10 / SIZE, "owners": 10 / SIZE}, {(FAR[4], 443, UDP): 10})


def test_census_before_the_owners_are_counted(
    datapath: Datapath, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many flows there are is known as soon as those are counted; how full the other map is, not before it is."""
    put(datapath, 1, UDP, idle=0)
    owners, seen = datapath.maps["owners"], []
    read = owners.batches

    def then_look() -> Iterator[tuple[bytes, bytes]]:
        seen.append(census(collector).fill)
        yield from read()

    monkeypatch.setattr(owners, "batches", then_look)
    collector.scan()
    assert seen == [{"flows": 1 / SIZE}]
    assert census(collector).fill == {"flows": 1 / SIZE, "owners": 1 / SIZE}


def test_metrics_before_the_first_scan(datapath: Datapath, collector: Collector) -> None:
    """Until flows have been counted there is no series of them, rather than a wrong 0; then there is one of each."""
    names = ("podlane_masquerade_flows", "podlane_map_fill_ratio", "podlane_masquerade_destination_ports")
    assert not {name for name, _ in series_of(datapath, collector)} & set(names)
    put(datapath, 1, SCTP, idle=0)
    put(datapath, 2, UDP, idle=400)
    collector.scan()
    found = series_of(datapath, collector)
    assert found["podlane_masquerade_flows", ("sctp",)] == 1
    assert {labels for (name, labels), value in found.items() if name == names[0] and value == 0} == {
        (protocol,) for protocol in ("tcp", "udp", "icmp", "icmpv6", "gre", "esp", "ipip", "ipv6", "l2tp")
    }
    assert found["podlane_map_fill_ratio", ("flows",)] == found["podlane_map_fill_ratio", ("owners",)] == 1 / SIZE
    assert found["podlane_masquerade_destination_ports", ("198.51.100.1:443/sctp",)] == 1


def test_metrics_of_an_unheard_of_protocol(datapath: Datapath, collector: Collector) -> None:
    """A flow of a protocol without a name here is counted under its number."""
    put(datapath, 1, 99, idle=0)
    collector.scan()
    found = series_of(datapath, collector)
    assert found["podlane_masquerade_flows", ("99",)] == 1
    assert found["podlane_masquerade_destination_ports", ("198.51.100.1:443/99",)] == 1


def test_metrics_of_masqueraded_packets(datapath: Datapath, collector: Collector) -> None:
    """What the datapath counts on every CPU is summed, and has the labels that its counters' names say."""
    tcp, other = {"packets": 1, "bytes": 100}, {"packets": 2, "bytes": 50}
    cpus = possible_cpus()
    one = {"tcp_out": tcp, "other_in": other, "allocations": 3, "retries": 4}
    datapath.maps["masqueraded"].update(0, [one] * cpus)
    found = series_of(datapath, collector)
    protocols, directions = ("tcp", "udp", "icmp", "other"), ("out", "in")
    for what in ("packets", "bytes"):
        name = f"podlane_masqueraded_{what}_total"
        labels = {labels for series, labels in found if series == name}
        assert labels == {(direction, protocol) for direction in directions for protocol in protocols}
        assert found[name, ("out", "tcp")] == tcp[what] * cpus
        assert found[name, ("in", "other")] == other[what] * cpus
        assert found[name, ("in", "tcp")] == 0
    assert found["podlane_masquerade_allocations_total", ()] == 3 * cpus
    assert found["podlane_masquerade_retries_total", ()] == 4 * cpus


def test_busy_destination_among_many(datapath: Datapath, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many destinations there are, few are remembered at a time, and the busiest is among them.

    cilium#20955
    """
    monkeypatch.setattr("agent.collector._DESTINATIONS", 300)
    monkeypatch.setattr("agent.collector._KEPT_DESTINATIONS", 100)
    for number in range(1500):
        put(datapath, number, UDP, idle=0, far=ip_address(int(IPv4Address("203.0.0.0")) + number))
    for number in range(1000):
        put(datapath, number, TCP, idle=0)
    collector.scan()
    (busiest, ports), *_ = census(collector).destinations.items()
    assert busiest == (FAR[4], 443, TCP)
    assert ports > 900


def test_thread(datapath: Datapath, collector: Collector) -> None:
    """A started collector collects by itself, and ends when it is told to."""
    put(datapath, 1, UDP, idle=400)
    collector.start()
    deadline = time.monotonic() + 10
    while sizes(datapath) != (0, 0):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    collector.stop()

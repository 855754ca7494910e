"""What Prometheus scrapes and what the probes say, read over HTTP from a real agent."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from agent.tables import Tables
from tests.node.machine import LAUNCHER, Machine, Netns, Outcome, TestPod, machine

Values = dict[tuple[str, ...], float]
"""The values of one series, by its labels' values."""

V4, V6 = 0, 1
RANGES = ("10.9.0.0/28", "fd09::/120")
SIZES = {"10.9.0.0/28": 14, "fd09::/120": 255}

# Every metric: its type and its labels. A dashboard relies on each of them.
CATALOGUE = {
    "podlane_build_info": ("gauge", {"version", "python", "kernel"}),
    "podlane_cluster_nodes": ("gauge", set()),
    "podlane_cluster_nodes_refused": ("gauge", set()),
    "podlane_cluster_peers": ("gauge", {"lane", "family"}),
    "podlane_cni_operation_duration_seconds": ("histogram", {"command"}),
    "podlane_cni_operations": ("counter", {"command", "result"}),
    "podlane_datapath_bytes": ("counter", {"outcome"}),
    "podlane_datapath_packets": ("counter", {"outcome"}),
    "podlane_gc_released": ("counter", {"reason"}),
    "podlane_ipam_addresses_free": ("gauge", {"range"}),
    "podlane_ipam_addresses_used": ("gauge", {"range"}),
    "podlane_map_fill_ratio": ("gauge", {"map"}),
    "podlane_masquerade_allocations": ("counter", set()),
    "podlane_masquerade_collected": ("counter", {"kind"}),
    "podlane_masquerade_destination_ports": ("gauge", set()),  # {"destination"}, when there are flows
    "podlane_masquerade_flows": ("gauge", {"protocol"}),
    "podlane_masquerade_retries": ("counter", set()),
    "podlane_masqueraded_bytes": ("counter", {"direction", "protocol"}),
    "podlane_masqueraded_packets": ("counter", {"direction", "protocol"}),
    "podlane_pod_info": ("gauge", {"namespace", "pod", "network", "container", "interface", "device"}),
    "podlane_pods": ("gauge", set()),
    "podlane_ready": ("gauge", set()),
    "podlane_repairs": ("counter", {"kind"}),
    "podlane_start_duration_seconds": ("gauge", {"phase"}),
    "podlane_uplink_info": ("gauge", {"device", "ipv4", "ipv6"}),
}
KINDS = ("devices", "sysctls", *(each.name for each in fields(Tables)))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share."""
    ranges = [{"subnet": subnet} for subnet in RANGES]
    with machine(tmp_path_factory.mktemp("node"), ranges=ranges) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture(scope="module")
def pods(node: Machine) -> tuple[TestPod, TestPod]:
    """Make two pods."""
    return node.make_pod("a"), node.make_pod("b")


def values(node: Machine, name: str) -> Values:
    """Return the values of one series, by its labels' values."""
    return {labels: value for (series, labels), value in node.metrics().items() if series == name}


@pytest.mark.usefixtures("pods")
def test_catalogue(node: Machine) -> None:
    """Exactly the metrics of the catalogue exist, with type, help and labels, and names as Prometheus wants them."""
    status, text = node.get("/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    found = {
        name: (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})
        for name, family in families.items()
    }
    assert found == CATALOGUE
    for family in families.values():
        assert family.documentation.endswith(".")
        names = {sample.name for sample in family.samples}
        assert not [name for name in names if name.endswith("_created")]
        if family.type == "counter":
            assert names == {f"{family.name}_total"}


@pytest.mark.usefixtures("pods")
def test_pods_and_addresses(node: Machine) -> None:
    """Pods, and addresses used and free in each range, follow ADD and DEL."""

    def expected(pods: int) -> list[Values]:
        used: Values = {(each,): float(pods) for each in RANGES}
        free: Values = {(each,): float(size - pods) for each, size in SIZES.items()}
        return [{(): float(pods)}, used, free]

    def seen() -> list[Values]:
        names = ("podlane_pods", "podlane_ipam_addresses_used", "podlane_ipam_addresses_free")
        return [values(node, name) for name in names]

    assert seen() == expected(2)
    third = node.make_pod("c")
    assert seen() == expected(3)
    node.delete_pod(third)
    assert seen() == expected(2)


@pytest.mark.parametrize(
    ("arguments", "namespace", "name"),
    [
        ("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=4a6f", "shop", "web-0"),
        ('IgnoreUnknown=1;K8S_POD_NAME=a "quoted"\nname', "", 'a "quoted"\ufffdname'),
        ("", "", ""),
    ],
)
def test_names(node: Machine, arguments: str, namespace: str, name: str) -> None:
    """Whose a device is stands there with Kubernetes' names, as CNI_ARGS had them; they are in the log, too."""
    netns = node.add_netns("named")

    def call(command: str) -> Outcome:
        env = {"CNI_ARGS": arguments}
        return node.cni(command, container_id=netns.name, netns=str(netns.path), env=env)

    device = call("ADD").json()["interfaces"][0]["name"]
    assert values(node, "podlane_pod_info")[netns.name, device, "eth0", namespace, "podlane", name] == 1
    assert call("DEL").exit_code == 0
    assert netns.name not in str(values(node, "podlane_pod_info"))
    told = [line for line in node.log.read_text().splitlines() if netns.name in line and "released" in line]
    assert [f"name={namespace}/{name}" in line for line in told] == [bool(namespace)]


def test_operations(node: Machine) -> None:
    """Each CNI call is counted by command and result, and timed; commands that do not exist share one label."""
    netns = Netns("calls")
    calls = "podlane_cni_operations_total"
    durations = "podlane_cni_operation_duration_seconds"
    before, timed = values(node, calls), values(node, f"{durations}_count")
    for command, config in (
        ("ADD", {}),
        ("ADD", {}),  # refused: it is there
        ("ADD", {"name": "/"}),  # refused
        ("DEL", {}),
        ("STATUS", {}),
        ("NONSENSE", {}),
        ("GIBBERISH", {}),
    ):
        node.cni(command, container_id=netns.name, netns=str(netns.path), config=config)
    netns.delete()
    after = values(node, calls)
    assert {
        labels: after[labels] - before.get(labels, 0) for labels in after if after[labels] != before.get(labels)
    } == {
        ("ADD", "success"): 1,
        ("ADD", "error"): 2,
        ("DEL", "success"): 1,
        ("STATUS", "success"): 1,
        ("other", "error"): 2,
    }
    now = values(node, f"{durations}_count")
    assert {labels[0]: now[labels] - timed.get(labels, 0) for labels in now} == {
        "ADD": 3,
        "DEL": 1,
        "STATUS": 1,
        "other": 2,
    }
    buckets = values(node, f"{durations}_bucket")
    assert all(buckets[command, "+Inf"] == count for (command,), count in now.items())
    assert all(seconds > 0 for seconds in values(node, f"{durations}_sum").values())


@pytest.mark.parametrize("family", [V4, V6])
def test_bytes(node: Machine, pods: tuple[TestPod, TestPod], family: int) -> None:
    """Bytes are counted as the device counts them: with all headers, Ethernet's too."""
    a, b = pods
    before = values(node, "podlane_datapath_bytes_total")["fwd_local",]
    assert node.pings(a, b.addresses[family], "-s", "1000", count=5)
    size = 14 + (20, 40)[family] + 8 + 1000
    assert values(node, "podlane_datapath_bytes_total")["fwd_local",] - before == 2 * 5 * size


def test_repairs_by_kind(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """All kinds of repairs are there from the start at 0, so that a rate of the first one can be seen."""
    assert values(node, "podlane_repairs_total").keys() == {(kind,) for kind in KINDS}
    before = values(node, "podlane_repairs_total")["routes",]
    node.netns.run("ip", "route", "delete", pods[0].addresses[V4])
    node.wait_for(lambda: values(node, "podlane_repairs_total")["routes",] == before + 1, "the repair")


def test_start_and_build(node: Machine) -> None:
    """How long each phase of the start took, and what it is that runs."""
    phases = values(node, "podlane_start_duration_seconds")
    assert phases.keys() == {("compile",), ("load",), ("attach",), ("selftest",)}
    assert all(seconds > 0 for seconds in phases.values())
    ((labels, value),) = values(node, "podlane_build_info").items()
    kernel, python, version = labels
    assert (kernel, python, value) == (os.uname().release, platform.python_version(), 1)
    assert version


def test_only_this_machine_is_served(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """The one port that listens does so on 127.0.0.1: neither pods nor the world reach it."""
    listening = node.netns.run("ss", "-Hltn").stdout.split()
    assert listening[3] == "127.0.0.1:9815"
    assert len(listening) == 5
    for address in ("192.0.2.10", "169.254.1.1"):
        refused = pods[0].netns.run("curl", "-sS", "-m", "1", f"http://{address}:9815/metrics", check=False)
        assert refused.returncode != 0
        assert refused.stdout == ""


def test_who_is_served_cannot_hold_up_the_probes(tmp_path: Path) -> None:
    """Where all addresses are served, pods reach both families, and by no flood do they take the probes' place."""
    with machine(tmp_path, metrics="*:9815") as node, ExitStack() as stack:
        node.add_uplink()
        node.start_agent()
        pod = node.make_pod()
        for address in ("192.0.2.10", "[2001:db8::10]"):
            assert pod.netns.run("curl", "-sS", "-m", "5", f"http://{address}:9815/healthz").stdout == "ok\n"

        def connect() -> None:
            for _ in range(200):
                stack.enter_context(socket.create_connection(("192.0.2.10", 9815)))

        pod.netns.call(connect)
        assert node.get("/healthz") == (200, "ok\n")
        assert pod.netns.run("curl", "-sS", "-m", "1", "http://192.0.2.10:9815/healthz", check=False).stdout == ""


@pytest.mark.parametrize("path", ["/", "/metrics/x", "/Metrics", "/readyz/"])
def test_unknown_path(node: Machine, path: str) -> None:
    """What is not there is answered 404, and what is there is named."""
    status, text = node.get(path)
    assert status == 404
    assert "/metrics" in text


def test_probes(tmp_path: Path) -> None:
    """Until ADD can be served the readiness probe says why not, and all is ready at once when the cause is gone."""
    launcher = tmp_path / "launcher"
    with machine(tmp_path, paths={"launcher": str(launcher)}) as node:
        node.start_agent(wait=False)
        node.wait_for(lambda: node.get("/healthz")[0] != 0, "an answer")
        assert node.get("/healthz") == (200, "ok\n")
        node.wait_for(lambda: str(launcher) in node.get("/readyz")[1], "the reason")
        assert node.get("/readyz")[0] == 503
        assert values(node, "podlane_ready") == {(): 0}
        assert list((tmp_path / "conf").iterdir()) == []
        shutil.copyfile(LAUNCHER, launcher)
        node.wait_ready()
        assert node.get("/readyz") == (200, "ready\n")
        node.wait_for(lambda: values(node, "podlane_ready") == {(): 1}, "the metric")
        assert [path.name for path in (tmp_path / "conf").iterdir()] == ["10-podlane.conflist"]

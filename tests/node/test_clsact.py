"""The way to attach programs on kernels without tcx, forced by configuration: clsact filters do all that links do."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.datapath import libbpf
from tests.node.machine import ROOT, Machine, TestPod, machine
from tests.node.programs import DIRECTIONS, attached, filters, wait_settled, wanted
from tests.node.traffic import lossless_stream, lossless_traffic

V4, V6 = 0, 1
PASS = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)  # r0 = TC_ACT_UNSPEC; exit
REPLACED = "->packets++"  # in bpf/counters.h; its other wording makes another program of the same effect
REPLACEMENT = "->packets += skb->len ? 1 : 2"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node"), hooks="clsact", resync_seconds=0.25) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture(scope="module")
def pods(node: Machine) -> tuple[TestPod, TestPod]:
    """Make two pods."""
    return node.make_pod("a"), node.make_pod("b")


def assert_by_clsact(node: Machine, *pods: TestPod) -> None:
    """Assert that each hook runs the one program of its name, in one filter, and that there are no links."""
    for pod in pods:
        assert filters(node, pod) == wanted(node)
        assert attached(node, pod) == {name: [] for name in DIRECTIONS}
    assert node.traces()["links"] == []


def assert_by_tcx(node: Machine, *pods: TestPod) -> None:
    """Assert that each hook runs the one program of its name, by a link, and that there are no filters."""
    for pod in pods:
        assert attached(node, pod) == wanted(node)
        assert filters(node, pod) == {name: [] for name in DIRECTIONS}


def clsact(node: Machine, pod: TestPod) -> bool:
    """Say whether the host end has the qdisc."""
    return "clsact" in node.netns.run("tc", "qdisc", "show", "dev", pod.device).stdout


def assert_talk(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """Assert that the pods reach each other past the stack, that each packet is counted once, and by the right name."""
    a, b = pods
    before = node.packets()
    for family in (V4, V6):
        assert node.pings(a, b.addresses[family], count=5)
        assert node.pings(a, ["192.0.2.10", "2001:db8::10"][family], count=5)
    after = node.packets()
    assert after["fwd_local"] - before["fwd_local"] == 20
    assert after["punt_host"] - before["punt_host"] == 10
    assert after["fwd_from_stack"] - before["fwd_from_stack"] >= 10  # and the reports of the node's own listeners
    assert [name for name in after if name.startswith("drop_") and after[name] != before[name]] == []


def test_pods_talk(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """Pods talk past the stack by clsact filters alone, and every packet is counted."""
    assert_by_clsact(node, *pods)
    assert_talk(node, pods)


@pytest.mark.parametrize("end", [Machine.stop_agent, Machine.kill_agent])
def test_restart_loses_nothing(node: Machine, pods: tuple[TestPod, TestPod], end: object) -> None:
    """The same agent again leaves everything attached as it is, and no packet of a running flow is lost."""
    before = [filters(node, pod) for pod in pods]
    with lossless_traffic(*pods):
        assert callable(end)
        end(node)
        node.start_agent()
    assert [filters(node, pod) for pod in pods] == before
    assert_by_clsact(node, *pods)


def test_upgrade_loses_nothing(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """An agent with other programs replaces each between two packets."""
    before = [filters(node, pod) for pod in pods]
    source = node.directory / "bpf_source"
    shutil.copytree(ROOT / "bpf", source, dirs_exist_ok=True)  # a second try has it already
    counters = source / "counters.h"
    assert REPLACED in counters.read_text()
    with lossless_traffic(*pods):
        node.stop_agent()
        counters.write_text(counters.read_text().replace(REPLACED, REPLACEMENT))
        node.configure(hooks="clsact", resync_seconds=0.25, paths={"bpf_source": str(source)})
        node.start_agent()
    now = [filters(node, pod) for pod in pods]
    assert [old[name] == new[name] for old, new in zip(before, now, strict=True) for name in DIRECTIONS] == [False] * 4
    assert_by_clsact(node, *pods)
    assert_talk(node, pods)


@pytest.mark.parametrize("direction", DIRECTIONS.values())
def test_filter_deleted(node: Machine, pods: tuple[TestPod, TestPod], direction: str) -> None:
    """A filter that was deleted is back, and counted as one repair."""
    expect_repair(node, pods, f"tc filter delete dev {pods[1].device} {direction}", 1)


def test_qdisc_deleted(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """When the qdisc was deleted with both filters, all are back, and counted as two repairs."""
    expect_repair(node, pods, f"tc qdisc delete dev {pods[1].device} clsact", 2)


def expect_repair(node: Machine, pods: tuple[TestPod, TestPod], breakage: str, count: int) -> None:
    """Break something and expect it mended."""
    before = node.repairs().get("hooks", 0)
    node.netns.run(*breakage.split())
    node.wait_for(lambda: node.repairs().get("hooks", 0) == before + count, "the repair")
    node.wait_for(lambda: filters(node, pods[1]) == wanted(node), "the filters")
    assert_by_clsact(node, *pods)
    assert_talk(node, pods)
    assert node.repairs().get("hooks", 0) == before + count


def test_foreign_filters_stay(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """Somebody else's filter at the same hook stays, also when podlane's own goes and comes beside it."""
    _, b = pods
    pin = node.bpffs.parent / "foreign"
    with libbpf.closing(libbpf.program_load("foreign", PASS)) as program:
        libbpf.pin(program, pin)
        foreign = libbpf.program_info(program, "foreign").id
    place = f"dev {b.device} ingress prio 7 protocol all"
    node.netns.run(*f"tc filter add {place} bpf direct-action object-pinned {pin}".split())
    repairs = node.repairs().get("hooks", 0)
    node.netns.run(*f"tc filter delete dev {b.device} ingress prio 112".split())
    node.wait_for(lambda: node.repairs().get("hooks", 0) == repairs + 1, "the repair")
    node.wait_for(lambda: filters(node, b)["from_pod"] == [foreign, *wanted(node)["from_pod"]], "both filters")
    assert_talk(node, pods)
    node.netns.run(*f"tc filter delete {place}".split())
    pin.unlink()
    assert_by_clsact(node, *pods)


def test_delete_leaves_nothing(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """ADD and DEL leave the node as it was."""
    before = node.traces()
    node.delete_pod(node.make_pod("short"))
    assert node.traces() == before
    assert_by_clsact(node, *pods)


def test_change_of_hooks_loses_nothing(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """From clsact to tcx and back, under traffic: nothing is lost, and each hook ends with exactly one program."""
    for hooks in ("tcx", "clsact"):
        with lossless_traffic(*pods):
            node.stop_agent()
            node.configure(hooks=hooks, resync_seconds=0.25)
            node.start_agent()
            if hooks == "tcx":
                wait_settled(node, *pods)
            else:
                node.wait_for(lambda: node.traces()["links"] == [], "the links to go")
        (assert_by_tcx if hooks == "tcx" else assert_by_clsact)(node, *pods)
        assert_talk(node, pods)
        node.wait_for(lambda: node.get("/readyz")[0] == 200, "readiness")


def test_settling_loses_nothing(tmp_path: Path) -> None:
    """While new pods' programs move from filters to links, nothing is lost that the host stack sends them."""
    with machine(tmp_path) as node:
        node.add_uplink()  # else the host has no address to send from
        node.start_agent()
        pods = [node.make_pod(name) for name in "abcdefgh"]
        assert all(clsact(node, pod) for pod in pods)
        with lossless_stream(node.netns, pods):
            wait_settled(node, *pods)
        assert all(clsact(node, pod) for pod in pods)  # empty by now: to remove it is what loses packets

"""The agent stops, dies, returns and is replaced: its pods do not notice, and nothing is left of what went before."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from tests.node.machine import ROOT, Machine, Netns, TestPod, machine
from tests.node.programs import pinned, wait_settled
from tests.node.traffic import lossless_traffic

OTHERS = 20  # more pods, so that a wrong order of changes shows: the time between two of them grows with their number
# The kernels' own listener reports.
MULTICAST = {"fwd_from_stack", "punt_multicast", "punt_options", "fwd_host_in", "fwd_host_out"}


@pytest.fixture
def pods(node: Machine) -> tuple[TestPod, TestPod]:
    """Two pods."""
    return node.make_pod("a"), node.make_pod("b")


def compiled(node: Machine) -> dict[str, int]:
    """Return the inodes of what was compiled; compiling something again would make a new one."""
    return {path.name: path.stat().st_ino for path in (node.directory / "state" / "cache").iterdir()}


def forwarded(node: Machine) -> tuple[int, int]:
    """Return how many packets the node's own stack has forwarded: IPv4, IPv6."""
    names, values = [line.split() for line in node.netns.run("grep", "^Ip:", "/proc/net/snmp").stdout.splitlines()]
    ipv6 = node.netns.run("grep", "Ip6OutForwDatagrams", "/proc/net/snmp6").stdout.split()
    return int(values[names.index("ForwDatagrams")]), int(ipv6[1])


def talk(node: Machine, pods: tuple[TestPod, TestPod]) -> bool:
    """Say whether the pods reach each other and the node, and the node them."""
    a, b = pods
    answers = [node.pings(a, address) for address in (*b.addresses, "192.0.2.10", "2001:db8::10")]
    answers += [node.netns.run("ping", "-c", "1", "-W", "2", each, check=False).returncode == 0 for each in a.addresses]
    return all(answers)


def upgrade(node: Machine, file: str, old: str, new: str) -> None:
    """Give the node another version of the datapath."""
    source = node.directory / "bpf_source"
    shutil.copytree(ROOT / "bpf", source)
    text = (source / file).read_text()
    assert old in text
    (source / file).write_text(text.replace(old, new))
    node.configure(paths={"bpf_source": source})


def stop(node: Machine) -> None:
    """End the agent in good order."""
    assert node.stop_agent() == 0


def stop_for_another_program(node: Machine) -> None:
    """End the agent; the next one has another from_pod and another to_pod."""
    stop(node)
    upgrade(node, "counters.h", "->packets++", "->packets += skb->len ? 1 : 2")


def stop_for_another_layout(node: Machine) -> None:
    """End the agent; the next one's map of endpoints is another one, since its values are larger."""
    stop(node)
    upgrade(node, "maps.h", "    __u8 via_stack;", "    __u64 news;\n    __u8 via_stack;")


PROGRAMS = {"from_pod", "to_pod", "from_uplink", "to_uplink", "from_tunnel", "to_tunnel"}


@pytest.mark.parametrize(
    ("end", "replaced"),
    [
        (stop, set()),
        (Machine.kill_agent, set()),
        (stop_for_another_program, PROGRAMS),
        (stop_for_another_layout, {"endpoints", *PROGRAMS}),
    ],
)
def test_nothing_is_lost(
    node: Machine, pods: tuple[TestPod, TestPod], end: Callable[[Machine], None], replaced: set[str]
) -> None:
    """No packet of a running flow is lost, or leaves the fast path, while the agent ends and another one begins."""
    wait_settled(node, *pods)
    others = [node.make_pod("other") for _ in range(OTHERS)]  # whose programs have not moved yet
    ids, objects, counted, by_the_stack = pinned(node), compiled(node), node.packets(), forwarded(node)
    with lossless_traffic(*pods):
        end(node)
        node.start_agent()
        wait_settled(node, *pods, *others)
    new = {name.partition(":")[0] for name, number in pinned(node).items() if ids.get(name) != number}
    assert new == replaced
    assert len(pinned(node)) == len(ids)
    assert (compiled(node) == objects) == (not replaced)
    grown = {name: packets - counted[name] for name, packets in node.packets().items() if packets != counted[name]}
    assert grown.keys() <= {"fwd_local", *MULTICAST}
    assert forwarded(node) == by_the_stack


def test_settling_loses_nothing(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """No packet is lost, or leaves the fast path, while the programs of new pods move to where they shall stay."""
    by_the_stack = forwarded(node)
    with lossless_traffic(*pods):
        wait_settled(node, *pods)
    assert forwarded(node) == by_the_stack


def test_pods_live_without_an_agent(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """With the agent dead, pods reach each other and the node, and the node them; a DEL waits for its return."""
    node.kill_agent()
    assert talk(node, pods)
    netns = Netns("late")
    try:
        refused = node.cni("ADD", container_id="late", netns=str(netns.path))
    finally:
        netns.delete()
    assert (refused.exit_code, refused.json()["code"]) == (1, 11)
    for pod in pods:
        node.delete_pod(pod)
    node.start_agent()
    assert not any(node.traces().values())


def test_terminated_among_adds(node: Machine) -> None:
    """SIGTERM ends the agent while it serves ADDs, and what was cut short leaves nothing."""
    with ExitStack() as stack:
        crowd = [Netns("crowd") for _ in range(8)]
        for netns in crowd:
            stack.callback(netns.delete)
        served = threading.Event()
        with ThreadPoolExecutor(len(crowd)) as pool:
            calls = [pool.submit(add_until_refused, node, netns, served) for netns in crowd]
            assert served.wait(30)
            stop(node)
        counts = [call.result() for call in calls]
        node.start_agent()
        assert len([row for row in node.traces()["rows"] if "crowd" in row]) == sum(counts)
        for netns, attached in zip(crowd, counts, strict=True):
            for number in range(attached + 1):
                done = node.cni("DEL", container_id=netns.name, netns=str(netns.path), ifname=f"eth{number}")
                assert done.exit_code == 0
    assert not any(node.traces().values())


def add_until_refused(node: Machine, netns: Netns, served: threading.Event) -> int:
    """ADD one interface after another to a pod, until the agent ends; return how many there are."""
    for number in itertools.count():
        outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), ifname=f"eth{number}")
        if outcome.exit_code != 0:
            return number
        served.set()
    raise AssertionError("the agent goes on for ever")


def test_pods_of_an_earlier_boot_are_forgotten(node: Machine, pods: tuple[TestPod, TestPod]) -> None:
    """After a reboot nothing is left of earlier pods: their addresses are free, their devices, if any, are gone."""
    node.kill_agent()
    with closing(sqlite3.connect(node.directory / "state" / "ipam.db")) as db, db:
        assert db.execute("UPDATE attachment SET boot_id = 'an earlier one'").rowcount == 2
    node.netns.run("ip", "link", "delete", pods[0].device)
    node.start_agent()
    assert not any(node.traces().values())
    used = {labels: value for (name, labels), value in node.metrics().items() if name == "podlane_ipam_addresses_used"}
    assert set(used.values()) == {0}
    assert talk(node, (node.make_pod("c"), node.make_pod("d")))


def test_two_agents_side_by_side(node: Machine, pods: tuple[TestPod, TestPod], tmp_path: Path) -> None:
    """Agents with paths and namespaces of their own share a machine, and even addresses; the end of one is its own."""
    (tmp_path / "other").mkdir()
    with machine(tmp_path / "other") as other:
        other.add_uplink()
        other.start_agent()
        others = other.make_pod("c"), other.make_pod("d")
        assert {*others[0].addresses} & {*pods[0].addresses, *pods[1].addresses}
        assert pinned(node).keys() == pinned(other).keys()
        assert not set(pinned(node).values()) & set(pinned(other).values())
        assert talk(node, pods)
        assert talk(other, others)
        for pod in others:
            other.delete_pod(pod)
        assert not any(other.traces().values())
        stop(other)
    assert talk(node, pods)
    assert node.repairs() == {}

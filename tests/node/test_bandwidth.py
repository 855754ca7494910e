"""Limits of bandwidth on a real node: all bytes pass the pod's queues, however they come and go."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.node.echo import transfer
from tests.node.machine import Machine, Netns, TestPod, machine
from tests.node.traffic import RATE, lossless_traffic

WORLD = ("198.51.100.1", "2001:db8:f::1")
SIZE = 1 << 20  # bytes: ten times the bursts
RATES = {"ingressRate": 80_000_000, "ingressBurst": 800_000, "egressRate": 40_000_000, "egressBurst": 800_000}
BY_FAMILY = pytest.mark.parametrize("family", [0, 1], ids=["IPv4", "IPv6"])


@pytest.fixture(scope="module", params=["tcx", "clsact"])
def node(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node with a world around it that all tests of this module share."""
    with machine(tmp_path_factory.mktemp("node"), hooks=request.param) as it:
        it.add_world()
        it.start_agent()
        yield it


def configuration(**limits: int) -> dict[str, Any]:
    """Return what a runtime says of limits."""
    return {"runtimeConfig": {"bandwidth": limits}}


def add(node: Machine, **limits: int) -> TestPod:
    """Make a pod with these limits."""
    netns = node.add_netns("limited")
    outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), config=configuration(**limits))
    assert outcome.exit_code == 0, f"{outcome.stdout}\n{node.log_tail()}"
    return TestPod(netns, netns.name, outcome.json())


def check(node: Machine, pod: TestPod, **limits: int) -> str:
    """CHECK a pod; return what is wrong with it."""
    config = {**configuration(**limits), "prevResult": pod.result}
    outcome = node.cni("CHECK", container_id=pod.container_id, netns=str(pod.netns.path), config=config)
    return outcome.stdout


@pytest.fixture
def pod(node: Machine) -> Iterator[TestPod]:
    """Make a pod that is limited both ways; afterwards delete it, and see that nothing is left."""
    it = add(node, **RATES)
    assert check(node, it, **RATES) == ""
    yield it
    assert check(node, it, **RATES) == ""
    node.delete_pod(it)
    assert not any(node.traces().values())


@pytest.fixture
def other(node: Machine, pod: TestPod) -> Iterator[TestPod]:
    """Make a pod without limits, that goes before the limited one."""
    it = node.make_pod("free")
    yield it
    assert it.device != pod.device
    node.delete_pod(it)


def queue(node: Machine, device: str) -> Any:  # noqa: ANN401  # as tc prints it
    """Return a device's root qdisc, with its counters."""
    (found,) = json.loads(node.netns.run("tc", "-s", "-j", "qdisc", "show", "dev", device, "root").stdout)
    return found


def assert_limited(node: Machine, device: str, sender: Netns, receiver: Netns, address: str) -> None:
    """Assert that what is sent arrives, that all of it passes the device's queue, and has to wait there."""
    before = queue(node, device)
    sent, received, _ = transfer(sender, receiver, address, SIZE)
    after = queue(node, device)
    assert sent == received
    assert after["bytes"] - before["bytes"] > SIZE
    assert after["overlimits"] > before["overlimits"]


@BY_FAMILY
def test_what_a_pod_receives(node: Machine, pod: TestPod, other: TestPod, family: int) -> None:
    """What other pods, the world and the node send to it passes the queue of its host end."""
    for sender in (other.netns, node.world, node.netns):
        assert_limited(node, pod.device, sender, pod.netns, pod.addresses[family])


@BY_FAMILY
def test_what_a_pod_sends(node: Machine, pod: TestPod, other: TestPod, family: int) -> None:
    """What it sends to other pods, the world and the node passes its shaper's queue, and is masqueraded as ever."""
    node_address = ("192.0.2.10", "2001:db8::10")[family]
    before = node.packets()
    for receiver, address in (
        (other.netns, other.addresses[family]),
        (node.world, WORLD[family]),
        (node.netns, node_address),
    ):
        assert_limited(node, f"{pod.device}o", pod.netns, receiver, address)
    _, _, seen = transfer(pod.netns, node.world, WORLD[family], 1 << 20)
    assert seen == node_address
    after = node.packets()
    assert after["fwd_shaped"] > before["fwd_shaped"]
    assert after["masq_out"] > before["masq_out"]


def test_fast_path_to_the_queue(node: Machine) -> None:
    """A limit on what a pod receives takes nothing else from the fast path: neither side's packets see the stack."""
    limited = add(node, ingressRate=80_000_000, ingressBurst=800_000)
    free = node.make_pod("free")
    before = node.packets()
    assert_limited(node, limited.device, free.netns, limited.netns, limited.addresses[0])
    grown = {name: count - before[name] for name, count in node.packets().items() if count != before[name]}
    for each in (limited, free):
        node.delete_pod(each)
    assert grown["fwd_queued"] > 0
    assert grown["fwd_local"] > grown["fwd_queued"]  # the answers, too
    assert {"punt_reply", "fwd_shaped"} & grown.keys() == set(), grown


def test_a_pod_without_limits_is_faster(node: Machine, pod: TestPod, other: TestPod) -> None:
    """While a limited pod receives something, one without limits receives as much several times, and has no queue."""
    rounds, done = 0, threading.Event()

    def receive() -> None:
        transfer(node.world, pod.netns, pod.addresses[0], 4 * SIZE)
        done.set()

    receiver = threading.Thread(target=receive)
    receiver.start()
    while not done.is_set():
        transfer(node.world, other.netns, other.addresses[0], 4 * SIZE)
        rounds += 1
    receiver.join()
    assert rounds > 2
    assert queue(node, other.device)["kind"] == "noqueue"
    names = node.netns.run("ip", "-o", "link").stdout
    assert f"{pod.device}o:" in names
    assert f"{other.device}o:" not in names


def test_kernel_has_what_was_asked(node: Machine, pod: TestPod) -> None:
    """Rates are in bytes per second, and what may wait is the burst and 25 ms of the rate, as with the reference."""
    for device, rate, limit in ((pod.device, 10_000_000, 350_000), (f"{pod.device}o", 5_000_000, 225_000)):
        shown = node.netns.run("tc", "-r", "-d", "qdisc", "show", "dev", device, "root").stdout
        options = queue(node, device)["options"]
        assert options["rate"] == rate, shown
        assert options["lat"] in (25_000, 24_999, 25_001) or options.get("limit") == limit, shown


def test_agent_restart(node: Machine, pod: TestPod, other: TestPod) -> None:
    """A new agent takes queues and shapers over as they are: same handles, same counters, no repairs."""
    transfer(other.netns, pod.netns, pod.addresses[0], SIZE)
    before = [queue(node, device)["bytes"] for device in (pod.device, f"{pod.device}o")]
    node.kill_agent()
    assert_limited(node, pod.device, other.netns, pod.netns, pod.addresses[0])
    node.start_agent()
    assert node.repairs() == {}
    after = [queue(node, device)["bytes"] for device in (pod.device, f"{pod.device}o")]
    assert all(now >= then for now, then in zip(after, before, strict=True))
    assert_limited(node, f"{pod.device}o", pod.netns, other.netns, other.addresses[0])


@pytest.mark.parametrize("harm", ["queue", "shaper's queue", "shaper", "shaper down"])
def test_repairs(node: Machine, pod: TestPod, other: TestPod, harm: str) -> None:
    """Queues and shapers that somebody removes or sets down are put back, and the limits hold again."""
    shaper = f"{pod.device}o"
    argv = {
        "queue": ("tc", "qdisc", "delete", "dev", pod.device, "root"),
        "shaper's queue": ("tc", "qdisc", "delete", "dev", shaper, "root"),
        "shaper": ("ip", "link", "delete", shaper),
        "shaper down": ("ip", "link", "set", shaper, "down"),
    }[harm]
    before = sum(node.repairs().values())
    node.netns.run(*argv)
    node.wait_for(lambda: sum(node.repairs().values()) > before, "a repair")
    assert check(node, pod, **RATES) == ""
    assert_limited(node, pod.device, other.netns, pod.netns, pod.addresses[0])
    assert_limited(node, shaper, pod.netns, other.netns, other.addresses[0])


def test_check_compares(node: Machine, pod: TestPod) -> None:
    """CHECK says so if it is called with other limits than ADD."""
    assert "the limits are" in check(node, pod, **{**RATES, "egressRate": 8_000_000})


def test_qdiscs_of_others(node: Machine, other: TestPod) -> None:
    """A qdisc that somebody else has put on a pod's device stays, whatever passes the agent makes."""
    foreign = "root tbf rate 1gbit burst 1mb latency 1ms"
    node.netns.run("tc", "qdisc", "add", "dev", other.device, *foreign.split())
    assert check(node, other) == ""
    assert queue(node, other.device)["kind"] == "tbf"


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"ingressRate": 8_000_000}, "ingressBurst must also be set"),
        ({"egressRate": 5, "egressBurst": 8_000_000}, "less than a byte"),
        ({"egressRate": 8_000_000, "egressBurst": 1 << 36}, "more than the 4 GiB that can wait"),
    ],
)
def test_refused(node: Machine, limits: dict[str, int], message: str) -> None:
    """Limits that mean nothing are refused with code 7, key and value, and leave nothing."""
    netns = node.add_netns("refused")
    outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), config=configuration(**limits))
    assert (outcome.exit_code, outcome.json()["code"]) == (1, 7)
    assert message in outcome.json()["msg"]
    assert not any(node.traces().values())


def test_nothing_is_lost_below_the_limit(node: Machine) -> None:
    """Packets of a pod whose limits are above what it sends arrive all, both ways."""
    a = add(node, ingressRate=2**34, ingressBurst=2**30, egressRate=2**34, egressBurst=2**30)
    b = node.make_pod("free")
    with lossless_traffic(a, b):
        before = node.packets()["fwd_shaped"]
        node.wait_for(lambda: node.packets()["fwd_shaped"] > before + 2 * RATE, "a second's packets")
    for each in (a, b):
        node.delete_pod(each)

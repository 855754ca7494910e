"""The writer loop, over tables in memory that keep to the same interface as those of the kernel."""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.plan import Outside
from agent.state import Attached, Hook, Lanes, Prefix, TunnelDevice
from agent.store import AddressTaken, Netns, Phase
from cni.call import Attachment
from tests.support import prefix
from tests.unit.memory import FOREIGN, NAMES, SECONDS, SUBNETS, World

ONE = ("settings", "tunnel_devices", "tunnels")
"""Of which there is one."""
GATEWAY = ip_address("198.51.100.254")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_state_becomes_the_desired_one(data: st.DataObject) -> None:
    """Whatever pods there are, and whatever the kernel holds at first, one pass makes it equal to the plan."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), resync_seconds=3600)
        for name in data.draw(st.lists(st.sampled_from("abcd"), unique=True)):
            pod = world.add(name, data.draw(st.sampled_from(Phase)))
            if data.draw(st.booleans()):
                world.devices.existing.pop(pod.device)
        for name in NAMES:
            key, value = FOREIGN[name]
            wanted = list(getattr(world.desired(), name))
            present = data.draw(st.sets(st.sampled_from([*wanted, key])))
            right = data.draw(st.booleans())
            world.table(name).objects.update(
                {each: getattr(world.desired(), name).get(each, value) if right else value for each in present}
            )
        with world.running():
            assert world.actual() == world.desired()
            active = {pod.device for pod in world.store.pods() if pod.phase is Phase.ACTIVE}
            assert active <= world.devices.existing.keys()


def test_order(slow: World) -> None:
    """Everything new is in force before anything old goes; programs follow their maps, and go before them."""
    for name in NAMES:
        key, value = FOREIGN[name]
        slow.table(name).objects[key] = value
    slow.add("a")
    with slow.running():
        done = [what for what in slow.journal if what[0] != "read"]
        assert done == [("upsert", name) for name in NAMES] + [("delete", name) for name in reversed(NAMES)]
    chain = ("queues", "endpoints", "hooks", "uplinks", "neighbours")
    assert sorted(chain, key=NAMES.index) == list(chain)
    assert NAMES.index("gateways") < NAMES.index("routes")
    assert max(map(NAMES.index, ("settings", "prefixes", "node_addresses", "host_ports"))) < NAMES.index("hooks")


def test_order_of_an_upgrade(slow: World) -> None:
    """Where programs of an earlier agent lead out, the new ones' maps know the device before they take over."""
    hooks = slow.desired().hooks
    at_eth0 = {hook: Attached(attached.ifindex, "stale:1") for hook, attached in hooks.items() if hook.device == "eth0"}
    slow.table("hooks").objects.update(at_eth0)
    slow.add("a")
    with slow.running():
        done = [name for what, name in slow.journal if what == "upsert" and name in ("uplinks", "hooks", "tunnels")]
        assert done == ["uplinks", "hooks", "uplinks", "tunnels"]
        assert slow.actual() == slow.desired()


def test_pass_touches_only_what_differs(slow: World) -> None:
    """A pass without a change does nothing, and one that somebody asked for does not read the kernel again."""
    pod = slow.add("a")
    with slow.running():
        slow.journal.clear()
        slow.sync()
        assert slow.journal == []
        slow.store.begin_release(pod.attachment)
        slow.sync()
        tables = ("routes", "gateways", "neighbours", "host_ports", "node_addresses", "endpoints", "queues")
        assert slow.journal == [("delete", name) for name in tables]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE])
def test_repairs(world: World, name: str) -> None:
    """What is removed, changed or added behind the loop's back is put right, and counted: three repairs."""
    world.add("a")
    world.add("b")
    with world.running():
        first, second, *_ = world.table(name).objects
        key, value = FOREIGN[name]
        tampered = dict(world.table(name).objects)
        del tampered[first]
        tampered[second] = tampered[key] = value
        world.table(name).objects = tampered  # all at once, between two passes
        world.wait_until(lambda: world.actual() == world.desired())
        world.full_pass()
        assert world.repairs == {name: 3}


def test_own_work_is_no_repair(world: World) -> None:
    """What changes because pods come and go is not counted, however often the kernel is read meanwhile."""
    world.table("endpoints").objects.update([FOREIGN["endpoints"]])  # found at the start: nobody's doing
    with world.running():
        pods = []
        for number in range(5):
            pods.append(world.add(f"pod{number}"))
            world.full_pass()
            assert world.actual() == world.desired()
        for pod in pods:
            world.remove(pod)
            world.full_pass()
        assert world.actual() == world.desired()
        assert not world.repairs


def test_kernel_changed_brings_the_full_pass_forward(slow: World) -> None:
    """An event from the kernel leads to a repair now, not when the next comparison would be due."""
    slow.add("a")
    with slow.running():
        slow.table("routes").objects = {}
        slow.loop.kernel_changed()
        slow.wait_until(lambda: slow.actual() == slow.desired())
        assert slow.repairs == {"routes": 2}


def test_events_during_a_pass_are_not_forgotten(slow: World) -> None:
    """What changes while the kernel is being read leads to another full pass."""
    slow.add("a")
    with slow.running():

        def interfere() -> None:
            slow.table("routes").after_read = lambda: None
            slow.table("routes").objects = {}
            slow.loop.kernel_changed()

        slow.table("routes").after_read = interfere
        slow.loop.kernel_changed()
        slow.wait_until(lambda: slow.repairs["routes"] == 2)
        slow.wait_until(lambda: slow.actual() == slow.desired())


def test_burst_of_events_is_one_full_pass(slow: World) -> None:
    """A hundred events at once lead to one reading of the kernel."""
    with slow.running():
        slow.journal.clear()
        for _ in range(100):
            slow.loop.kernel_changed()
        slow.wait_until(lambda: bool(slow.journal))
        slow.sync()
        assert slow.journal == [("read", name) for name in NAMES]


def test_a_look_is_at_the_pods(slow: World) -> None:
    """Who asks for a look has what is the pods' read and put right, and does not wait for what is of other nodes."""
    pod = slow.add("a")
    with slow.running():
        slow.journal.clear()
        looks, routes = slow.looks, dict(slow.table("peer_routes").objects)
        for name in ("endpoints", "hooks", "peer_routes"):
            slow.table(name).objects.clear()
        slow.loop.sync(SECONDS, look=True)
        slow.loop.check(pod)
        assert {name for what, name in slow.journal if what == "read"} == set(NAMES) - {"prefixes", "peer_routes"}
        assert slow.looks == looks
        assert slow.repairs.keys() == {"endpoints", "hooks"}
        slow.loop.kernel_changed()
        slow.wait_until(lambda: slow.table("peer_routes").objects == routes)


def test_many_entries_are_read_seldom(slow: World) -> None:
    """What took long to read, as routes to thousands of nodes do, is not read again with the next full passes."""

    def toil() -> None:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass

    slow.table("peer_routes").before_read = toil
    with slow.running():
        key, value = FOREIGN["peer_routes"]
        slow.table("peer_routes").objects[key] = value
        slow.journal.clear()
        slow.loop.kernel_changed()
        slow.wait_until(lambda: ("read", "subnets") in slow.journal)
        slow.sync()
        assert {name for what, name in slow.journal if what == "read"} == set(NAMES) - {"prefixes", "peer_routes"}
        assert key in slow.table("peer_routes").objects
        slow.outside = replace(slow.outside, uplinks={})  # the kernel may have dropped routes with one
        slow.loop.kernel_changed()
        slow.wait_until(lambda: key not in slow.table("peer_routes").objects)


def test_sync_waits_for_a_pass_that_began_later(slow: World) -> None:
    """A pass that is under way when sync() is called does not count, for it may have missed what the caller did."""
    reading, go_on = threading.Event(), threading.Event()

    def block() -> None:
        reading.set()
        assert go_on.wait(SECONDS)

    slow.table("endpoints").before_read = block
    slow.loop.start()
    try:
        assert reading.wait(SECONDS)  # the first pass knows of no pod
        pod = slow.add("a")
        with pytest.raises(TimeoutError, match=r"the kernel was not brought up to date within 0.01 s"):
            slow.loop.sync(0.01)
        waiting = threading.Thread(target=slow.sync)
        waiting.start()
        go_on.set()
        waiting.join(SECONDS)
        assert not waiting.is_alive()
        assert slow.actual() == slow.desired()
        slow.loop.check(pod)
    finally:
        go_on.set()
        slow.loop.stop()


def test_many_callers_of_sync(slow: World) -> None:
    """Every one of many concurrent callers finds its own pod in force."""
    failures: list[object] = []

    def attach(name: str) -> None:
        try:
            pod = slow.add(name)
            slow.sync()
            slow.loop.check(pod)
        except Exception as error:
            failures.append(error)

    with slow.running():
        threads = [threading.Thread(target=attach, args=(f"pod{number}",)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert slow.actual() == slow.desired()


def test_stop(slow: World) -> None:
    """After stop() the thread is gone, and whoever still asks is told in time."""
    before = threading.active_count()
    with slow.running():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(TimeoutError):
        slow.loop.sync(0.01)


def test_guest_is_planned_for_while_it_is_there(slow: World) -> None:
    """A guest has all that a pod has in the kernel, for as long as it is one, and no row in the store."""
    guest = slow.add("guest")
    slow.store.remove(guest.attachment)
    with slow.running():
        with slow.loop.guest(guest):
            slow.sync()
            slow.loop.check(guest)
        slow.sync()
        assert not slow.tables.endpoints.read()


def test_settling_waits_until_nobody_does(slow: World) -> None:
    """What can wait is done after a quiet second, all of it, and not in a pass that somebody waits for."""
    slow.to_settle = 3
    with slow.running():
        for _ in range(3):
            slow.sync()
            assert ("settle", "hooks") not in slow.journal
        slow.wait_until(lambda: slow.journal.count(("settle", "hooks")) == 3)


def test_new_mac_address_of_a_pod(world: World) -> None:
    """What the kernel has as a pod's MAC address counts; with each change the pod is told again where the node is."""
    pod, other = world.add("a"), world.add("b")
    with world.running():
        number = world.devices.existing[pod.device]
        world.devices.other_ends = {number: "02:00:00:00:00:77", world.devices.existing[other.device]: other.mac}
        world.wait_until(lambda: world.table("endpoints").objects[pod.addresses[0]].mac == "02:00:00:00:00:77")
        world.loop.check(pod)
        assert world.actual() == world.desired()
        world.devices.other_ends = {}
        world.full_pass()
        world.full_pass()
        told = world.journal.count(("introduce", pod.device))
        world.full_pass()
        assert world.journal.count(("introduce", pod.device)) == told
        assert ("introduce", other.device) not in world.journal
        assert world.table("endpoints").objects[pod.addresses[0]].mac == pod.mac


def test_gateway_that_a_pod_gets(slow: World) -> None:
    """A pod may get the address that the node has as a gateway: both it and those that had the gateway are in force."""
    first = slow.add("a")
    with slow.running():
        assert slow.actual().gateways
        taken = Attachment("net", "taker", "eth0")
        requested = [each.gateway for each in SUBNETS if each.gateway]
        netns = Netns("/x", "4:1")
        pod = slow.store.reserve(
            taken, device="pl-t", mac="02:00:00:00:00:01", mtu=1500, netns=netns, requested=requested
        )
        slow.devices.create(pod.device)
        slow.sync()
        for each in (first, pod):
            slow.loop.check(each)
        assert not slow.actual().gateways
        assert slow.actual() == slow.desired()
        slow.devices.existing.pop(pod.device)
        slow.store.begin_release(taken)
        slow.sync()
        assert len(slow.actual().gateways) == 2
        slow.loop.check(first)


def test_what_is_in_force_is_not_compared_again(slow: World) -> None:
    """Of other nodes there may be thousands: a pass that somebody waits for does not go through them."""

    class Watched(dict[Prefix, Lanes]):
        compared = 0

        def __eq__(self, other: object) -> bool:
            Watched.compared += 1
            return super().__eq__(other)

    slow.outside = replace(slow.outside, prefixes=Watched(slow.outside.prefixes))
    slow.table("prefixes").read = lambda: Watched(slow.outside.prefixes)  # type: ignore[method-assign]
    with slow.running():
        Watched.compared = 0
        pod = slow.add("a")
        slow.sync()
        slow.loop.check(pod)
        assert Watched.compared == 0
        slow.outside = replace(slow.outside, prefixes=Watched({prefix("10.0.0.0/8"): Lanes(native=True)}))
        slow.sync()
        assert Watched.compared > 0
        assert dict(slow.table("prefixes").objects) == dict(slow.outside.prefixes)


def test_before_the_cluster_is_known(slow: World) -> None:
    """An agent that nobody has told of other nodes yet takes nothing of theirs away; once it is told, it does."""
    of_peers = {"tunnel_devices", "prefixes", "tunnels", "peer_routes", "hooks"}
    slow.table("tunnel_devices").objects["podlane.vx"] = TunnelDevice(4789, 1450)
    left = {
        "tunnel_devices": "podlane.vx",
        "prefixes": FOREIGN["prefixes"][0],
        "tunnels": FOREIGN["tunnels"][0],
        "peer_routes": FOREIGN["peer_routes"][0],
        "hooks": Hook("podlane.vx", "ingress"),
    }
    for name, key in left.items():
        slow.table(name).objects.setdefault(key, FOREIGN[name][1])
    for name in set(NAMES) - of_peers:
        slow.table(name).objects[FOREIGN[name][0]] = FOREIGN[name][1]
    slow.outside = Outside(live=False)
    with slow.running():
        assert {name for name in NAMES if slow.table(name).objects} - {"subnets"} == of_peers
        slow.outside = Outside(live=True)
        slow.sync()
        assert {name for name in NAMES if slow.table(name).objects} == {"subnets"}


def test_addresses_that_no_pod_may_have(world: World) -> None:
    """An address that the node has, or by way of which it sends, is refused; its neighbours are not."""
    uplinks = {name: replace(each, gateways=frozenset({GATEWAY})) for name, each in world.outside.uplinks.items()}
    world.outside = replace(world.outside, uplinks=uplinks)
    with world.running():
        world.loop.refuse_own([GATEWAY + 1])
        for address in (GATEWAY, *world.outside.node_addresses):
            with pytest.raises(AddressTaken, match=f"{address} is in use"):
                world.loop.refuse_own([GATEWAY + 1, address])

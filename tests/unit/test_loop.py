"""The writer loop, over tables in memory that keep to the same interface as those of the kernel."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.state import Attached, Endpoint, Hook, KernelError, Neighbour
from agent.store import Phase
from tests.unit.memory import NAMES, SECONDS, World

FOREIGN: dict[str, tuple[Any, Any]] = {
    "endpoints": (ip_address("192.0.2.1"), Endpoint(99, "02:00:00:00:00:99")),
    "hooks": (Hook("pl-gone", "ingress"), Attached(99, "from_pod")),
    "neighbours": (Neighbour(ip_address("192.0.2.1"), 99), "02:00:00:00:00:99"),
    "routes": (ip_address("192.0.2.1"), 99),
}


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Give a world whose kernel is compared with the plan all the time."""
    return World(tmp_path)


@pytest.fixture
def slow(tmp_path: Path) -> World:
    """Give a world whose kernel is read once at the start, and again only if somebody asks for it."""
    return World(tmp_path, resync_seconds=3600)


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """Give a list that fills with the loop's error messages."""
    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agent.loop").addHandler(handler)
    yield messages
    logging.getLogger("agent.loop").removeHandler(handler)


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
        assert [what for what in slow.journal if what[0] != "read"] == [
            ("upsert", "endpoints"),
            ("upsert", "hooks"),
            ("upsert", "neighbours"),
            ("upsert", "routes"),
            ("delete", "routes"),
            ("delete", "neighbours"),
            ("delete", "hooks"),
            ("delete", "endpoints"),
        ]


def test_pass_touches_only_what_differs(slow: World) -> None:
    """A pass without a change does nothing, and one that somebody asked for does not read the kernel again."""
    pod = slow.add("a")
    with slow.running():
        slow.journal.clear()
        slow.sync()
        assert slow.journal == []
        slow.store.begin_release(pod.attachment)
        slow.sync()
        assert slow.journal == [("delete", name) for name in ("routes", "neighbours", "endpoints")]


@pytest.mark.parametrize("name", NAMES)
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


@pytest.mark.parametrize("name", NAMES)
def test_refused_upsert(world: World, name: str, errors: list[str]) -> None:
    """What the kernel refuses is tried again with every pass and logged once; the rest is in force."""
    good, bad = world.add("good"), world.add("bad")
    key = next(key for key, value in getattr(world.desired(), name).items() if is_of("bad", world, key, value))
    world.table(name).refused = {key: "EPERM"}
    with world.running():
        world.full_pass()
        world.full_pass()
        world.loop.check(good)
        with pytest.raises(KernelError, match=r"^EPERM$"):
            world.loop.check(bad)
        expected = [f"kernel refused what={f'{name} {key}'!r} error='EPERM'"]
        assert errors == expected
        world.table(name).refused = {}
        world.full_pass()
        world.loop.check(bad)
        assert world.actual() == world.desired()
        assert errors == expected
        world.table(name).refused = {key: "EPERM"}
        del world.table(name).objects[key]
        world.full_pass()
        world.full_pass()
        assert errors == expected * 2  # a failure that comes back is news


def is_of(pod: str, world: World, key: object, value: object) -> bool:
    """Say whether an object of a table belongs to that pod."""
    index = world.devices.existing[f"pl-{pod}"]
    return index in (value, getattr(value, "ifindex", None), getattr(key, "ifindex", None))


@pytest.mark.parametrize("name", NAMES)
def test_refused_delete(world: World, name: str, errors: list[str]) -> None:
    """What cannot be deleted is tried again until it goes, and logged once."""
    key, value = FOREIGN[name]
    world.table(name).objects[key] = value
    world.table(name).refused = {key: "EBUSY"}
    with world.running():
        world.full_pass()
        world.full_pass()
        assert world.table(name).objects == {key: value}
        assert errors == [f"kernel refused what={f'{name} {key}'!r} error='EBUSY'"]
        world.table(name).refused = {}
        world.full_pass()
        assert world.actual() == world.desired()
        assert len(errors) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("trouble", [KernelError("list: ENOBUFS"), RuntimeError("a bug")])
def test_unreadable_table(world: World, name: str, trouble: Exception, errors: list[str]) -> None:
    """A table that cannot be read fails sync() with the reason, logged once, until it can; the thread lives on."""
    pod = world.add("a")

    def fail() -> None:
        raise trouble

    with world.running():
        world.table(name).before_read = fail
        world.wait_until(lambda: bool(errors))
        for _ in range(3):
            with pytest.raises(KernelError, match=f"the kernel cannot be brought up to date: {trouble}"):
                world.sync()
            with pytest.raises(KernelError):
                world.loop.check(pod)
        assert errors == ["pass failed, and will be tried again"]
        world.table(name).before_read = lambda: None
        world.wait_until(lambda: healthy(world))
        world.loop.check(pod)
        assert world.actual() == world.desired()


def healthy(world: World) -> bool:
    """Say whether a pass succeeds."""
    try:
        world.sync()
    except KernelError:
        return False
    return True


def test_check_before_anything_is_in_force(slow: World) -> None:
    """A pod whose device is missing, or that no pass has seen, is not in force, and the message says which part."""
    with slow.running():
        pod = slow.add("a")
        with pytest.raises(KernelError, match=r"endpoints 10\.0\.0\.1 is not in force"):
            slow.loop.check(pod)
        slow.sync()
        slow.loop.check(pod)
        slow.devices.existing.clear()
        with pytest.raises(KernelError, match="device pl-a is missing"):
            slow.loop.check(pod)


def test_missing_device_is_made_again(slow: World) -> None:
    """The device of an active pod is restored first, carries packets last, and counts as one repair."""
    active = slow.add("active")
    for name, phase in (("reserved", Phase.RESERVED), ("releasing", Phase.RELEASING)):
        slow.add(name, phase)
    with slow.running():
        slow.devices.existing.clear()
        slow.journal.clear()
        slow.loop.kernel_changed()
        slow.wait_until(lambda: ("finish_restore", active.device) in slow.journal)
        slow.sync()
        assert slow.journal[0] == ("restore", active.device)
        assert slow.journal[-1] == ("finish_restore", active.device)
        assert ("upsert", "hooks") in slow.journal
        assert slow.devices.existing.keys() == {active.device}
        assert slow.actual() == slow.desired()
        assert slow.repairs == {"devices": 1}


def test_fallen_device_is_set_up(world: World) -> None:
    """A host end that somebody has set down comes up again, and counts as a repair."""
    pod = world.add("a")
    reserved = world.add("b", Phase.RESERVED)
    with world.running():
        world.devices.down = {pod.device, reserved.device, "foreign"}
        world.wait_until(lambda: world.devices.down == {reserved.device, "foreign"})
        world.full_pass()
        assert world.repairs == {"devices": 1}


def test_device_that_cannot_be_made_again(world: World, errors: list[str]) -> None:
    """A pod whose namespace is gone is logged once, costs the others nothing, and is no repair."""
    lost, other = world.add("lost"), world.add("other")
    with world.running():
        world.devices.refused = {lost.device: "no such netns"}
        del world.devices.existing[lost.device]
        for _ in range(4):
            world.full_pass()
        world.loop.check(other)
        assert world.actual() == world.desired()
        assert errors == [f"kernel refused what='device {lost.device}' error='no such netns'"]
        assert not world.repairs["devices"]


def test_stop(slow: World) -> None:
    """After stop() the thread is gone, and whoever still asks is told in time."""
    before = threading.active_count()
    with slow.running():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    with pytest.raises(TimeoutError):
        slow.loop.sync(0.01)

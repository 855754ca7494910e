"""The writer loop when the kernel refuses: what is tried again, what is logged, and what is still in force."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from agent.pods import shaper_of
from agent.state import KernelError, PodPort
from agent.store import Phase
from tests.unit.memory import FOREIGN, NAMES, POD_TABLES, World


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """Give a list that fills with the loop's error messages."""
    messages: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("agent").addHandler(handler)
    yield messages
    logging.getLogger("agent").removeHandler(handler)


@pytest.mark.parametrize("name", POD_TABLES)
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
    if isinstance(value, PodPort):
        return any(each.device == f"pl-{pod}" and value.address in each.addresses for each in world.store.pods())
    index = world.devices.existing[f"pl-{pod}"]
    return index in (key, value, getattr(value, "ifindex", None), getattr(key, "ifindex", None))


def test_refusal_can_be_asked_for(world: World) -> None:
    """Whoever asks is told why an object is refused, as long as it is, and nothing of others."""
    world.table("tunnel_devices").refused = {"podlane.vx": "EADDRINUSE"}
    with world.running():
        assert world.loop.refusal("tunnel_devices", "podlane.vx") == "EADDRINUSE"
        assert world.loop.refusal("tunnel_devices", "podlane.other") == ""
        world.table("tunnel_devices").refused = {}
        world.full_pass()
        assert world.loop.refusal("tunnel_devices", "podlane.vx") == ""


@pytest.mark.parametrize("name", NAMES)
def test_refused_delete(world: World, name: str, errors: list[str]) -> None:
    """What cannot be deleted is tried again until it goes, and logged once."""
    key, value = FOREIGN[name]
    world.table(name).objects[key] = value
    world.table(name).refused = {key: "EBUSY"}
    with world.running():
        world.full_pass()
        world.full_pass()
        assert world.table(name).objects[key] == value
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
        with pytest.raises(KernelError, match=r"queues \d+ is not in force"):
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
        assert slow.devices.existing.keys() == {active.device, shaper_of(active.device)}
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

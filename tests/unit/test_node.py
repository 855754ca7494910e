"""The node's order of calls: one at a time for each attachment, whatever its runtime gave up waiting for; and GC."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent.node import Node, Readiness
from agent.store import Phase, Pod, StoreError
from cni.call import Attachment, Call, parse
from cni.errors import CniError, Code
from cni.wire import Request
from tests.unit.calls import config, environment
from tests.unit.memory import World

ONE, OTHER = Attachment("net", "one", "eth0"), Attachment("net", "other", "eth0")


def make_node() -> Node:
    """Return a node whose kernel is never asked."""
    nothing: Any = None
    return Node(store=nothing, wiring=nothing, loop=nothing, mtu=lambda: 1500, readiness=Readiness())


def test_calls_of_one_attachment_take_turns() -> None:
    """A second call waits until the first has ended, also by an error; those of other attachments do not."""
    node, order = make_node(), []
    begun = threading.Event()

    def second() -> None:
        begun.set()
        with node.turn(ONE):
            order.append("second")

    thread = threading.Thread(target=second)
    with suppress(ZeroDivisionError), node.turn(ONE):
        thread.start()
        assert begun.wait(10)
        with node.turn(OTHER):
            order.append("other")
        order.append("first")
        _ = 1 // 0
    thread.join(10)
    assert order == ["other", "first", "second"]


def test_reasons_in_order() -> None:
    """The first thing that keeps ADD from being served is the reason, and a store in trouble is one."""
    readiness = Readiness(unproved="a", uninstalled="b", trouble=lambda: "c", exhausted=lambda: "d")
    seen = []
    for field, value in (("unproved", ""), ("trouble", str), ("uninstalled", ""), ("exhausted", str)):
        seen.append((readiness.reason, bool(readiness.limited)))
        setattr(readiness, field, value)
    assert seen == [("a", True), ("c", True), ("b", False), ("d", False)]  # two of them concern running pods as well
    assert readiness.reason == ""

    def broken() -> str:
        raise StoreError("disk full")

    assert Readiness("", "", exhausted=broken).reason == "disk full"


class MemoryWiring:
    """The part of `agent.wiring.Wiring` that a release needs, on devices in memory."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.refused = ""

    def delete(self, device: str) -> None:
        """Delete it, unless refused."""
        if device == self.refused:
            raise CniError(Code.KERNEL_REFUSED, f"no {device}")
        self._world.devices.existing.pop(device, None)

    def forget(self, pod: Pod) -> None:
        """Do nothing: there is no namespace."""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """Return a running loop over a store; its pods are of the network "net"."""
    it = World(tmp_path, resync_seconds=3600)
    with it.running():
        yield it


def gc(*valid: str, keys: dict[str, object] | None = None, network: str = "net") -> tuple[Call, Request]:
    """Return a GC call with a list of valid containers."""
    listed = [{"containerID": name, "ifname": "eth0"} for name in valid]
    body = json.loads(config(name=network)) | ({"cni.dev/valid-attachments": listed} if keys is None else keys)
    request = Request(environment("GC"), json.dumps(body).encode())
    return parse(request.env, request.stdin), request


def left(world: World) -> list[str]:
    """Return the containers in the store."""
    return sorted(pod.attachment.container_id for pod in world.store.pods())


def gc_node(world: World, wiring: MemoryWiring) -> Node:
    """Return a node on a world."""
    anything: Any = wiring
    return Node(store=world.store, wiring=anything, loop=world.loop, mtu=lambda: 1500, readiness=Readiness())


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (gc("a"), ["a"]),
        (gc("a", "nobody"), ["a"]),
        (gc(), []),
        (gc(keys={"cni.dev/valid-attachments": None}), []),  # null: none is valid
        (gc(keys={}), ["a", "b", "c"]),  # absent: nobody said
        (gc(keys={"cni.dev/attachments": [{"containerID": "c", "ifname": "eth0"}]}), ["c"]),
        (gc(keys={"cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth1"}]}), []),  # another interface
        (gc(network="other"), ["a", "b", "c"]),
    ],
)
def test_gc(world: World, call: tuple[Call, Request], expected: list[str]) -> None:
    """GC releases what is of its network and not in the list; a list that is absent is no empty one."""
    for name in ("a", "b", "c"):
        world.add(name)
    gc_node(world, MemoryWiring(world)).gc(*call)
    assert left(world) == expected


def test_gc_leaves_alone_what_a_call_is_at_work_on(world: World) -> None:
    """The list may be older than an ADD that is being made, or a call that has its turn: GC touches neither."""
    world.add("new", Phase.RESERVED)
    node, busy = gc_node(world, MemoryWiring(world)), world.add("busy")
    world.add("gone")
    with node.turn(busy.attachment):
        node.gc(*gc())
    assert left(world) == ["busy", "new"]


def test_gc_goes_on_after_failures(world: World) -> None:
    """What cannot be released does not keep GC from the others; the failures come at the end, all of them."""
    wiring = MemoryWiring(world)
    for name in ("a", "b", "c"):
        world.add(name)
    wiring.refused = "pl-a"
    _, request = gc()
    body = {**json.loads(request.stdin), "ipam": {"type": "nowhere"}}
    request = Request(request.env, json.dumps(body).encode())
    with pytest.raises(CniError) as caught:
        gc_node(world, wiring).gc(parse(request.env, request.stdin), request)
    assert left(world) == ["a"]
    assert caught.value.code == Code.KERNEL_REFUSED
    assert "no pl-a" in caught.value.message
    assert 'failed to find plugin "nowhere"' in caught.value.message

"""Requests that no runtime makes: the agent's own code, on a real store, answers each, and keeps nothing of them.

`make soak` sets PODLANE_MUTATIONS for a million of them.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
import struct
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from agent import check, netlink, node
from agent.check import Found
from agent.node import Node, Readiness
from agent.state import Address, KernelError
from agent.store import Phase, Pod
from cni import wire
from cni.commands import handle
from cni.result import Route
from cni.wire import Request, WireError
from tests.mutations import NUMBER, SECONDS, Mutator, assert_valid, command_of, install_giver, mutate_bytes, resident
from tests.support import open_descriptors
from tests.unit.calls import config, environment
from tests.unit.stores import open_store

SEED = 4
SUBNETS = ("10.244.0.0/24", "fd00:10:244::/64")
NETNS = "4:1"
REFUSED_EVERY = 50  # of what the kernel is asked to make
GROWTH = 8 << 20  # bytes by which memory may grow once all code has run: that of the allocator's free lists


class MemoryKernel:
    """What the node needs of `Wiring` and `Loop`: devices in memory, some of which are refused."""

    def __init__(self) -> None:
        self.devices: set[str] = set()
        self._asked = 0

    def create(self, pod: Pod, netns: int) -> None:  # noqa: ARG002  # as Wiring has it
        """Make a device."""
        self._refuse(f"create {pod.device}")
        self.devices.add(pod.device)

    def configure(self, pod: Pod, netns: int, routes: Sequence[Route] | None) -> tuple[Route, ...]:  # noqa: ARG002
        """Take the routes as they are."""
        self._refuse(f"configure {pod.device}")
        return tuple(routes or ())

    def delete(self, device: str) -> None:
        """Delete a device."""
        self.devices.discard(device)

    def forget(self, pod: Pod) -> None:
        """Remember nothing."""

    def sync(self, timeout: float, *, look: bool = False) -> None:
        """Everything is in force at once."""

    def refuse_own(self, addresses: Sequence[Address]) -> None:
        """Have no addresses."""

    def check(self, pod: Pod) -> None:
        """Find it in force."""

    def _refuse(self, what: str) -> None:
        self._asked += 1
        if self._asked % REFUSED_EVERY == 0:
            raise KernelError(f"{what}: refused")


class World:
    """A node with a real store and a kernel in memory, and what calls it has answered."""

    def __init__(self, directory: Path) -> None:
        self.store = open_store(directory / "ipam.db", SUBNETS)
        self.kernel = MemoryKernel()
        kernel: object = self.kernel
        self.node = Node(store=self.store, wiring=kernel, loop=kernel, mtu=lambda: 1500, readiness=Readiness("", ""))  # type: ignore[arg-type]
        self.answers: Counter[tuple[str, int]] = Counter()
        plugins = directory / "plugins"
        plugins.mkdir()
        install_giver(plugins)
        self.path = str(plugins)

    def serve(self, request: Request) -> None:
        """Serve a call, as the agent's threads do, and judge the answer."""
        reply = handle(request, self.node)
        assert_valid(request, reply)
        self.answers[command_of(request), reply.exit_code] += 1

    def delete_all(self) -> None:
        """DEL every attachment that there is, by a plain call."""
        for pod in self.store.pods():
            it = pod.attachment
            env = environment("DEL", CNI_CONTAINERID=it.container_id, CNI_IFNAME=it.ifname, CNI_PATH=self.path)
            reply = handle(Request(env, config(name=it.network)), self.node)
            assert (reply.exit_code, reply.stdout) == (0, b"")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Make a world in which every descriptor is a namespace, and all pods are as ADD left them."""
    monkeypatch.setattr(netlink, "is_netns", lambda _fd: True)
    monkeypatch.setattr(netlink, "same_netns", lambda _fd: False)
    monkeypatch.setattr(node, "netns_id", lambda _fd: NETNS)
    monkeypatch.setattr(check, "look", lambda _pod, _netns: Found(NETNS, None, None))
    logging.disable()  # pytest would keep every line
    it = World(tmp_path)
    yield it
    it.store.close()
    logging.disable(logging.NOTSET)


@pytest.mark.timeout(SECONDS)
def test_mutated_requests(world: World) -> None:
    """Each of very many mutated requests has one valid answer, and in the end neither rows, files nor memory remain."""
    mutator, rng = Mutator(SEED, path=world.path), random.Random(SEED)
    gc.collect()  # what earlier tests left open would be closed meanwhile
    before, warm = open_descriptors(), 0
    with open(os.devnull, "rb") as netns:  # noqa: PTH123
        for number in range(NUMBER):
            if number == NUMBER // 4:
                warm = resident()
            if number % 10_000 == 0:  # or the ranges were full one day, and every ADD refused
                world.delete_all()
            request = mutator.request(number)
            frame = wire.encode(request)
            if rng.random() < 0.05:
                frame = mutate_bytes(rng, frame)
            with suppress(WireError):
                decoded = wire.decode(frame)
                descriptor = netns.fileno() if rng.random() < 0.95 else None
                world.serve(Request(decoded.env, decoded.stdin, descriptor, 0 if descriptor else decoded.netns_errno))
    settled = Counter(pod.phase for pod in world.store.pods())
    assert settled.keys() <= {Phase.ACTIVE, Phase.RELEASING}, settled
    assert len(world.kernel.devices) == settled[Phase.ACTIVE]
    world.delete_all()
    assert (world.store.pods(), world.kernel.devices) == ([], set())
    assert open_descriptors() <= before  # fewer, if another test's were closed only now
    assert resident() - warm < GROWTH
    assert_worth(world.answers)


def test_netns_that_is_no_text(world: World) -> None:
    """ADD refuses a namespace's path that is not UTF-8, for neither store nor result can hold it; DEL does not mind."""
    for command, code in (("ADD", 1), ("DEL", 0)):
        env = environment(command, CNI_NETNS=os.fsdecode(b"/run/netns/\xff"), CNI_PATH=world.path)
        reply = handle(Request(env, config(), 0), world.node)
        assert reply.exit_code == code
        assert (b"CNI_NETNS" in reply.stdout) is bool(code)


@pytest.mark.parametrize("command", ["ADD", "DEL", "STATUS"])
def test_plugin_with_a_name_too_long(world: World, command: str) -> None:
    """An IPAM plugin whose name no file can have (NAME_MAX, 255 bytes) is one that is not there."""
    env = environment(command, CNI_PATH=world.path)
    reply = handle(Request(env, config(ipam={"type": "x" * 256}), 0), world.node)
    assert_valid(Request(env, b""), reply)
    assert b"failed to find plugin" in reply.stdout


def test_announced_bytes_cost_nothing() -> None:
    """A request that announces much and sends little takes memory for little."""
    here, there = socket.socketpair()
    with here, there:
        there.sendall(struct.pack("=4sIIi", wire.MAGIC, 0, wire.STDIN_LIMIT, 0))
        there.close()
        tracemalloc.start()
        try:
            with pytest.raises(WireError, match="ended 16777216 bytes too early"):
                wire.receive(here, 30)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


def assert_worth(answers: Counter[tuple[str, int]]) -> None:
    """Assert that the mutations reached all of the code: each command succeeded often, and was refused often."""
    print(dict(answers))
    for command in ("ADD", "DEL", "GC", "STATUS"):
        assert answers[command, 0] > NUMBER // 200, answers
        assert answers[command, 1] > NUMBER // 200, answers

"""Network namespaces for tests: made on the spot, held by a file descriptor, gone when that is closed."""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agent.netlink.netns import CLONE_NEWNET, OWN_NETNS, in_netns

LIBC = ctypes.CDLL(None, use_errno=True)
PATIENCE = 30.0  # seconds


@contextmanager
def fresh_netns() -> Iterator[int]:
    """Move the calling thread into a new namespace for the duration; yield its file descriptor."""
    before = os.open(OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)
    _enter_new()
    inside = os.open(OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        run("ip link set lo up")
        yield inside
    finally:
        if LIBC.setns(before, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns back from the test's namespace")
        os.close(before)
        os.close(inside)


@contextmanager
def two_host_ends() -> Iterator[tuple[int, int]]:
    """Make a namespace with two host ends, plone and pltwo, up, for the calling thread; yield their indexes."""
    with fresh_netns():
        for name in ("plone", "pltwo"):
            run(f"ip link add {name} type veth peer name {name}peer")
            run(f"ip link set {name} up alias podlane:{name}")
            run(f"ip link set {name}peer up")
        yield socket.if_nametoindex("plone"), socket.if_nametoindex("pltwo")


def new_netns() -> int:
    """Return the file descriptor of a new namespace, its loopback up as a runtime leaves it. The caller closes it."""
    here = os.open(OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)

    def make() -> int:
        _enter_new()
        run("ip link set lo up")
        return os.open(OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)

    try:
        return in_netns(here, make)
    finally:
        os.close(here)


def run(command: str, *, netns: int | None = None) -> str:
    """Run a command (words separated by blanks) in a namespace, by default the caller's; return its output."""

    def call() -> str:
        return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout

    return in_netns(netns, call) if netns is not None else call()


def ip(command: str, *, netns: int | None = None) -> list[dict[str, Any]]:
    """Return what `ip -json -details COMMAND` shows, without the empty objects that it prints for what it omits."""
    shown = run(f"ip -json -details {command}", netns=netns)
    return [item for item in json.loads(shown or "[]") if item]


def sysctl(name: str, *, netns: int) -> str:
    """Return a kernel setting (path below /proc/sys) of a namespace."""
    return in_netns(netns, lambda: Path("/proc/sys", name).read_text().strip())


def answers(address: object, *, netns: int | None = None) -> bool:
    """Say whether an address answers a ping at the first attempt."""
    try:
        run(f"ping -n -c 1 -W 5 {address}", netns=netns)
    except subprocess.CalledProcessError:
        return False
    return True


def own(*addresses: str) -> None:
    """Give the caller's namespace addresses, and wait until it takes packets to them.

    The kernel makes an IPv6 address's local route in a work queue: until then it drops what comes.
    """
    for address in addresses:
        run(f"ip address add {address} dev lo")
    routes = [f"ip -{6 if ':' in address else 4} route show table local {address}" for address in addresses]
    _wait(lambda: all(run(route) for route in routes), f"routes to {', '.join(addresses)}")


def wait_up(*devices: str, netns: int | None = None) -> None:
    """Wait until devices send: the kernel starts a veth's queue in a work queue, after the other end has come up."""

    def are_up() -> bool:
        states = {link["ifname"]: link["operstate"] for link in ip("link show", netns=netns)}
        return all(states[device] == "UP" for device in devices)

    _wait(are_up, f"{', '.join(devices)} to be up")


def _wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.005)


def _enter_new() -> None:
    if LIBC.unshare(CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare a network namespace")

"""Private places for tests: a bpf filesystem, a network namespace, and veth pairs in it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_network
from pathlib import Path

from agent.datapath.cache import compiled
from agent.datapath.object import Object
from agent.state import Address, Prefix

ROOT = Path(__file__).resolve().parent.parent
_CACHE = ROOT / "build" / "test-cache"
_CLONE_NEWNET = 0x40000000


def prefix(text: str | Address) -> Prefix:
    """Return what `ip_network` makes of it, as tables have it."""
    return Prefix.of(ip_network(text))


@contextmanager
def bpffs(path: Path) -> Iterator[Path]:
    """Mount a bpf filesystem of our own at `path`; all that was pinned there goes with it."""
    path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


@contextmanager
def private_network() -> Iterator[None]:
    """Move the calling thread into a new network namespace, which ends, with its devices, after the block.

    IPv6 is off there, so that no packet is sent but the test's own.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open("rb") as home:
        if libc.unshare(_CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        try:
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
            yield
        finally:
            if libc.setns(home.fileno(), _CLONE_NEWNET) != 0:
                os._exit(70)  # no test may run on in the wrong namespace


def ip(*arguments: str) -> str:
    """Return the output of ip, run in the current network namespace."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def veth(name: str, peer: str) -> int:
    """Make a veth pair, up; return the first one's index."""
    ip("link", "add", name, "type", "veth", "peer", "name", peer)
    ip("link", "set", name, "up")
    ip("link", "set", peer, "up")
    return socket.if_nametoindex(name)


def datapath_object() -> Object:
    """Compile the real datapath, once for all tests: those that come at the same time wait for the first."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return compiled(ROOT / "bpf", _CACHE, defines={})


def warm_cache(cache: Path) -> None:
    """Fill an agent's cache of compiled programs, as on any node whose agent has run before: it saves a second each."""
    datapath_object()
    cache.mkdir(parents=True)
    for entry in _CACHE.glob("*.object"):
        shutil.copy2(entry, cache)


def birth(pid: int) -> str:
    """Return when a process began, in ticks of the kernel's clock; empty if there is none.

    Numbers are given again soon: by this, a process is told from who has its number after it.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends just now
        return ""
    return stat.rpartition(")")[2].split()[19]  # proc_pid_stat(5): starttime


def open_descriptors() -> int:
    """Return how many descriptors this process holds."""
    return len(list(Path("/proc/self/fd").iterdir()))

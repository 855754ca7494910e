"""Entering and recognising network namespaces, each given as an open file descriptor."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from agent.netlink.channel import kernel_error

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # linux/sched.h
SO_NETNS_COOKIE = 71  # asm-generic/socket.h
NS_GET_NSTYPE = 0xB703  # linux/nsfs.h: _IO(0xb7, 3)
OWN_NETNS = Path("/proc/thread-self/ns/net")
LIBC = ctypes.CDLL(None, use_errno=True)


def in_netns(netns: int, work: Callable[[], T]) -> T:
    """Run `work` in the given namespace, in a thread that lives no longer (0.1 ms).

    A thread of its own, because a thread that fails to come back from a namespace can never be used again.
    Raises KernelError if the namespace cannot be entered, and whatever `work` raises.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            _enter(netns)
            outcome.set_result(work())
        except BaseException as error:  # handed to the caller, which waits for it
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="netns")
    thread.start()
    thread.join()
    return outcome.result()


def is_netns(fd: int) -> bool:
    """Say whether an open file is a network namespace."""
    try:
        return fcntl.ioctl(fd, NS_GET_NSTYPE) == CLONE_NEWNET
    except OSError:
        return False


def netns_cookie(fd: int) -> int:
    """Return the number that the kernel gave an open network namespace, and gives no other until the next boot.

    Its inode number, in contrast, is given again as soon as it is gone. Linux 5.14; 0 before. Raises KernelError.
    """
    return in_netns(fd, own_netns_cookie)


def own_netns_cookie() -> int:
    """Return the same of the one that the calling thread lives in."""
    with socket.socket(socket.AF_UNIX) as inhabitant:
        try:
            return int.from_bytes(inhabitant.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)
        except OSError:
            return 0


def same_netns(fd: int) -> bool:
    """Say whether an open network namespace is the one that the calling thread lives in."""
    return os.path.samestat(os.fstat(fd), OWN_NETNS.stat())


def _enter(netns: int) -> None:
    # os.setns() came with Python 3.12.
    if LIBC.setns(netns, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        error = OSError(code, os.strerror(code))
        raise kernel_error("enter the pod's network namespace", error)

"""Kernel settings under /proc/sys, of the calling thread's network namespace."""

from __future__ import annotations

import os

from agent.netlink.channel import kernel_error


def ensure(name: str, value: str) -> None:
    """Set a sysctl (path below /proc/sys) unless it has that value already. Raises KernelError.

    Read first: a write may have to wait for the lock that all of rtnetlink shares, a read never does.
    """
    path = f"/proc/sys/{name}"
    try:
        with open(path, "rb", buffering=0) as setting:  # noqa: PTH123 - see ipv6_present
            if setting.read(64).strip() == value.encode():
                return
        with open(path, "wb", buffering=0) as setting:  # noqa: PTH123
            setting.write(value.encode())
    except OSError as error:
        raise kernel_error(f"set sysctl {name} to {value}", error) from error


def ipv6_present() -> bool:
    """Say whether the kernel knows IPv6 at all (it may be booted with ipv6.disable=1)."""
    return os.path.exists("/proc/sys/net/ipv6")  # noqa: PTH110 - for every pod, and pathlib costs twice as much

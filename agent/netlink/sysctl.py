"""Kernel settings under /proc/sys, of the calling thread's network namespace."""

from __future__ import annotations

import os
from pathlib import Path

from agent.netlink.channel import kernel_error
from agent.state import KernelError

RESERVED_PORTS = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


def ensure(name: str, value: str) -> None:
    """Set a sysctl (path below /proc/sys) unless it has that value already. Raises KernelError.

    Read first: a write may have to wait for the lock that all of rtnetlink shares, a read never does.
    """
    if has(name, value):
        return
    try:
        with open(f"/proc/sys/{name}", "wb", buffering=0) as setting:  # noqa: PTH123 - see ipv6_present
            setting.write(value.encode())
    except OSError as error:
        raise kernel_error(f"set sysctl {name} to {value}", error) from error


def has(name: str, value: str) -> bool:
    """Say whether a sysctl (path below /proc/sys) has that value. Raises KernelError."""
    try:
        with open(f"/proc/sys/{name}", "rb", buffering=0) as setting:  # noqa: PTH123 - see ipv6_present
            return setting.read(64).strip() == value.encode()
    except OSError as error:
        raise kernel_error(f"read sysctl {name}", error) from error


def keep_router_advertisements() -> None:
    """Let devices that learn routes from router advertisements go on doing so on a node that forwards.

    Otherwise the kernel forgets their default routes as soon as forwarding is switched on
    (Documentation/networking/ip-sysctl.rst, accept_ra: 1 means "unless forwarding"). Raises KernelError.
    """
    try:
        for setting in Path("/proc/sys/net/ipv6/conf").glob("*/accept_ra"):
            if setting.read_text().strip() == "1":
                setting.write_text("2")
    except OSError as error:
        raise kernel_error("keep router advertisements", error) from error


def ipv6_present() -> bool:
    """Say whether the kernel knows IPv6 at all (it may be booted with ipv6.disable=1)."""
    return os.path.exists("/proc/sys/net/ipv6")  # noqa: PTH110 - for every pod, and pathlib costs twice as much


def reserve_ports(first: int, last: int) -> bool:
    """Keep the kernel from choosing these ports for connections of the node's own; what others reserved stays so.

    Returns whether they were not reserved before. Raises KernelError.
    """
    try:
        before = RESERVED_PORTS.read_text()
        wanted = with_range(before, first, last)
        if wanted == before.strip():
            return False
        RESERVED_PORTS.write_text(wanted)
    except OSError as error:
        raise kernel_error(f"reserve the ports {first}-{last}", error) from error
    except ValueError as error:
        raise KernelError(f"reserve the ports {first}-{last}: {RESERVED_PORTS} is not a list of ports") from error
    return True


def with_range(ports: str, first: int, last: int) -> str:
    """Return a list of ports as the kernel writes it ("8080,30000-32767") with one more range in it.

    Raises ValueError if it is no such list.
    """
    spans = [span.partition("-") for span in ports.strip().split(",") if span]
    known = sorted([(int(low), int(high or low)) for low, _, high in spans] + [(first, last)])
    merged = [known[0]]
    for low, high in known[1:]:
        if low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return ",".join(f"{low}-{high}" if low < high else str(low) for low, high in merged)

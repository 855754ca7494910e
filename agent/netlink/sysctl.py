"""Kernel settings under /proc/sys, of the calling thread's network namespace.

A container's own /proc/sys is read-only, so its environment may name another place (`agent.files.HOST`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from agent.files import HOST
from agent.netlink.channel import kernel_error
from agent.state import KernelError

ROOT = HOST / "proc/sys"
_RESERVED_PORTS = "net/ipv4/ip_local_reserved_ports"


class Change(NamedTuple):
    """What a setting was before podlane changed it, and what podlane made of it."""

    before: str
    after: str


Changes = Mapping[str, Change]
"""By the setting's path below /proc/sys."""


def ensure(name: str, value: str) -> dict[str, Change]:
    """Set a sysctl (path below /proc/sys) unless it has that value already; return the change. Raises KernelError.

    Read first: a write may have to wait for the lock that all of rtnetlink shares, a read never does.
    """
    before = _read(name)
    if before == value:
        return {}
    try:
        with open(f"{ROOT}/{name}", "wb", buffering=0) as setting:  # noqa: PTH123 - see ipv6_present
            setting.write(value.encode())
    except OSError as error:
        raise kernel_error(f"set sysctl {name} to {value}", error) from error
    return {name: Change(before, value)}


def has(name: str, value: str) -> bool:
    """Say whether a sysctl (path below /proc/sys) has that value. Raises KernelError."""
    return _read(name) == value


def _read(name: str) -> str:
    try:
        with open(f"{ROOT}/{name}", "rb", buffering=0) as setting:  # noqa: PTH123 - see ipv6_present
            return setting.read(64).decode().strip()
    except OSError as error:
        raise kernel_error(f"read sysctl {name}", error) from error


def restore(changes: Changes) -> list[str]:
    """Take changes back, the last one first, where nobody has changed the same since; return what was changed.

    Raises KernelError.
    """
    restored = []
    for name, change in reversed(list(changes.items())):
        path = ROOT / name
        try:
            now = path.read_text().strip()
            before = change.before if now == change.after else now
            if name == _RESERVED_PORTS:
                before = _without(now, change)
            if now != before:
                path.write_text(f"{before}\n")
                restored.append(name)
        except FileNotFoundError:
            continue  # it went with its device
        except OSError as error:
            raise kernel_error(f"set sysctl {name} to {change.before!r}", error) from error
    return restored


def keep_router_advertisements() -> dict[str, Change]:
    """Let devices that learn routes from router advertisements go on doing so on a node that forwards.

    Otherwise the kernel forgets their default routes as soon as forwarding is switched on
    (Documentation/networking/ip-sysctl.rst, accept_ra: 1 means "unless forwarding"). Returns the changes. Raises
    KernelError.
    """
    changes = {}
    try:
        for setting in (ROOT / "net/ipv6/conf").glob("*/accept_ra"):
            if setting.read_text().strip() == "1":
                setting.write_text("2")
                changes[str(setting.relative_to(ROOT))] = Change("1", "2")
    except OSError as error:
        raise kernel_error("keep router advertisements", error) from error
    return changes


def ipv6_present() -> bool:
    """Say whether the kernel knows IPv6 at all (it may be booted with ipv6.disable=1)."""
    return os.path.exists(f"{ROOT}/net/ipv6")  # noqa: PTH110 - for every pod, and pathlib costs twice as much


def reserve_ports(first: int, last: int) -> dict[str, Change]:
    """Keep the kernel from choosing these ports for connections of the node's own; what others reserved stays so.

    Returns the change, if they were not reserved before. Raises KernelError.
    """
    path = ROOT / _RESERVED_PORTS
    try:
        before = path.read_text().strip()
        wanted = with_range(before, first, last)
        if wanted == before:
            return {}
        path.write_text(wanted)
    except OSError as error:
        raise kernel_error(f"reserve the ports {first}-{last}", error) from error
    except ValueError as error:
        raise KernelError(f"reserve the ports {first}-{last}: {path} is not a list of ports") from error
    return {_RESERVED_PORTS: Change(before, wanted)}


def with_range(ports: str, first: int, last: int) -> str:
    """Return a list of ports as the kernel writes it ("8080,30000-32767") with one more range in it.

    Raises ValueError if it is no such list.
    """
    return _written([*_spans(ports), (first, last)])


def _without(ports: str, change: Change) -> str:
    """Return a list of ports without those that a change has added."""
    added = _ports(change.after) - _ports(change.before)
    return _written([(port, port) for port in _ports(ports) - added])


def _ports(ports: str) -> set[int]:
    return {port for low, high in _spans(ports) for port in range(low, high + 1)}


def _spans(ports: str) -> list[tuple[int, int]]:
    parts = [span.partition("-") for span in ports.strip().split(",") if span]
    return [(int(low), int(high or low)) for low, _, high in parts]


def _written(spans: Iterable[tuple[int, int]]) -> str:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return ",".join(f"{low}-{high}" if low < high else str(low) for low, high in merged)

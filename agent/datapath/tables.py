"""Hooks by tcx links, as the agent's loop sees them, and the datapath's counters."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..state import Attached, Hook, KernelError
from . import libbpf, links
from .entries import EndpointTable, failures
from .loader import Datapath

__all__ = ["Count", "EndpointTable", "Masqueraded", "TcxHooks", "masqueraded", "outcomes", "tcx_supported"]

_ATTACH_TYPES = {"ingress": libbpf.TCX_INGRESS, "egress": libbpf.TCX_EGRESS}

# `r0 = -1; exit`: the least program there is. -1 is TC_ACT_UNSPEC, "carry on".
_PASS = struct.pack("=BBhi", 0xB7, 0, 0, -1) + struct.pack("=BBhi", 0x95, 0, 0, 0)

# Interface indexes grow from 1; no device has ever come this far.
_NO_DEVICE = 0x7FFFFFFF


class Count(NamedTuple):
    """How often an outcome was counted, and the bytes of those packets."""

    packets: int
    bytes: int


def outcomes(datapath: Datapath) -> dict[str, Count]:
    """Return the outcome counters since the map was made, by the names that they have in the C."""
    totals = datapath.maps["outcomes"].sum(0)
    return {name: Count(**counter) for name, counter in totals.items()}


class Masqueraded(NamedTuple):
    """What masquerading has done since the map was made. `flows` is by protocol and direction, as they are in the C."""

    flows: Mapping[tuple[str, str], Count]
    allocations: int
    retries: int


def masqueraded(datapath: Datapath) -> Masqueraded:
    """Return the counters of masqueraded packets and of ports."""
    totals = datapath.maps["masqueraded"].sum(0)
    flows = {}
    for name, total in totals.items():
        protocol, _, direction = name.partition("_")
        if direction:
            flows[protocol, direction] = Count(**total)
    return Masqueraded(flows, totals["allocations"], totals["retries"])


def tcx_supported() -> bool:
    """Return whether the kernel has tcx links (Linux 6.6): older ones do not know the attach type."""
    with libbpf.closing(libbpf.program_load("podlane_probe", _PASS)) as program:
        try:
            os.close(libbpf.link_create(program, _NO_DEVICE, libbpf.TCX_INGRESS, "nowhere"))
        except libbpf.BpfError as error:
            if error.errno in (errno.ENODEV, errno.EINVAL):
                return error.errno == errno.ENODEV
            raise
    return True


class TcxHooks:
    """Programs at devices' hooks, by links pinned as `<pin dir>/links/<device>:<direction>`.

    The pin is what keeps the program attached, and what tells a restarted agent that the link is its own.
    """

    def __init__(self, datapath: Datapath, pin_dir: Path) -> None:
        self._programs = datapath.programs
        self._names = {identifier: name for name, identifier in datapath.program_ids.items()}
        self._links = pin_dir / "links"

    def read(self) -> dict[Hook, Attached]:
        """Return what runs where: program "stale:<id>" if none of ours, ifindex 0 if the device is gone."""
        attached: dict[Hook, Attached] = {}
        for pin in links.names(self._links):
            path = f"{self._links}/{pin}"
            link = libbpf.open_pin(path)
            if link is not None:
                with libbpf.closing(link):
                    info = libbpf.link_info(link, path)
                program = self._names.get(info.program_id, f"stale:{info.program_id}")
                attached[_hook(pin)] = Attached(info.target, program)
        return attached

    def upsert(self, items: Mapping[Hook, Attached]) -> dict[Hook, KernelError]:
        """Attach programs; one that replaces another does so between two packets. Return the failures."""
        return failures(items, lambda hook: self._attach(hook, items[hook]))

    def delete(self, keys: Iterable[Hook]) -> dict[Hook, KernelError]:
        """Detach programs; return the failures."""
        return failures(keys, lambda hook: links.detach(self._pin(hook)))

    def _attach(self, hook: Hook, wanted: Attached) -> None:
        what = f"{wanted.program} at {hook.direction} of {hook.device}"
        program = self._programs.get(wanted.program)
        if program is None:
            raise KernelError(f"attach {what}: the datapath has no such program")
        pin = self._pin(hook)
        link = libbpf.open_pin(pin)
        if link is not None:
            with libbpf.closing(link):
                if libbpf.link_info(link, str(pin)).target == wanted.ifindex:
                    libbpf.link_update(link, program, what)
                    return
        links.detach(pin)
        libbpf.make_folder(self._links)
        try:
            created = libbpf.link_create(program, wanted.ifindex, _ATTACH_TYPES[hook.direction], what)
        except libbpf.BpfError as error:
            if error.errno == errno.EEXIST and self._adopt(hook, wanted):
                return
            raise
        with libbpf.closing(created):
            libbpf.pin(created, pin)

    def _adopt(self, hook: Hook, wanted: Attached) -> bool:
        """Give a renamed device's link its new name; return whether there was one.

        The kernel attaches no program twice at one hook, so the new link could only follow on the old one's end.
        """
        for old, attached in self.read().items():
            if (old.direction, attached) == (hook.direction, wanted):
                try:
                    self._pin(old).rename(self._pin(hook))
                except OSError as error:
                    raise KernelError(f"rename the pinned link of {old.device}: {error}") from error
                return True
        return False

    def _pin(self, hook: Hook) -> Path:
        # bpffs reserves dots, which device names may have ("eth0.100"); what they cannot have are "%" and ":".
        return self._links / f"{hook.device.replace('.', '%')}:{hook.direction}"


def _hook(pin_name: str) -> Hook:
    device, _, direction = pin_name.rpartition(":")
    return Hook(device.replace("%", "."), "ingress" if direction == "ingress" else "egress")

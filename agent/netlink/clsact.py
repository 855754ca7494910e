"""Programs at devices' hooks on kernels without tcx (before 6.6): clsact and direct-action filters."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable, Iterator, Mapping

from pyroute2.netlink.rtnl import (
    RTM_DELQDISC,
    RTM_DELTFILTER,
    RTM_GETQDISC,
    RTM_GETTFILTER,
    RTM_NEWQDISC,
    RTM_NEWTFILTER,
    TC_H_CLSACT,
)
from pyroute2.netlink.rtnl.tcmsg import tcmsg

from agent.netlink.channel import Request, attributes, dump, errno_of, execute, perform, request
from agent.netlink.devices import devices, index, name_of
from agent.netlink.encode import Attributes, message
from agent.netlink.rtnl import (
    ADD,
    FILTER,
    PROTOCOL,
    PUT,
    TCA_BPF_FD,
    TCA_BPF_FLAGS,
    TCA_BPF_ID,
    TCA_BPF_NAME,
    TCA_KIND,
    TCA_OPTIONS,
    text,
    u32,
)
from agent.state import Attached, Direction, Hook, KernelError

# linux/pkt_sched.h: TC_H_MIN_INGRESS and TC_H_MIN_EGRESS of TC_H_CLSACT
PARENT: Mapping[Direction, int] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
CLSACT_HANDLE = 0xFFFF0000
INFO = PROTOCOL << 16 | socket.htons(3)  # our filter's priority, and ETH_P_ALL
HANDLE = PROTOCOL  # its number at that priority
OURS = (HANDLE, INFO)
FILTER_PREFIX = "podlane_"
TCA_BPF_FLAG_ACT_DIRECT = 1

NO_FILTER = (errno.ENOENT, errno.ENODEV, errno.EINVAL)  # EINVAL: the device has no clsact qdisc


class ClsactHooks:
    """`Table[Hook, Attached]`: which of podlane's programs runs at which hook, of its own devices and of uplinks.

    A filter is podlane's by its place and its name. A clsact qdisc is where this very object made it: elsewhere it
    stays, though empty, since somebody else may count on it. On podlane's own devices it stays as well, and goes with
    the device: to remove one loses packets (agent/hooks.py).
    """

    def __init__(self, programs: Mapping[str, int], ids: Mapping[str, int]) -> None:
        """Take the loaded programs: by name, their file descriptors and their kernel ids."""
        self._programs = programs
        self._names = {number: name for name, number in ids.items()}
        self._made: set[int] = set()  # existing devices whose qdisc we have made
        # Where filters of podlane's may be, by device and direction: all that we attached, and what the first look
        # found. To look everywhere every time would take 14 ms on a node of 110 pods, most of them without filters.
        self._held: set[tuple[int, Direction]] | None = None

    def read(self) -> dict[Hook, Attached]:
        """Return what podlane's filters run, "stale:ID" if it is not a loaded program. Raises KernelError."""
        having = _with_clsact()
        self._made.intersection_update(having.values())
        found: dict[Hook, Attached] = {}
        for name, number in having.items():
            for at in PARENT:
                hook = Hook(name, at)
                program = _running(hook, number) if self._held is None or (number, at) in self._held else None
                if program is not None:
                    found[hook] = Attached(number, self._names.get(program, f"stale:{program}"))
        self._held = {(attached.ifindex, hook.direction) for hook, attached in found.items()}
        return found

    def upsert(self, items: Mapping[Hook, Attached]) -> dict[Hook, KernelError]:
        """Attach or replace the programs of the given hooks, each atomically; return the failures."""
        failures: dict[Hook, KernelError] = {}
        for hook, wanted in items.items():
            try:
                self._attach(hook, wanted)
            except KernelError as error:
                failures[hook] = error
        return failures

    def delete(self, keys: Iterable[Hook]) -> dict[Hook, KernelError]:
        """Detach podlane's programs from the given hooks, and remove our own clsact qdiscs from foreign devices."""
        failures: dict[Hook, KernelError] = {}
        for hook in keys:
            number = index(hook.device)
            if number is None:
                continue
            try:
                perform([_delete_filter(hook, number)])
                if number in self._made and hook.device not in devices():
                    _delete_unused_qdisc(hook.device, number)
            except KernelError as error:
                failures[hook] = error
        return failures

    def sweep(self) -> list[str]:
        """Detach all of podlane's programs, and remove qdiscs that this leaves empty. Raises KernelError.

        Returns the devices. To be called with none of the above, by an object that knows no programs.
        """
        swept = {}
        for hook, attached in self.read().items():
            perform([_delete_filter(hook, attached.ifindex)])
            swept[hook.device] = attached.ifindex
        for device, number in swept.items():
            _delete_unused_qdisc(device, number)
        return list(swept)

    def _attach(self, hook: Hook, wanted: Attached) -> None:
        what = f"attach {wanted.program} at {hook.direction} of {hook.device}"
        if wanted.program not in self._programs:
            raise KernelError(f"{what}: no such program is loaded")
        options: Attributes = [
            (TCA_BPF_FD, self._programs[wanted.program]),
            (TCA_BPF_NAME, FILTER_PREFIX + wanted.program),
            (TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT),
        ]
        # tc qdisc add dev DEVICE clsact
        # tc filter replace dev DEVICE ingress prio 112 handle 112 bpf direct-action pinned PROGRAM
        filter_: Attributes = [(TCA_KIND, "bpf"), (TCA_OPTIONS, options)]
        if self._held is not None:
            self._held.add((wanted.ifindex, hook.direction))
        requests = [
            message(what, RTM_NEWQDISC, ADD, _qdisc(wanted.ifindex), [(TCA_KIND, "clsact")]),
            message(what, RTM_NEWTFILTER, PUT, _place(hook, wanted.ifindex), filter_),
        ]
        made, attached = execute(requests)
        if made is None:
            self._made.add(wanted.ifindex)
        elif errno_of(made) != errno.EEXIST:
            raise made
        if attached:
            raise attached


def _with_clsact() -> dict[str, int]:
    """Return the devices that have a clsact qdisc, name to index."""
    # tc qdisc show
    found = {}
    for answer in dump(request("list qdiscs", tcmsg, RTM_GETQDISC)):
        _, number, _, parent, _ = FILTER.unpack_from(answer.body)
        if answer.type == RTM_NEWQDISC and parent == TC_H_CLSACT:
            kind = attributes(answer.body, FILTER.size).get(TCA_KIND, b"")
            if text(kind) == "clsact" and (name := name_of(number)):
                found[name] = number
    return found


def _running(hook: Hook, number: int) -> int | None:
    """Return the id of the program that our filter runs at a hook, or None without such a filter."""
    for place, options in _filters(hook, number):
        if place == OURS and text(options.get(TCA_BPF_NAME, b"")).startswith(FILTER_PREFIX):
            return u32(options[TCA_BPF_ID])
    return None


def _filters(hook: Hook, number: int) -> Iterator[tuple[tuple[int, int], dict[int, bytes]]]:
    """Yield the place (handle, priority and protocol) and the options of the filters at a hook."""
    # tc filter show dev DEVICE ingress
    what = f"list filters at {hook.direction} of {hook.device}"
    fields = {"index": number, "parent": PARENT[hook.direction]}
    for answer in dump(request(what, tcmsg, RTM_GETTFILTER, fields=fields, tolerated=NO_FILTER)):
        _, _, handle, _, info = FILTER.unpack_from(answer.body)
        if answer.type == RTM_NEWTFILTER and handle:  # 0: a list of filters, not one of them
            options = attributes(answer.body, FILTER.size).get(TCA_OPTIONS, b"")
            yield (handle, info), attributes(options, 0)


def _delete_filter(hook: Hook, number: int) -> Request:
    # tc filter delete dev DEVICE ingress prio 112 handle 112 bpf
    what = f"detach from {hook.direction} of {hook.device}"
    return message(what, RTM_DELTFILTER, 0, _place(hook, number), [(TCA_KIND, "bpf")], tolerated=NO_FILTER)


def _delete_unused_qdisc(device: str, number: int) -> None:
    if any(True for direction in PARENT for _ in _filters(Hook(device, direction), number)):
        return
    # tc qdisc delete dev DEVICE clsact
    what = f"remove clsact from {device}"
    perform([message(what, RTM_DELQDISC, 0, _qdisc(number), [(TCA_KIND, "clsact")], tolerated=NO_FILTER)])


def _place(hook: Hook, number: int) -> bytes:
    return FILTER.pack(0, number, HANDLE, PARENT[hook.direction], INFO)


def _qdisc(number: int) -> bytes:
    return FILTER.pack(0, number, CLSACT_HANDLE, TC_H_CLSACT, 0)

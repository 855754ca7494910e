"""Runs the unmodified agent, and does something just before each step of one call.

A step is a change that outlives the process: an SQL statement, a netlink message, a BPF call, a change of a file, the
start of another program, and in the end the reply. Whatever happens between two other instructions finds the same world
as if it happened at the next step. Steps are counted, in all threads, from the moment the call arrives.

Calls are named by command and container. Two that are none: SETTLE, the agent's own call that moves programs to where
they shall stay, of whichever container; and FOLLOW, what it does from the report of the cluster on by which a Node of
that name comes, or, with a minus before it, goes.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType

from agent import pods
from agent.__main__ import main as agent_main
from agent.datapath import libbpf
from agent.datapath.maps import Map
from agent.following import Following
from agent.hooks import StagedHooks
from agent.netlink.channel import ask, dump_by
from agent.store import Store
from cni.commands import handle
from cni.wire import reply

# C functions by qualified name. The profiler sees no calls through ctypes, so the BPF calls that change something go by
# the Python functions that make them.
_OUTSIDE = {
    *("Connection.execute", "socket.send", "fork_exec"),
    *("FileIO.write", "BufferedWriter.flush", "rename", "unlink", "mkdir"),
}
_BPF_CALLS = (
    *(libbpf.pin, libbpf.link_create, libbpf.link_update, libbpf.link_detach),
    *(Map.update_bytes, Map.delete_bytes),
)
_ARRIVAL, _REPLY, _SETTLE = handle.__code__, reply.__code__, StagedHooks.settle.__code__
_REPORT = Following._take.__code__
_READS = {
    function.__code__
    for function in (ask, dump_by, Store.pods, Store.get, Store.usage, Store.exhausted, pods.find, pods.find_all)
}
_TRANSACTION = Store._transaction.__wrapped__.__code__  # type: ignore[attr-defined]  # what contextmanager has wrapped
# Threads that change nothing. Python 3.11 crashes, collecting garbage, if the first one is profiled as it reads YAML.
_BYSTANDERS = {"herald", "nodes-watch"}
_STEPS = {_REPLY, *(function.__code__ for function in _BPF_CALLS)}


class Steps:
    """A profile function (see sys.setprofile) that counts steps, and tells of each before it is done."""

    def __init__(self, command: str, container: str, tell: Callable[[int, str], None]) -> None:
        """`tell` gets the step's number, from 1 on, and what it is."""
        self._call = (command, container)
        self._tell = tell
        self._numbers = itertools.count(1)
        self._armed = False
        self._is_due = False  # the next report that is as it should be is the first one

    def __call__(self, frame: FrameType, event: str, what: object) -> None:
        """Look at one call or return."""
        if event == "call":
            self._python_call(frame)
        elif event == "return" and frame.f_code is _SETTLE and self._call[0] == "SETTLE":
            self._armed = False
        elif event == "c_call" and self._armed:
            name = getattr(what, "__qualname__", "")
            if name in _OUTSIDE and _on_whose_behalf(frame) not in _READS:
                self._tell(next(self._numbers), f"{name} in {frame.f_code.co_qualname}")

    def _python_call(self, frame: FrameType) -> None:
        if frame.f_code in (_ARRIVAL, _SETTLE, _REPORT) and not self._armed:
            self._armed = self._is_the_call(frame)
        elif self._armed and frame.f_code in _STEPS:
            self._tell(next(self._numbers), frame.f_code.co_qualname)
            if frame.f_code is _REPLY:
                self._armed = False
                self._numbers = itertools.count(1)

    def _is_the_call(self, frame: FrameType) -> bool:
        command = self._call[0]
        if frame.f_code is _SETTLE:
            return command == "SETTLE"
        if frame.f_code is _REPORT:
            return command == "FOLLOW" and self._is_the_report({each.name for each in frame.f_locals["nodes"]})
        environment = frame.f_locals["request"].env
        return self._call == (environment.get("CNI_COMMAND"), environment.get("CNI_CONTAINERID"))

    def _is_the_report(self, names: set[str]) -> bool:
        name = self._call[1]
        is_so = (name.removeprefix("-") in names) != name.startswith("-")
        is_first = is_so and self._is_due
        self._is_due = not is_so
        return is_first

    @staticmethod
    def log(number: int, what: str) -> None:
        """Write to the log which step it is; see `labels`."""
        os.write(sys.stderr.fileno(), f"step={number} is {what!r}\n".encode())

    def live(self) -> None:
        """Be the agent."""
        threading.setprofile(self._begin)
        if self._call[0] != "FOLLOW":  # of which the main thread does nothing, and its start takes half as long without
            sys.setprofile(self)
        agent_main()

    def _begin(self, _frame: FrameType, _event: str, _what: object) -> None:
        """See the first call of a thread."""
        sys.setprofile(None if threading.current_thread().name in _BYSTANDERS else self)


def _on_whose_behalf(frame: FrameType) -> CodeType | None:
    """Return the function that makes a call: of a transaction's beginning and end, whoever has the transaction.

    The loop looks at the store whenever it likes, so that steps were numbered differently each time if that counted.
    """
    asker: FrameType | None = frame
    if frame.f_code is _TRANSACTION and frame.f_back:  # contextlib
        asker = frame.f_back.f_back
    return asker.f_code if asker else None


def labels(log: str) -> list[str]:
    """Return what the steps are that a log tells of, in order."""
    return re.findall(r"^step=\d+ is '(.*)'$", log, re.MULTILINE)

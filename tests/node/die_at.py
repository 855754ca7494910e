"""Runs the unmodified agent and kills it, by SIGKILL, just before the N-th step of one call.

    python -m tests.node.die_at COMMAND CONTAINER STEP --config FILE

The command may be SETTLE, the agent's own call that moves programs to where they shall stay, of whichever container.

A step is a change that outlives the process: an SQL statement, a netlink message, a BPF call, a change of a file, the
start of another program, and in the end the reply. A kill between two other instructions leaves the same world behind
as the kill at the next step. Steps are counted, in all threads, from the moment the call arrives. A STEP of 0 kills
nobody: the log tells which steps there were.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from types import FrameType

from agent import pods
from agent.__main__ import main as agent_main
from agent.datapath import libbpf
from agent.datapath.maps import Map
from agent.hooks import StagedHooks
from agent.netlink.channel import dump
from agent.store import Store
from cni.commands import handle
from cni.wire import reply

# C functions by qualified name. The profiler sees no calls through ctypes, so the BPF calls that change something go by
# the Python functions that make them.
_OUTSIDE = {"Connection.execute", "socket.send", "FileIO.write", "unlink", "mkdir", "fork_exec"}
_BPF_CALLS = (libbpf.pin, libbpf.link_create, libbpf.link_update, libbpf.link_detach, Map.update, Map.delete)
_ARRIVAL, _REPLY, _SETTLE = handle.__code__, reply.__code__, StagedHooks.settle.__code__
_READS = {function.__code__ for function in (dump, Store.pods, pods.find, pods.find_all)}
_STEPS = {_REPLY, *(function.__code__ for function in _BPF_CALLS)}


class Executioner:
    """A profile function (see sys.setprofile) that counts steps, and kills at the fatal one."""

    def __init__(self, command: str, container: str, fatal: int) -> None:
        self._victim = (command, container)
        self._fatal = fatal
        self._numbers = itertools.count(1)
        self._armed = False

    def __call__(self, frame: FrameType, event: str, what: object) -> None:
        """Look at one call or return."""
        if event == "call":
            self._python_call(frame)
        elif event == "return" and frame.f_code is _SETTLE and self._victim[0] == "SETTLE":
            self._armed = False
        elif event == "c_call" and self._armed:
            name = getattr(what, "__qualname__", "")
            if name in _OUTSIDE and frame.f_code not in _READS:
                self._step(f"{name} in {frame.f_code.co_qualname}")

    def _python_call(self, frame: FrameType) -> None:
        if frame.f_code is _ARRIVAL:
            environment = frame.f_locals["request"].env
            self._armed |= self._victim == (environment.get("CNI_COMMAND"), environment.get("CNI_CONTAINERID"))
        elif frame.f_code is _SETTLE:
            self._armed |= self._victim[0] == "SETTLE"
        elif self._armed and frame.f_code in _STEPS:
            self._step(frame.f_code.co_qualname)
            if frame.f_code is _REPLY:
                self._armed = False

    def _step(self, what: str) -> None:
        number = next(self._numbers)
        if number == self._fatal:
            _say(f"killed at step={number} before {what!r}")
            os.kill(os.getpid(), signal.SIGKILL)
        if not self._fatal:
            _say(f"step={number} is {what!r}")


def _say(text: str) -> None:
    os.write(sys.stderr.fileno(), f"die_at: {text}\n".encode())


def live(command: str, container: str, fatal: int) -> None:
    """Be the agent until that step."""
    executioner = Executioner(command, container, fatal)
    threading.setprofile(executioner)
    sys.setprofile(executioner)
    agent_main()


if __name__ == "__main__":
    doomed, of, before = sys.argv[1:4]
    del sys.argv[1:4]
    live(doomed, of, int(before))

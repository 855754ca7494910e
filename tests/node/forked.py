"""Agents that die soon, or wait at some step: forked from a process that has imported all that they need, for speed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

from agent.netlink.netns import CLONE_NEWNET, LIBC
from tests.node import die_at
from tests.node.machine import ROOT, START_SECONDS, Machine
from tests.node.steps import Steps

_CONTEXT = multiprocessing.get_context("forkserver")


class ForkedAgent:
    """The part of `subprocess.Popen` that a Machine uses."""

    def __init__(self, process: BaseProcess) -> None:
        process.start()
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        """Return the exit status, None while it runs; minus the signal that killed it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit status. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("agent", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        with suppress(ProcessLookupError):  # the process that forked it has seen its end before us
            if self.poll() is None:
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start_doomed(node: Machine, command: str, container: str, step: int, *, wait: bool = True) -> None:
    """Start a node's agent, which dies just before a step of a call (see `die_at`); by default, wait until it is ready.

    Before step 0 nobody dies.
    """
    _start(node, partial(die_at.live, command, container, step))
    if wait:
        node.wait_ready()


class Hold:
    """Where the calls of one container are to wait, between the agent's process and the test's.

    Which step has what number is not the same in all calls: what the loop does by itself meanwhile counts, too. So
    whether a call has come as far as the step that is called `mark` is told apart.
    """

    def __init__(self, mark: str) -> None:
        self._mark = mark
        self._step, self._is_marked = _CONTEXT.Value("i", 0), _CONTEXT.Value("b", 0)
        self._is_held, self._may_go = _CONTEXT.Event(), _CONTEXT.Event()

    def arrange(self, step: int) -> None:
        """Have the next call wait before this step; with 0 it does not, and the log tells which steps there were."""
        self._step.value, self._is_marked.value = step, 0
        self._is_held.clear()
        self._may_go.clear()

    def wait_held(self) -> None:
        """Wait until the call waits."""
        assert self._is_held.wait(START_SECONDS), f"nobody came to step {self._step.value}"

    @property
    def is_marked(self) -> bool:
        """Whether the call that waits has come to the marked step, which it has done or will do next."""
        return bool(self._is_marked.value)

    def let_go(self) -> None:
        """Let it go on."""
        self._may_go.set()

    def pass_by(self, number: int, what: str) -> None:
        """Be the agent that comes to a step."""
        if what == self._mark:
            self._is_marked.value = 1
        if number == self._step.value:
            self._is_held.set()
            self._may_go.wait(START_SECONDS)
        elif not self._step.value:
            Steps.log(number, what)


def start_held(node: Machine, command: str, container: str, mark: str) -> Hold:
    """Start a node's agent, whose calls of this kind can be held at any step, and wait until it is ready."""
    hold = Hold(mark)
    _start(node, partial(_be_held, command, container, hold))
    node.wait_ready()
    return hold


def _be_held(command: str, container: str, hold: Hold) -> None:
    Steps(command, container, hold.pass_by).live()


def _start(node: Machine, live: Callable[[], None]) -> None:
    _CONTEXT.set_forkserver_preload([die_at.__name__])
    arguments = (str(node.netns.path), str(node.log), live, ("--config", str(node.config)))
    node.agent = ForkedAgent(_CONTEXT.Process(target=_live, args=arguments))  # type: ignore[assignment]  # what it uses


def _live(netns: str, log: str, live: Callable[[], None], arguments: Sequence[str]) -> None:
    """Become the agent, in the node's network namespace."""
    with Path(netns).open("rb") as file:
        if LIBC.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(f"cannot enter {netns}")
    with Path(log).open("ab") as file:
        for number in (sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(file.fileno(), number)
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.argv[1:] = arguments
    live()

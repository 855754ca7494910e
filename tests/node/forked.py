"""Agents that die soon, forked from a process that has imported all that they need: most of their time went there."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

from agent.netlink.netns import CLONE_NEWNET, LIBC
from tests.node import die_at
from tests.node.machine import ROOT, Machine


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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([die_at.__name__])
    arguments = (str(node.netns.path), str(node.log), command, container, step, ("--config", str(node.config)))
    node.agent = ForkedAgent(context.Process(target=_live, args=arguments))  # type: ignore[assignment]  # what it uses
    if wait:
        node.wait_ready()


def _live(netns: str, log: str, command: str, container: str, step: int, arguments: Sequence[str]) -> None:
    """Become the agent, in the node's network namespace."""
    with Path(netns).open("rb") as file:
        if LIBC.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(f"cannot enter {netns}")
    with Path(log).open("ab") as file:
        for number in (sys.stdout.fileno(), sys.stderr.fileno()):
            os.dup2(file.fileno(), number)
    os.environ["PYTHONPATH"] = str(ROOT)
    sys.argv[1:] = arguments
    die_at.live(command, container, step)

"""Runs the unmodified agent and kills it, by SIGKILL, just before the N-th step of one call (see `steps`).

    python -m tests.node.die_at COMMAND CONTAINER STEP --config FILE

A STEP of 0 kills nobody: the log tells which steps there were.
"""

from __future__ import annotations

import os
import signal
import sys

from tests.node.steps import Steps


def live(command: str, container: str, fatal: int) -> None:
    """Be the agent until that step."""

    def tell(number: int, what: str) -> None:
        if number == fatal:
            os.write(sys.stderr.fileno(), f"die_at: killed at step={number} before {what!r}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
        if not fatal:
            Steps.log(number, what)

    Steps(command, container, tell).live()


if __name__ == "__main__":
    doomed, of, before = sys.argv[1:4]
    del sys.argv[1:4]
    live(doomed, of, int(before))

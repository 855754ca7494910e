"""Whether the agent's loop still comes round; if it does not, only another agent may help."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
import traceback

log = logging.getLogger(__name__)

_MOST_FRAMES = 8  # the innermost ones say where a thread stands


class Rounds:
    """Notes when a thread has come round. Others ask, without a lock: it may hang while it holds one.

    By CLOCK_MONOTONIC, which stands still while the system is suspended (clock_gettime(2); CLOCK_BOOTTIME does not):
    a node that wakes up has missed nothing.
    """

    def __init__(self, patience_seconds: float) -> None:
        """Miss the thread after `patience_seconds`, which are to be far more than it ever needs."""
        self._patience = patience_seconds
        self._thread = 0
        self._last = math.inf  # not begun
        self._is_told = False

    def note(self) -> float:
        """Note that the calling thread has come round; return by when it shall do so again, even with nothing to do."""
        self._thread, self._last = threading.get_ident(), time.monotonic()
        if self._is_told:
            self._is_told = False
            log.info("the loop comes round again")
        return self._last + self._patience / 10

    def missed(self) -> str:
        """Say that it has not come round for so long; empty if it has, or has not begun yet.

        The first time that it does, it also logs where the thread stands, which nobody could find out afterwards.
        """
        if time.monotonic() - self._last <= self._patience:
            return ""
        if not self._is_told:
            self._is_told = True
            log.error("the loop does not come round where=%r", self._where())
        return f"the loop has not come round for more than {self._patience:g} s"

    def _where(self) -> str:
        frame = sys._current_frames().get(self._thread)
        stack = reversed(traceback.extract_stack(frame)[-_MOST_FRAMES:] if frame else [])
        return " < ".join(f"{each.name} ({each.filename}:{each.lineno})" for each in stack) or "it has ended"

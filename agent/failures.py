"""Failures that may last: told when they are new, and kept for whoever asks."""

from __future__ import annotations

import logging
from collections.abc import Mapping

log = logging.getLogger(__name__)


class Failures:
    """What the kernel refuses at present, of one kind of work. Not thread-safe."""

    def __init__(self) -> None:
        self._now: dict[str, str] = {}

    def update(self, failures: Mapping[str, Exception]) -> None:
        """Take these in place of those before, by object; log what is new, so that one which lasts is logged once."""
        now = {what: str(error) for what, error in failures.items()}
        for what, error in now.items():
            if self._now.get(what) != error:
                log.error("kernel refused what=%r error=%r", what, error)
        self._now = now

    def get(self, what: str) -> str | None:
        """Return the error of an object, if there is one."""
        return self._now.get(what)

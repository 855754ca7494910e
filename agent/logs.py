"""Logs as key=value lines on stderr: one line per change of state."""

from __future__ import annotations

import logging
import sys
import time


class _KeyValue(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage().replace("\n", "\\n")
        line = f"time={moment}.{int(record.msecs):03d}Z level={record.levelname.lower()} logger={record.name} {message}"
        if record.exc_info:
            line += f" exception={self.formatException(record.exc_info)!r}"
        return line


def set_up(level: str) -> None:
    """Send the log to stderr, from `level` ("debug" to "error") up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_KeyValue())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for every request else

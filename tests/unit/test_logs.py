"""The log: one line per event on stderr, for people and for grep."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(
    r"time=(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) level=(?P<level>\w+) logger=(?P<logger>\S+) (?P<rest>.*)"
)


def logged(level: str, *statements: str) -> list[dict[str, str]]:
    """Run statements in a process that logs from this level up; return the fields of each line."""
    script = ["import logging", "from agent.logs import set_up", f"set_up({level!r})"]
    script += ["log = logging.getLogger('agent.test')", *statements]
    command = [sys.executable, "-c", "\n".join(script)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == ""
    matches = [LINE.fullmatch(line) for line in done.stderr.splitlines()]
    assert all(matches), done.stderr
    return [match.groupdict() for match in matches if match]


def test_line() -> None:
    """A line has the time in UTC, level, logger and message, with its arguments."""
    (line,) = logged("info", "log.info('ready socket=%s pods=%d', '/run/x', 3)")
    assert line | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "agent.test",
        "rest": "ready socket=/run/x pods=3",
    }


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_levels(level: str, expected: list[str]) -> None:
    """Only what is as important as the configured level, or more so, is logged."""
    lines = logged(level, *(f"log.{each}('x')" for each in ("debug", "info", "warning", "error")))
    assert [line["level"] for line in lines] == expected


def test_line_breaks() -> None:
    """A message of several lines stays one line, so that nobody can forge another one."""
    (line,) = logged("info", r"log.info('got %s', 'x\ntime=now level=error forged\n')")
    assert line["rest"] == r"got x\ntime=now level=error forged\n"


def test_exception() -> None:
    """A traceback is one value of its line."""
    (line,) = logged("info", "try: 1 / 0", "except Exception: log.exception('pass failed')")
    assert line["rest"].startswith("pass failed exception='Traceback (most recent call last):\\n")
    assert line["rest"].endswith("ZeroDivisionError: division by zero'")


def test_other_libraries() -> None:
    """What a library logs has the same form."""
    (line,) = logged("info", "logging.getLogger('pyroute2').warning('hm')")
    assert (line["logger"], line["rest"]) == ("pyroute2", "hm")

"""The versions of the CNI specification that podlane speaks, and which command came with which."""

from __future__ import annotations

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Oldest first. `answer.h` has them once more, for VERSION without an agent; test_launcher.py compares."""
LATEST = VERSIONS[-1]
UNNAMED = VERSIONS[0]
"""What a configuration without `cniVersion` means (cni:pkg/version/conf.go)."""

SINCE = {"ADD": VERSIONS[0], "DEL": VERSIONS[0], "CHECK": "0.4.0", "GC": "1.1.0", "STATUS": "1.1.0"}
"""The oldest version that has the command (specification, conventions and spec-upgrades.md)."""


def numbers(version: str) -> tuple[int, int, int]:
    """Return major, minor and micro, those that are missing as 0. Raises ValueError (cni:pkg/version/plugin.go)."""
    parts = version.split(".")
    if len(parts) > 3 or not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f'"{version}" is not of the form 1.1.0')
    major, minor, micro, *_ = (*map(int, parts), 0, 0)
    return major, minor, micro


def at_least(version: str, since: str) -> bool:
    """Tell whether a version, of which `numbers` can make sense, is `since` or newer."""
    return numbers(version) >= numbers(since)

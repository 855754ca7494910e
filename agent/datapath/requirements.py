"""Which kernels the datapath runs on."""

from __future__ import annotations

import re

_OLDEST = (5, 11)  # bpf_ktime_get_coarse_ns; bpf_redirect_peer is of 5.10


def refusal(version: str) -> str:
    """Say why the datapath must not run on a kernel of this version (uname -v); empty if it may.

    With PREEMPT_RT, softirqs of one CPU may interrupt each other (Linux 6.18, 6.12.57), and each program keeps what it
    knows of its packet in a map of the CPU's: see `bpf/parse.h`.
    """
    if "PREEMPT_RT" not in version.split():
        return ""
    return "this kernel is built with PREEMPT_RT, where packets of one CPU would be taken for each other"


def remark(release: str) -> str:
    """Return what to add to a failure to start on a kernel of this release (uname -r): empty unless it is too old.

    No kernel is refused for its number alone: distributions bring newer features to older ones.
    """
    match = re.match(r"(\d+)\.(\d+)", release)
    if match is None or (int(match[1]), int(match[2])) >= _OLDEST:
        return ""
    return f" (this kernel is too old: Linux {release}, podlane needs {_OLDEST[0]}.{_OLDEST[1]})"

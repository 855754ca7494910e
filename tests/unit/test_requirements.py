"""Which kernels the datapath runs on."""

from __future__ import annotations

import pytest

from agent.datapath.requirements import refusal, remark


@pytest.mark.parametrize("release", ["5.11.0", "5.15.0-101-generic", "6.1", "10.2.3", "custom"])
def test_a_kernel_that_is_new_enough(release: str) -> None:
    """Nothing is said of a kernel that has what is needed, or whose number says nothing."""
    assert remark(release) == ""


@pytest.mark.parametrize("release", ["4.18.0-553.el8.x86_64", "5.4.0-150-generic", "5.10.209"])
def test_a_kernel_that_is_too_old(release: str) -> None:
    """A failure on an older kernel is told with the reason: which kernel it is, and which one it takes."""
    assert remark(release) == f" (this kernel is too old: Linux {release}, podlane needs 5.11)"


@pytest.mark.parametrize(
    ("version", "is_refused"),
    [
        ("#1 SMP PREEMPT_DYNAMIC Debian 6.1.158-1 (2025-11-09)", False),
        ("#1 SMP PREEMPT_RT Debian 6.12.57-1 (2025-11-05)", True),
    ],
)
def test_real_time(version: str, is_refused: bool) -> None:
    """Where one packet's program may interrupt another's on the same CPU, none may run."""
    assert bool(refusal(version)) == is_refused

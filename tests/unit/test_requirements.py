"""Which kernels the datapath runs on."""

from __future__ import annotations

import pytest

from agent.datapath.requirements import remark


@pytest.mark.parametrize("release", ["5.11.0", "5.15.0-101-generic", "6.1", "10.2.3", "custom"])
def test_a_kernel_that_is_new_enough(release: str) -> None:
    """Nothing is said of a kernel that has what is needed, or whose number says nothing."""
    assert remark(release) == ""


@pytest.mark.parametrize("release", ["4.18.0-553.el8.x86_64", "5.4.0-150-generic", "5.10.209"])
def test_a_kernel_that_is_too_old(release: str) -> None:
    """A failure on an older kernel is told with the reason: which kernel it is, and which one it takes."""
    assert remark(release) == f" (this kernel is too old: Linux {release}, podlane needs 5.11)"

"""Which cgroup is the topmost that an agent can see."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import cgroup

V1 = "30 24 0:26 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu"
HOST = "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"
OWN = "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup rw"
OF_HOST = r"42 31 0:38 /../../.. /host/sys\040fs/cgroup rw - cgroup2 cgroup rw"
PART = "43 31 0:38 /system.slice /mnt rw - cgroup2 cgroup rw"


@pytest.mark.parametrize(
    ("mounts", "found"),
    [
        ([], None),
        ([V1], None),
        ([V1, HOST], "/sys/fs/cgroup/unified"),
        ([OWN, OF_HOST], "/host/sys fs/cgroup"),
        ([OF_HOST, OWN], "/host/sys fs/cgroup"),
        ([PART, HOST], "/sys/fs/cgroup/unified"),
        ([PART], "/mnt"),
    ],
)
def test_find(tmp_path: Path, mounts: list[str], found: str | None) -> None:
    """It is the one that is mounted from the furthest up, whatever else is mounted."""
    (tmp_path / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
    assert cgroup.find(tmp_path / "mountinfo") == (Path(found) if found else None)

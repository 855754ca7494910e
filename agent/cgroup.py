"""The cgroup that all processes of the node are in, at whose sockets programs run."""

from __future__ import annotations

from pathlib import Path

from agent.state import KernelError

_MOUNTS = Path("/proc/self/mountinfo")


def find(mounts: Path = _MOUNTS) -> Path | None:
    """Return where the topmost cgroup (version 2) is mounted, None if there is none.

    A container sees its own cgroup as "/", and the node's, if it has that mounted as well, as "/../..": see
    cgroup_namespaces(7), and proc(5) for the file.
    """
    found: dict[Path, int] = {}
    for line in mounts.read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        _, _, _, root, where, *_ = fields.split()
        if kind.startswith("cgroup2 "):
            steps = Path(root).parts
            found[Path(where.encode().decode("unicode_escape"))] = 2 * steps.count("..") - len(steps)
    return max(found, key=lambda path: found[path]) if found else None


def number(cgroup: Path) -> int:
    """Return a cgroup's number, as far as the kernel tells it of links. Raises KernelError."""
    try:
        return cgroup.stat().st_ino & 0xFFFFFFFF
    except OSError as error:
        raise KernelError(f"look at the cgroup {cgroup}: {error.strerror}") from error

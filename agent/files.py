"""Files: written so that nobody sees half of one, read so that nobody can make the reader wait."""

from __future__ import annotations

import os
import stat
from pathlib import Path

HOST = Path(os.environ.get("PODLANE_HOST", "/"))
"""Below which the node's own /proc/sys/net and /sys/fs/bpf are. In a container those places are the container's, the
first read-only and both closed to it by most AppArmor profiles: the node's are mounted elsewhere."""


def replace_file(path: Path, content: bytes, mode: int) -> None:
    """Write a file atomically and durably, in place of what was there. Raises OSError.

    Its temporary name is in the same directory, begins with a dot and ends in ".tmp": no CNI runtime reads such a file,
    and the rename is an event that containerd's watcher reloads on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_file(path: Path) -> bool:
    """Remove a file, with what a crash has left of its writing, and say whether it was there. Raises OSError."""
    _temporary(path).unlink(missing_ok=True)
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def read_regular(path: Path, limit: int) -> bytes:
    """Return a regular file's first `limit` bytes, and of no other kind anything. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO may never have a writer
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("it is not a regular file")
        return os.read(descriptor, limit)
    finally:
        os.close(descriptor)

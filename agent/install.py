"""What the agent puts where the container runtime looks: the launcher, and last of all the CNI configuration.

Both are written beside their place, synced and renamed, so that no runtime ever sees half a file; the rename also is
the event that containerd's watcher reloads on.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_CONFLIST = "10-podlane.conflist"


class InstallError(Exception):
    """A file cannot be put in place; the message names it."""


def install_launcher(source: Path, directory: Path) -> None:
    """Put the launcher into the runtime's plugin directory as `podlane`. Raises InstallError."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InstallError(f"cannot read the launcher {source}: {error.strerror}; is paths.launcher right?") from error
    _replace(directory / "podlane", content, 0o755)


def install_conflist(directory: Path, network: str) -> None:
    """Tell the runtime to use podlane. Raises InstallError.

    The version is one that every runtime can parse; those that know `cniVersions` choose the newest (CNI 1.1.0).
    """
    conflist = {
        "cniVersion": "1.0.0",
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": network,
        "disableCheck": True,
        "plugins": [{"type": "podlane"}],
    }
    _replace(directory / _CONFLIST, json.dumps(conflist, indent=2).encode() + b"\n", 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file atomically and durably, if it is not there already with this content."""
    try:
        if path.is_file() and path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
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
    except OSError as error:
        raise InstallError(f"cannot install {path}: {error.strerror}") from error

"""What the agent puts where the container runtime looks: the launcher, and last of all the CNI configuration."""

from __future__ import annotations

import json
from pathlib import Path

from agent.files import remove_file, replace_file

_CONFLIST = "10-podlane.conflist"
_LAUNCHER = "podlane"


class InstallError(Exception):
    """A file cannot be put in place; the message names it."""


def install_launcher(source: Path, directory: Path) -> None:
    """Put the launcher into the runtime's plugin directory as `podlane`. Raises InstallError."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InstallError(f"cannot read the launcher {source}: {error.strerror}; is paths.launcher right?") from error
    _put(directory / _LAUNCHER, content, 0o755)


def install_conflist(directory: Path, network: str) -> None:
    """Tell the runtime to use podlane. Raises InstallError.

    The version is one that every runtime can parse; those that know `cniVersions` choose the newest (CNI 1.1.0). The
    capabilities are those that runtimes may use: what they do not name, no runtime asks for.
    """
    conflist = {
        "cniVersion": "1.0.0",
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": network,
        "plugins": [
            {
                "type": "podlane",
                "capabilities": {"ips": True, "mac": True, "ipRanges": True, "portMappings": True, "bandwidth": True},
            }
        ],
    }
    _put(directory / _CONFLIST, json.dumps(conflist, indent=2).encode() + b"\n", 0o644)


def remove_conflist(directory: Path) -> bool:
    """Tell the runtime to use podlane no more; say whether it was told to. Raises OSError."""
    return remove_file(directory / _CONFLIST)


def remove_launcher(directory: Path) -> bool:
    """Take the launcher from the runtime's plugin directory; say whether it was there. Raises OSError."""
    return remove_file(directory / _LAUNCHER)


def _put(path: Path, content: bytes, mode: int) -> None:
    """Write the file, if it is not there already with this content."""
    try:
        if path.is_file() and path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
            return
        replace_file(path, content, mode)
    except OSError as error:
        raise InstallError(f"cannot install {path}: {error.strerror}") from error

"""The state directory: whose it is at present, and the store in it."""

from __future__ import annotations

import fcntl
import os
from contextlib import ExitStack
from pathlib import Path

from agent.config import Config
from agent.store import Store

STORE = "ipam.db"
LOCK = "agent.lock"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class StartError(Exception):
    """The agent cannot start; the message says what is wrong and, where it can, what to do."""


def open_store(config: Config) -> Store:
    """Open the IPAM store of a configuration. Raises StoreError and OSError."""
    return Store(
        config.paths.state / STORE,
        config.own_ranges,
        boot_id=boot_id(),
        exclude=config.exclude,
        reserved=config.reserved,
        sticky=config.sticky,
    )


def boot_id() -> str:
    """Return what tells this boot of the machine from all others."""
    return _BOOT_ID.read_text().strip()


def lock_state(directory: Path, cleanup: ExitStack) -> None:
    """Keep others off the state directory until `cleanup`; the kernel unlocks it however this process ends.

    Raises OSError, and StartError if another agent is at work.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / LOCK
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    cleanup.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StartError(f"another agent is at work: it holds {path} (fuser says which)") from error

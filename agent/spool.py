"""DELs that launchers left while the agent was away (see cni/launcher.c): read, done, removed, in that order."""

from __future__ import annotations

import logging
from pathlib import Path

from agent.server import Handle
from cni import wire

log = logging.getLogger(__name__)


class Spool:
    """The spool directory. `drain` may be called from several threads: a DEL done twice is done once."""

    def __init__(self, directory: Path, handle: Handle) -> None:
        self._directory = directory
        self._handle = handle

    def drain(self) -> None:
        """Do what is spooled, oldest first. What fails stays for the next time; what nobody can read is set aside."""
        if not self._directory.is_dir():
            return
        for path in sorted(self._directory.glob("*.del")):
            try:
                self._do(path)
            except FileNotFoundError:
                continue  # another thread was faster

    def _do(self, path: Path) -> None:
        try:
            request = wire.decode(path.read_bytes())
        except wire.WireError as error:
            log.error("spooled request is unreadable file=%s error=%r", path, str(error))
            path.rename(path.with_suffix(".bad"))
            return
        reply = self._handle(request)
        if reply.exit_code != 0:
            log.error("spooled DEL failed file=%s reply=%s", path, reply.stdout.decode(errors="replace"))
            return
        path.unlink()
        log.info("spooled DEL done container=%s", request.env.get("CNI_CONTAINERID", ""))

"""DELs that launchers left while the agent was away (see cni/launcher.c): read, done, removed, in that order."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from agent.server import Handle
from cni import wire
from cni.errors import Code

log = logging.getLogger(__name__)

# Of a call that will be as wrong the next time: the runtime that made it never knew.
_HOPELESS = {
    Code.INCOMPATIBLE_VERSION,
    Code.INVALID_ENVIRONMENT,
    Code.DECODING_FAILURE,
    Code.INVALID_NETWORK_CONFIG,
}


class Spool:
    """The spool directory. `drain` may be called from several threads: a DEL done twice is done once."""

    def __init__(self, directory: Path, handle: Handle) -> None:
        self._directory = directory
        self._handle = handle
        self._told: dict[Path, str] = {}

    def serve(self, request: wire.Request) -> wire.Reply:
        """Serve a call, an ADD after what is spooled: a DEL that waits may be of an earlier life of its attachment."""
        if request.env.get("CNI_COMMAND") == "ADD":
            self.drain()
        return self._handle(request)

    def drain(self) -> None:
        """Do what is spooled, oldest first. What fails stays for the next time; what nobody can read is set aside."""
        if not self._directory.is_dir():
            return
        for path in sorted(self._directory.glob("*.del")):
            try:
                self._do(path)
            except FileNotFoundError:
                continue  # another thread was faster
            except OSError as error:
                self._tell(path, str(error))

    def _do(self, path: Path) -> None:
        try:
            request = wire.decode(path.read_bytes())
        except wire.WireError as error:
            log.error("spooled request is unreadable file=%s error=%r", path, str(error))
            path.rename(path.with_suffix(".bad"))
            return
        reply = self._handle(request)
        if reply.exit_code != 0:
            trouble = reply.stdout.decode(errors="replace")
            if json.loads(trouble)["code"] in _HOPELESS:
                log.error("spooled request can never be done file=%s error=%r", path, trouble)
                path.rename(path.with_suffix(".bad"))
            else:
                self._tell(path, trouble)
            return
        path.unlink()
        self._told.pop(path, None)
        log.info("spooled DEL done container=%s", request.env.get("CNI_CONTAINERID", ""))

    def _tell(self, path: Path, trouble: str) -> None:
        """Log why a DEL has to wait, but not the same with every try."""
        if self._told.get(path) != trouble:
            log.error("spooled DEL failed, and waits file=%s error=%r", path, trouble)
        self._told[path] = trouble

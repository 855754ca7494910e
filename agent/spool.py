"""DELs that launchers left while the agent was away (see cni/launcher.c): read, done, removed, in that order."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
# Seconds that files stay, by their suffix: what was set aside, for people; what a launcher died over, should it live.
_KEPT = {".bad": 7 * 86400.0, ".tmp": 3600.0}
_ROUND_SECONDS = 10.0  # in which a DEL may begin: a delegate that hangs shall not keep its caller for ever
_ATTACHMENT = ("CNI_CONTAINERID", "CNI_IFNAME")


class Spool:
    """The spool directory. Several threads may use it: a DEL is done by one at a time, and when done, by no other."""

    def __init__(self, directory: Path, handle: Handle, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` counts seconds."""
        self._clock = clock
        self._directory = directory
        self._handle = handle
        self._told: dict[Path, str] = {}
        self._turns = threading.Condition()
        self._at_work: set[Path] = set()

    def serve(self, request: wire.Request) -> wire.Reply:
        """Serve a call, an ADD after what is spooled for its container's interface: that is of an earlier life of it.

        What is spooled for others does not hold it up: a delegate may take its time for each.
        """
        if request.env.get("CNI_COMMAND") == "ADD":
            for path in self._waiting():
                if _is_for(path, request):
                    self._try(path)
        return self._handle(request)

    def drain(self) -> None:
        """Do what is spooled, oldest first, what failed before last; what nobody can read is set aside.

        What fails stays for the next time, and so does what is left when the round's time is over.
        """
        end = self._clock() + _ROUND_SECONDS
        for path in sorted(self._waiting(), key=lambda path: path in self._told):
            if self._clock() < end:
                self._try(path)
        for path in self._directory.glob("*"):
            _remove_old(path)

    def _waiting(self) -> list[Path]:
        return sorted(self._directory.glob("*.del"))

    def _try(self, path: Path) -> None:
        with self._turn(path):
            try:
                self._do(path)
            except FileNotFoundError:
                pass  # another thread was faster
            except OSError as error:
                self._tell(path, str(error))

    @contextmanager
    def _turn(self, path: Path) -> Iterator[None]:
        """Keep others from a file: a thread that had read it might do a DEL again, after the ADD that waited for it."""
        with self._turns:
            self._turns.wait_for(lambda: path not in self._at_work)
            self._at_work.add(path)
        try:
            yield
        finally:
            with self._turns:
                self._at_work.remove(path)
                self._turns.notify_all()

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


def _is_for(path: Path, request: wire.Request) -> bool:
    """Say whether a spooled DEL is of the container and interface of a request, on whatever network."""
    try:
        spooled = wire.decode(path.read_bytes())
    except (OSError, wire.WireError):
        return False
    return all(spooled.env.get(name) == request.env.get(name) for name in _ATTACHMENT)


def _remove_old(path: Path) -> None:
    """Remove what nobody will look at any more."""
    try:
        age = time.time() - path.stat().st_mtime
        if age > _KEPT.get(path.suffix, age):
            path.unlink()
            log.info("removed an old file=%s", path)
    except OSError as error:
        log.debug("cannot remove file=%s error=%r", path, str(error))

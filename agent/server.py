"""The agent's unix socket: launchers call here. Root only, by the mode of the socket and by the peer's credentials."""

from __future__ import annotations

import logging
import os
import select
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

from cni import wire

log = logging.getLogger(__name__)

_TRANSFER_SECONDS = 10.0  # a launcher sends what it has at once, and reads until the end
_POLL_SECONDS = 0.05  # how soon `stop` is noticed
_STOP_SECONDS = 5.0  # for the calls in hand; most take some milliseconds
_CONCURRENT = 16  # enough to keep the kernel busy; the others wait in line
_CONNECTIONS = 512  # each has a thread, of 20 kB; more launchers than that wait for the next that is free
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid (unix(7))

Handle = Callable[[wire.Request], wire.Reply]


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves each launcher in a thread of its own."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 1024

    def __init__(self, path: Path, handle: Handle) -> None:
        """Listen on `path`, in place of the socket of an earlier agent. Raises OSError."""
        self._handle = handle
        self._turns = threading.BoundedSemaphore(_CONCURRENT)
        self._connections = threading.Condition()
        self._open = 0
        self._is_cut_off = False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path
        path.unlink(missing_ok=True)
        super().__init__(str(path), socketserver.BaseRequestHandler)
        self._inode = path.stat().st_ino

    def server_bind(self) -> None:
        """Bind with a mode that lets nobody else connect, not even for a moment."""
        previous = os.umask(0o177)
        try:
            super().server_bind()
        finally:
            os.umask(previous)

    def start(self) -> None:
        """Serve in a thread of its own until `stop`."""
        threading.Thread(target=self.serve_forever, args=(_POLL_SECONDS,), name="server", daemon=True).start()

    def stop(self) -> None:
        """Stop listening, and let the calls in hand end. The socket goes, unless another agent has put its own there.

        A call that takes too long gets no answer, whatever comes of it from here on: so its launcher says that the
        agent is away, or spools the DEL.
        """
        self.shutdown()
        with suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:  # ours alone, as long as it is open
                self._path.unlink()
        self.server_close()
        with self._connections:
            self._connections.wait_for(lambda: self._open == 0, _STOP_SECONDS)
            self._is_cut_off = True

    def get_request(self) -> tuple[socket.socket, object]:
        """Take a connection, as long as there is room for one. Raises OSError: the base class tries again."""
        with self._connections:
            if not self._connections.wait_for(lambda: self._open < _CONNECTIONS, _POLL_SECONDS):
                raise BlockingIOError(f"{_CONNECTIONS} connections are open")
            self._open += 1
        try:
            return super().get_request()
        except OSError:  # for want of descriptors, most likely; without a pause it would fail a million times
            time.sleep(_POLL_SECONDS)
            self._closed()
            raise

    def close_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """Close a connection that `get_request` has taken."""
        super().close_request(request)
        self._closed()

    def _closed(self) -> None:
        with self._connections:
            self._open -= 1
            self._connections.notify_all()

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]  # noqa: ARG002
        """Serve one launcher."""
        _, uid, _ = _CREDENTIALS.unpack(request.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != 0:
            log.warning("refused caller uid=%d", uid)
            return
        try:
            self._serve(request)
        except wire.WireError as error:
            log.warning("launcher gave up or spoke nonsense error=%r", str(error))

    def _serve(self, connection: socket.socket) -> None:
        request = wire.receive(connection, _TRANSFER_SECONDS)
        connection.settimeout(_TRANSFER_SECONDS)
        command = request.env.get("CNI_COMMAND")
        try:
            # STATUS waits for nobody: its runtime would take the node for unready while many pods start.
            with nullcontext() if command == "STATUS" else self._turns:
                if command == "ADD" and _has_hung_up(connection):
                    log.warning("ADD comes too late container=%s", request.env.get("CNI_CONTAINERID", ""))
                    return
                reply = self._handle(request)
            if not self._is_cut_off:
                wire.reply(connection, reply)
        finally:
            if request.netns is not None:
                os.close(request.netns)


def _has_hung_up(connection: socket.socket) -> bool:
    """Say whether the launcher is gone. Its runtime may have had its DEL done meanwhile: nothing would undo an ADD."""
    waiting = select.poll()
    waiting.register(connection, 0)  # POLLHUP comes unasked, and not from shutdown(2) of one direction
    return any(event & select.POLLHUP for _, event in waiting.poll(0))


def observed(handle: Handle, observe: Callable[[str, int, float], None]) -> Handle:
    """Wrap a handler so that `observe(command, exit code, seconds)` is told of each call."""

    def wrapped(request: wire.Request) -> wire.Reply:
        start = time.perf_counter()
        reply = handle(request)
        observe(request.env.get("CNI_COMMAND", ""), reply.exit_code, time.perf_counter() - start)
        return reply

    return wrapped

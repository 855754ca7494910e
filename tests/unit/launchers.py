"""The launcher for tests: the real executable as a runtime calls it, agents of all kinds, and what to expect."""

import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cni import wire

ROOT = Path(__file__).parents[2]
ATTACHMENT = {"CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin"}
REPLY = struct.pack("=II", 0, 12) + b'{"ips":"x"}\n'
# Codes of the specification (SPEC.md, section Error).
INVALID_ENVIRONMENT, IO_FAILURE, TRY_AGAIN_LATER, NOT_AVAILABLE = 4, 5, 11, 50

Result = subprocess.CompletedProcess[bytes]
Behaviour = Callable[[socket.socket], object]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@dataclass(frozen=True)
class Host:
    """A launcher with its own socket and spool directory."""

    binary: Path
    directory: Path

    @property
    def socket(self) -> Path:
        """Where the agent would listen."""
        return self.directory / "cni.sock"

    @property
    def spool(self) -> Path:
        """Where a DEL waits; neither it nor its parent exists at first."""
        return self.directory / "state" / "spool"

    def environment(self, command: str | bytes, **variables: str | bytes) -> dict[str, str | bytes]:
        """Return what the container runtime would set."""
        paths = {"PODLANE_SOCKET": str(self.socket), "PODLANE_SPOOL": str(self.spool)}
        return {"CNI_COMMAND": command, **ATTACHMENT, **paths, **variables}

    def call(self, command: str | bytes, stdin: bytes = b"{}", **variables: str | bytes) -> Result:
        """Run the launcher to its end."""
        return self.run([self.binary], self.environment(command, **variables), input=stdin)

    def trace(self, options: list[str], command: str, **variables: str) -> tuple[Result, list[str]]:
        """Run the launcher under strace; return the lines of the trace too."""
        trace = self.directory / "trace"
        strace = ["strace", "-o", trace, *options, self.binary]
        result = self.run(strace, self.environment(command, **variables), input=b"{}")
        return result, trace.read_text().splitlines()

    def run(
        self,
        arguments: list[Any],
        environment: dict[str, str | bytes],
        **options: Any,  # noqa: ANN401
    ) -> Result:
        """Run a program with exactly this environment."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
        executable = shutil.which(arguments[0])
        return subprocess.run(
            arguments, executable=executable, env=environment, cwd=self.directory, check=False, **options
        )

    def spooled(self) -> list[Path]:
        """Return all that is in the spool directory."""
        return sorted(self.spool.iterdir()) if self.spool.exists() else []


@contextmanager
def listening(path: Path, behave: Behaviour) -> Iterator[None]:
    """Listen at path, and treat every connection so in one thread."""

    def serve() -> None:
        with suppress(OSError):  # shutdown() ends accept()
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError, wire.WireError):
                    connection.settimeout(30)
                    behave(connection)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            path.unlink()


def answering(reply: bytes) -> Behaviour:
    """Return an agent that reads the request and answers with exactly these bytes."""

    def behave(connection: socket.socket) -> None:
        request = wire.receive(connection, 30)
        if request.netns is not None:
            os.close(request.netns)
        connection.sendall(reply)

    return behave


def silent(connection: socket.socket) -> None:
    """Take the whole request, and answer only by outliving the launcher."""
    wire.receive(connection, 30)
    wait_for_hangup(connection)


def wait_for_hangup(connection: socket.socket) -> None:
    """Wait until the launcher is gone, not only done with sending."""
    poll = select.poll()
    poll.register(connection, 0)
    poll.poll(30_000)


def error(result: Result) -> dict[str, Any]:
    """Return the one CNI error object that a failed launcher printed."""
    assert result.returncode == 1
    document = json.loads(result.stdout.decode())
    assert set(document) == {"cniVersion", "code", "msg", "details"}
    assert document["cniVersion"] == "1.1.0"
    text = (document["msg"] + document["details"]).lower()
    assert "not found" not in text
    assert "no such file or directory" not in text
    return dict(document)


def spooled_request(host: Host) -> wire.Request:
    """Return the request in the only file of the spool directory."""
    (path,) = host.spooled()
    assert re.fullmatch(r"\d{20}-\d+\.del", path.name)
    return wire.decode(path.read_bytes())


def assert_spooled(host: Host, result: Result) -> None:
    """Check that a DEL has succeeded by being spooled, and empty the spool."""
    assert (result.returncode, result.stdout) == (0, b"")
    assert result.stderr.count(b"\n") == 1
    assert spooled_request(host).env["CNI_COMMAND"] == "DEL"
    host.spooled()[0].unlink()


def no_socket(path: Path) -> str:
    """Leave the path as it is: nothing."""
    return str(path)


def abandoned_socket(path: Path) -> str:
    """Leave the socket of an agent that died."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return str(path)


def no_directory(path: Path) -> str:
    """Leave not even the directory."""
    return str(path / "deeper" / "cni.sock")


def too_long(path: Path) -> str:
    """Give a path that no unix socket can have."""
    return str(path) + "x" * 108


Place = Callable[[Path], str]
PLACES: list[Place] = [no_socket, abandoned_socket, no_directory, too_long]
"""Ways of an agent to be away; each returns the path of its socket."""

"""The wire between launcher and agent: one request and its reply over a unix stream socket.

Numbers are in native byte order, for both ends are on the same machine. `launcher.c` is the other end.

    request: char magic[4] = "PLN1"; u32 env_size; u32 stdin_size; i32 netns_errno; env; stdin
    reply:   u32 exit_code; u32 stdout_size; stdout

`env` is the launcher's whole environment, each variable as "NAME=value\\0"; of a name that comes twice the
first counts, as for getenv(3). The first bytes of a request carry the open network namespace (SCM_RIGHTS), so
that the agent needs neither mount namespace nor paths of the runtime. Without a descriptor `netns_errno`
says why: 0 if CNI_NETNS is empty, else the errno of opening it. The launcher ends its request by shutdown(2),
the agent its reply by close(2). A file in the spool directory holds exactly the bytes of one request.
"""

import array
import os
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

MAGIC = b"PLN1"
ENV_LIMIT = 4 << 20
"""Bytes of environment in one request; Linux takes at most 6 MiB of arguments and environment."""
STDIN_LIMIT = 16 << 20
"""Bytes of network configuration in one request."""
STDOUT_LIMIT = 16 << 20
"""Bytes of output in one reply."""

_REQUEST = struct.Struct("=4sIIi")
_REPLY = struct.Struct("=II")
_ERRNO_LIMIT = 4095  # MAX_ERRNO, include/linux/err.h
_PART = 1 << 16  # bytes to receive at a time: more than most requests have
_ONE_DESCRIPTOR = socket.CMSG_LEN(array.array("i", [0]).itemsize)


class WireError(Exception):
    """The other end, or a spool file, does not keep to the wire format, or the connection failed."""


@dataclass(frozen=True)
class Request:
    """What the container runtime gave to the launcher.

    `netns` is an open, close-on-exec descriptor that belongs to whoever holds the request; no file keeps it.
    `netns_errno` is 0, or why the launcher could not open CNI_NETNS.
    """

    env: Mapping[str, str]
    stdin: bytes
    netns: int | None = None
    netns_errno: int = 0


@dataclass(frozen=True)
class Reply:
    """What the launcher is to print on stdout, and the status (0 to 255) it is to exit with."""

    exit_code: int
    stdout: bytes


def receive(connection: socket.socket, seconds: float) -> Request:
    """Read one request, which must be there in so many seconds; the connection's timeout is changed.

    The caller owns the descriptor in the result. At most one is taken, the kernel closes all others.
    Raises WireError for a malformed request, and when the connection fails, ends or times out.
    """
    deadline = time.monotonic() + seconds
    with ExitStack() as undo:
        start, netns = _receive_start(connection, deadline)
        if netns is not None:
            undo.callback(os.close, netns)
        header = start + _receive_exactly(connection, _REQUEST.size - len(start), "header", deadline)
        env_size, stdin_size, netns_errno = _parse_header(header)
        env = _parse_env(_receive_exactly(connection, env_size, "env", deadline))
        stdin = _receive_exactly(connection, stdin_size, "stdin", deadline)
        _check_netns(env.get("CNI_NETNS", ""), netns, netns_errno)
        undo.pop_all()
    return Request(env=env, stdin=stdin, netns=netns, netns_errno=netns_errno)


def reply(connection: socket.socket, answer: Reply) -> None:
    """Send the reply; the caller then closes the connection. Raises WireError."""
    if not 0 <= answer.exit_code <= 255:
        raise WireError(f"reply: exit_code is {answer.exit_code}, allowed are 0 to 255")
    _check_size("reply: stdout", len(answer.stdout), STDOUT_LIMIT)
    try:
        connection.sendall(_REPLY.pack(answer.exit_code, len(answer.stdout)) + answer.stdout)
    except OSError as error:
        raise WireError(f"reply: cannot send {len(answer.stdout)} bytes of stdout: {error}") from error


def encode(request: Request) -> bytes:
    """Return the bytes of a request, as in a spool file. Raises WireError for what the format cannot hold."""
    env = b"".join(_encode_variable(name, value) for name, value in request.env.items())
    _check_size("env", len(env), ENV_LIMIT)
    _check_size("stdin", len(request.stdin), STDIN_LIMIT)
    _check_errno(request.netns_errno)
    return _REQUEST.pack(MAGIC, len(env), len(request.stdin), request.netns_errno) + env + request.stdin


def decode(data: bytes) -> Request:
    """Return the request that a spool file holds, without a descriptor. Raises WireError."""
    if len(data) < _REQUEST.size:
        raise WireError(f"header: {len(data)} bytes, needed are {_REQUEST.size}")
    env_size, stdin_size, netns_errno = _parse_header(data[: _REQUEST.size])
    body = data[_REQUEST.size :]
    if len(body) != env_size + stdin_size:
        raise WireError(f"body: {len(body)} bytes, announced are {env_size} of env and {stdin_size} of stdin")
    return Request(env=_parse_env(body[:env_size]), stdin=body[env_size:], netns_errno=netns_errno)


def _receive_start(connection: socket.socket, deadline: float) -> tuple[bytes, int | None]:
    """Receive the first bytes, and the descriptor that may come with them."""
    try:
        _limit(connection, deadline)
        # With room for just one descriptor the kernel closes whatever else was sent.
        start, controls, _, _ = connection.recvmsg(_REQUEST.size, _ONE_DESCRIPTOR, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise WireError(f"header: cannot receive: {error}") from error
    descriptors = array.array("i")
    for level, kind, data in controls:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data)
    return start, descriptors[0] if descriptors else None


def _receive_exactly(connection: socket.socket, size: int, field: str, deadline: float) -> bytes:
    """Receive that many bytes; descriptors among them are closed by the kernel.

    Memory is taken for what has come, not for what is announced.
    """
    data = bytearray()
    while missing := size - len(data):
        try:
            _limit(connection, deadline)
            part = connection.recv(min(missing, _PART))
        except OSError as error:
            raise WireError(f"{field}: cannot receive the last {missing} bytes: {error}") from error
        if not part:
            raise WireError(f"{field}: the connection ended {missing} bytes too early")
        data += part
    return bytes(data)


def _limit(connection: socket.socket, deadline: float) -> None:
    """Let the next read wait until the deadline (time.monotonic) at most. Raises TimeoutError."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    connection.settimeout(left)


def _parse_header(header: bytes) -> tuple[int, int, int]:
    """Return env_size, stdin_size and netns_errno."""
    magic, env_size, stdin_size, netns_errno = _REQUEST.unpack(header)
    if magic != MAGIC:
        raise WireError(f"magic: {magic!r}, allowed is {MAGIC!r}")
    _check_size("env_size", env_size, ENV_LIMIT)
    _check_size("stdin_size", stdin_size, STDIN_LIMIT)
    _check_errno(netns_errno)
    return env_size, stdin_size, netns_errno


def _parse_env(data: bytes) -> dict[str, str]:
    env: dict[str, str] = {}
    if not data:
        return env
    *variables, rest = data.split(b"\0")
    if rest:
        raise WireError(f"env: its last variable {rest[:64]!r} does not end with a zero byte")
    for variable in variables:
        name, equals, value = variable.partition(b"=")
        if not name or not equals:
            raise WireError(f"env: {variable[:64]!r}, allowed is NAME=value")
        env.setdefault(_text(name), _text(value))
    return env


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _encode_variable(name: str, value: str) -> bytes:
    try:
        data = f"{name}={value}".encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise WireError(f"env: {name[:64]!r} is not a decoded byte string: {error}") from error
    if not name or "=" in name or b"\0" in data:
        raise WireError(f"env: {name[:64]!r}, allowed are names without '=' and no zero bytes")
    return data + b"\0"


def _check_size(field: str, size: int, limit: int) -> None:
    if size > limit:
        raise WireError(f"{field}: {size} bytes, allowed are {limit}")


def _check_errno(netns_errno: int) -> None:
    if not 0 <= netns_errno <= _ERRNO_LIMIT:
        raise WireError(f"netns_errno: {netns_errno}, allowed are 0 to {_ERRNO_LIMIT}")


def _check_netns(path: str, netns: int | None, netns_errno: int) -> None:
    """Refuse a descriptor together with an errno, and a network namespace with neither.

    The latter also happens when this process has no descriptor left: the kernel then drops the one sent.
    """
    if netns is not None and netns_errno:
        raise WireError(f"netns_errno: {netns_errno} beside an open descriptor, allowed is 0")
    if path and netns is None and not netns_errno:
        raise WireError(f"netns: no descriptor came for CNI_NETNS={path[:256]!r}, and no errno")

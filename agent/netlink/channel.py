"""Requests to rtnetlink and their answers.

pyroute2 builds the requests (but for those of `encode`); they are sent here, many in one datagram, and their answers
matched by sequence number. pyroute2's own sockets run an event loop (0.3 ms to open one, 0.2 ms for each call; here
0.1 ms with the socket), and its decoder takes 27 times as long as `attributes` to read a dump (6 ms for 220 routes),
all of it under the interpreter's lock while a pod waits.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from pyroute2.netlink import (
    NETLINK_EXT_ACK,
    NETLINK_GET_STRICT_CHK,
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_DUMP,
    NLM_F_DUMP_INTR,
    NLM_F_REQUEST,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
)

from agent.state import KernelError

K = TypeVar("K")
T = TypeVar("T")

NETLINK_CAP_ACK = 10  # linux/netlink.h: an error does not bring the whole request back; pyroute2 has no name for it
NLMSGERR_ATTR_MSG = 1

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length, type
ATTRIBUTE_TYPE = 0x3FFF  # without the NESTED and BYTEORDER bits
ERROR = struct.Struct("=i")

# The answers to one datagram wait in the socket's receive buffer: at most 1 KiB each of the default 208 KiB.
BATCH = 64
RECEIVE = 1 << 17  # bytes; the kernel fills at most 32 KiB
# Seconds and microseconds. The answers are there when send() returns: only a lost one takes so long.
TIMEOUT = struct.pack("@ll", 10, 0)
DUMP_ATTEMPTS = 10


@dataclass(frozen=True, slots=True)
class Request:
    """One message to the kernel, the words that name it in an error, and the errors that count as done."""

    what: str
    data: bytes
    tolerated: tuple[int, ...] = ()


class Message(NamedTuple):
    """One message from the kernel: type (RTM_…), flags, sequence number, and what follows the header."""

    type: int
    flags: int
    sequence: int
    body: bytes


def request(
    what: str,
    message: Callable[[], Any],
    kind: int,
    flags: int = 0,
    *,
    fields: Mapping[str, object] | None = None,
    attributes: Sequence[tuple[str, object]] = (),
    tolerated: tuple[int, ...] = (),
) -> Request:
    """Build a request of type `kind` (RTM_…) from a message class of pyroute2, fields and attributes."""
    encoded = message()
    header = {"type": kind, "flags": NLM_F_REQUEST | flags, "sequence_number": 0, "pid": 0}
    encoded.setvalue({**(fields or {}), "attrs": list(attributes), "header": header})
    encoded.encode()
    return Request(what, bytes(encoded.data), tolerated)


def perform(requests: Iterable[Request]) -> None:
    """Send the requests in order. Raises the first KernelError; the requests after it are tried too."""
    for failure in execute(requests):
        if failure:
            raise failure


def execute(requests: Iterable[Request]) -> list[KernelError | None]:
    """Send the requests in order and return, in the same order, what became of each: None means done."""
    results: list[KernelError | None] = []
    waiting = iter(requests)
    while batch := list(islice(waiting, BATCH)):
        try:
            with _open() as channel:
                results += _exchange(channel, batch)
        except OSError as error:
            raise kernel_error(batch[0].what, error) from error
    return results


def each(keys: Iterable[K], requests: Iterable[Request]) -> dict[K, KernelError]:
    """Send one request per key; return the failures by key. There may be thousands: they are made as they are sent."""
    return {key: failure for key, failure in zip(keys, execute(requests), strict=True) if failure}


def ask(queries: Sequence[Request]) -> list[Message | None]:
    """Return the one message that answers each query; None where there is no such object. Raises KernelError."""
    answers: list[Message | None] = []
    with _open() as channel:
        for query in queries:
            try:
                channel.send(query.data)
                (answer,) = messages(channel.recv(RECEIVE))
            except OSError as error:
                raise kernel_error(query.what, error) from error
            answers.append(None if answer.type == NLMSG_ERROR else answer)
    return answers


def dump(query: Request) -> list[Message]:
    """Return the messages that answer a dump. Raises KernelError, also if no answer was consistent."""
    return dump_by(query, lambda answer: answer)


def dump_by(query: Request, read: Callable[[Message], T | None]) -> list[T]:
    """Return what `read` makes of the messages that answer a dump, but for None. Raises KernelError as `dump`.

    There may be thousands, most of them of no concern: none is kept for longer than it takes to read it.
    """
    try:
        for _ in range(DUMP_ATTEMPTS):
            found: list[T] = []
            flags = 0
            with _open() as channel:
                channel.send(_numbered(query, 0, NLM_F_DUMP))
                for answer in _until_done(channel, query):
                    flags |= answer.flags
                    value = read(answer)
                    if value is not None:
                        found.append(value)
            if not flags & NLM_F_DUMP_INTR:
                return found
    except OSError as error:
        raise kernel_error(query.what, error) from error
    raise KernelError(f"{query.what}: it changed during each of {DUMP_ATTEMPTS} attempts")


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """Return the netlink attributes that start at `offset` (after the fixed part of the message), by type."""
    found = {}
    while offset + ATTRIBUTE.size <= len(data):
        length, kind = ATTRIBUTE.unpack_from(data, offset)
        if length < ATTRIBUTE.size:
            break
        found[kind & ATTRIBUTE_TYPE] = data[offset + ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def messages(datagram: bytes) -> Iterator[Message]:
    """Split what one recv() brought into its messages."""
    offset = 0
    while offset + HEADER.size <= len(datagram):
        length, kind, flags, sequence, _ = HEADER.unpack_from(datagram, offset)
        if length < HEADER.size:
            break
        yield Message(kind, flags, sequence, datagram[offset + HEADER.size : offset + length])
        offset += (length + 3) & ~3


def kernel_error(what: str, error: OSError, reason: str = "") -> KernelError:
    """Return the KernelError for a refused operation, with the OSError (its errno) as the cause."""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    result = KernelError(f"{what}: {name} ({reason or error.strerror})")
    result.__cause__ = error
    return result


def errno_of(error: KernelError) -> int | None:
    """Return the errno behind a KernelError, if the kernel gave one."""
    return error.__cause__.errno if isinstance(error.__cause__, OSError) else None


def _open() -> socket.socket:
    channel = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    channel.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
    channel.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
    channel.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, TIMEOUT)
    return channel


def _exchange(channel: socket.socket, batch: Sequence[Request]) -> list[KernelError | None]:
    """Send the requests as one datagram and wait for the answer to each."""
    channel.send(b"".join(_numbered(item, number, NLM_F_ACK) for number, item in enumerate(batch)))
    results: dict[int, KernelError | None] = {}
    while len(results) < len(batch):
        for answer in messages(channel.recv(RECEIVE)):
            if answer.type == NLMSG_ERROR:
                results[answer.sequence] = _result(batch[answer.sequence], answer)
    return [results[number] for number in range(len(batch))]


def _until_done(channel: socket.socket, query: Request) -> Iterator[Message]:
    while True:
        for answer in messages(channel.recv(RECEIVE)):
            if answer.type in (NLMSG_DONE, NLMSG_ERROR):
                if failure := _result(query, answer):
                    raise failure
                return
            yield answer


def _result(asked: Request, answer: Message) -> KernelError | None:
    """Read a struct nlmsgerr (or the error at the end of a dump): None if the kernel did it."""
    code = -ERROR.unpack_from(answer.body)[0]
    if code == 0 or code in asked.tolerated:
        return None
    reason = b""
    if answer.flags & NLM_F_ACK_TLVS:
        head = ERROR.size + (HEADER.size if answer.type == NLMSG_ERROR else 0)
        reason = attributes(answer.body, head).get(NLMSGERR_ATTR_MSG, b"")
    return kernel_error(asked.what, OSError(code, os.strerror(code)), reason.rstrip(b"\0").decode())


def _numbered(item: Request, number: int, flags: int) -> bytes:
    length, kind, own, _, port = HEADER.unpack_from(item.data)
    return HEADER.pack(length, kind, own | flags, number, port) + item.data[HEADER.size :]

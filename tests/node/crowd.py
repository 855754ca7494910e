"""Crowds: many flows at a time, and floods."""

from __future__ import annotations

import select
import selectors
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from tests.node import echo
from tests.node.machine import Netns
from tests.node.traffic import BUFFER, SO_RCVBUFFORCE

_UDP_HEADER = struct.Struct("!HHHH")
_AT_ONCE = 200  # questions; their answers fit into any buffer
_WORDS = struct.Struct("!H")
_IP_ID, _SOURCE_LOW, _SEQUENCE_LOW = 14 + 4, 14 + 14, 14 + 20 + 6  # offsets in a frame


@contextmanager
def tcp_server(netns: Netns, address: str, port: int) -> Iterator[echo.Server]:
    """Run a server as `echo.server` does for TCP, but for any number of connections; it closes when its peers do."""
    stop = threading.Event()
    with echo.bound(netns, echo.TCP, address, port) as listener, selectors.DefaultSelector() as ready:
        listener.listen(4096)
        listener.setblocking(False)
        ready.register(listener, selectors.EVENT_READ)
        thread = threading.Thread(target=_serve, args=(ready, listener, stop))
        thread.start()
        try:
            yield echo.Server(address, port, echo.TCP)
        finally:
            stop.set()
            thread.join()
            for key in list(ready.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]


def _serve(ready: selectors.BaseSelector, listener: socket.socket, stop: threading.Event) -> None:
    while not stop.is_set():
        for key, _ in ready.select(0.05):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is listener:
                connection, peer = listener.accept()
                ready.register(connection, selectors.EVENT_READ, f"{peer[0]} {peer[1]}\n".encode())
                continue
            try:
                heard = connection.recv(1024)
            except OSError:
                heard = b""
            if heard:
                connection.sendall(key.data)
            else:
                ready.unregister(connection)
                connection.close()


@contextmanager
def connecting(netns: Netns, to: echo.Server, count: int) -> Iterator[list[echo.Client]]:
    """Begin to connect that many times, and wait for none of them."""
    with ExitStack() as stack:
        sockets = netns.call(lambda: [socket.socket(echo.family(to.address), echo.TCP) for _ in range(count)])
        for each in sockets:
            stack.enter_context(each)
            each.setblocking(False)
            each.connect_ex((to.address, to.port))
        yield [echo.Client(each) for each in sockets]


def connected(clients: Sequence[echo.Client]) -> list[echo.Client]:
    """Return those that are connected now."""
    poll = select.poll()
    for each in clients:
        if each.socket.fileno() >= 0:  # not closed
            poll.register(each.socket, select.POLLOUT)
    writable = {number for number, events in poll.poll(0) if events == select.POLLOUT}
    return [each for each in clients if each.socket.fileno() in writable]


class Datagrams:
    """Flows of UDP over IPv4 to one server, each from a port of its own, by one raw socket: there may be any number."""

    def __init__(self, stack: ExitStack, netns: Netns, to: echo.Server) -> None:
        self._to = to
        self._wire = stack.enter_context(netns.call(self._open))

    @staticmethod
    def _open() -> socket.socket:
        wire = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
        wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        return wire

    def ask(self, ports: Sequence[int]) -> dict[int, int]:
        """Ask from each of the ports; return by port, of those that were answered, as whose port the server saw it."""
        answers: dict[int, int] = {}
        for start in range(0, len(ports), _AT_ONCE):
            some = ports[start : start + _AT_ONCE]
            for port in some:
                packet = _UDP_HEADER.pack(port, self._to.port, _UDP_HEADER.size + 1, 0) + b"?"
                self._wire.sendto(packet, (self._to.address, 0))
            self._collect(answers, len(answers) + len(some), patience=0.05)
        self._collect(answers, len(ports), patience=1)
        return answers

    def _collect(self, answers: dict[int, int], expected: int, *, patience: float) -> None:
        self._wire.settimeout(patience)
        while len(answers) < expected:
            try:
                packet = self._wire.recv(1024)
            except TimeoutError:
                return
            source, port, _, _ = _UDP_HEADER.unpack_from(packet, 20)
            if source == self._to.port:
                answers[port] = int(packet[28:].split()[1])


def syn_flood(netns: Netns, device: str, mac: str, targets: Sequence[tuple[str, int]], count: int) -> None:
    """Send that many SYNs in turns to the targets, each from another address of 203.0.0.0/16, out of a device.

    `count` is below 65,536 for each target.
    """
    each = count // len(targets)
    frames = [
        bytearray(
            bytes(Ether(dst=mac) / IP(src="203.0.0.0", dst=address, id=each) / TCP(sport=1234, dport=port, seq=each))
        )
        for address, port in targets
    ]

    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((device, 0))
            for number in range(each):
                for frame in frames:
                    # What the source address gains, identification and sequence number lose: the checksums stay right.
                    _WORDS.pack_into(frame, _SOURCE_LOW, number)
                    _WORDS.pack_into(frame, _IP_ID, each - number)
                    _WORDS.pack_into(frame, _SEQUENCE_LOW, each - number)
                    wire.send(frame)

    netns.call(send)

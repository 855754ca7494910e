"""Servers in a network namespace that tell who asks: what a masqueraded packet looks like from outside."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address

from scapy.layers.sctp import SCTP as SCTPHeader
from scapy.layers.sctp import SCTPChunkData

from tests.node.machine import Netns
from tests.node.traffic import BUFFER, SO_RCVBUFFORCE

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
GRE, ESP, SCTP = 47, 50, 132
SECONDS = 5.0


def family(address: str) -> socket.AddressFamily:
    """Return the socket family of an address."""
    return socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6


def bound(netns: Netns, kind: socket.SocketKind, address: str, port: int = 0) -> socket.socket:
    """Return a socket that lives in a namespace, with this address and port. The caller closes it."""

    def make() -> socket.socket:
        made = socket.socket(family(address), kind)
        if kind == TCP:  # two UDP sockets would share the port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        else:
            made.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        made.settimeout(SECONDS)
        made.bind((address, port))
        return made

    it: socket.socket = netns.call(make)
    return it


@dataclass
class Server:
    """Answers each datagram, and each first byte of a connection, with whom it came from, as "address port"."""

    address: str
    port: int
    kind: socket.SocketKind
    peers: list[tuple[str, int]] = field(default_factory=list)

    def serve(self, it: socket.socket, stop: threading.Event) -> None:
        """Answer until told to stop."""
        with ExitStack() as stack:
            it.settimeout(0.05)
            while not stop.is_set():
                try:
                    if self.kind == TCP:
                        connection, peer = it.accept()
                        stack.enter_context(connection)
                        threading.Thread(target=self._converse, args=(connection, peer), daemon=True).start()
                    else:
                        _, peer = it.recvfrom(65536)
                        it.sendto(self._told(peer), peer)
                except TimeoutError:
                    continue

    def _converse(self, connection: socket.socket, peer: tuple[str, int]) -> None:
        told = self._told(peer)
        try:
            while connection.recv(1):
                connection.sendall(told)
        except OSError:  # at the end of the test
            return

    def _told(self, peer: tuple[str, int]) -> bytes:
        self.peers.append((peer[0], peer[1]))
        return f"{peer[0]} {peer[1]}\n".encode()


@contextmanager
def server(netns: Netns, kind: socket.SocketKind, address: str, port: int) -> Iterator[Server]:
    """Run a server for the duration."""
    stop = threading.Event()
    it = Server(address, port, kind)
    with bound(netns, kind, address, port) as listener:
        if kind == TCP:
            listener.listen(1024)
        thread = threading.Thread(target=it.serve, args=(listener, stop))
        thread.start()
        try:
            yield it
        finally:
            stop.set()
            thread.join()


@dataclass
class Client:
    """One flow to a server."""

    socket: socket.socket

    def ask(self) -> tuple[str, int]:
        """Return whom the server takes us for. Raises TimeoutError if it does not answer."""
        self.socket.send(b"?")
        address, port = self.socket.recv(1024).split()
        return address.decode(), int(port)


@contextmanager
def client(netns: Netns, to: Server, *, port: int = 0, source: str = "") -> Iterator[Client]:
    """Connect to a server from a namespace."""
    here = source or ("0.0.0.0" if family(to.address) == socket.AF_INET else "::")  # noqa: S104
    with bound(netns, to.kind, here, port) as made:
        made.connect((to.address, to.port))
        yield Client(made)


def who(netns: Netns, to: Server, **options: int) -> tuple[str, int]:
    """Ask a server once, by a flow of its own, whom it takes us for."""
    with client(netns, to, **options) as it:  # type: ignore[arg-type]
        return it.ask()


def raw_socket(netns: Netns, address: str, protocol: int) -> socket.socket:
    """Make a socket for packets of one protocol of IP's, of an address's family."""

    def make() -> socket.socket:
        made = socket.socket(family(address), socket.SOCK_RAW, protocol)
        made.settimeout(SECONDS)
        return made

    return netns.call(make)


def sctp(source_port: int, destination_port: int) -> bytes:
    """Return an SCTP packet, with its CRC. Nobody's kernel has to know SCTP for that."""
    return bytes(SCTPHeader(sport=source_port, dport=destination_port, tag=7) / SCTPChunkData(data=b"payload"))


def raw_exchange(asker: Netns, answerer: Netns, address: str, protocol: int, question: bytes, answer: bytes) -> str:
    """Send a packet of any protocol of IP's to an address, and another one back; return who the first came from."""
    with raw_socket(asker, address, protocol) as ours, raw_socket(answerer, address, protocol) as theirs:
        theirs.bind((address, 0))
        ours.sendto(question, (address, 0))
        heard, peer = theirs.recvfrom(65536)
        assert heard.endswith(question)  # IPv4's header comes with it
        theirs.sendto(answer, (peer[0], 0))
        assert ours.recv(65536).endswith(answer)
    return str(peer[0])


def transfer(sender: Netns, receiver: Netns, address: str, size: int, *, seconds: float = 60) -> tuple[str, str, str]:
    """Send random bytes over TCP; return the hash of what was sent and of what arrived, and the sender as seen.

    Raises TimeoutError if nothing moves for some seconds.
    """
    block = hashlib.shake_128(address.encode()).digest(1 << 20)
    received, sent = hashlib.sha256(), hashlib.sha256()
    with bound(receiver, TCP, address, 5001) as listener:
        listener.listen()
        here = "0.0.0.0" if family(address) == socket.AF_INET else "::"  # noqa: S104
        with bound(sender, TCP, here) as source:
            source.connect((address, 5001))
            connection, peer = listener.accept()
            source.settimeout(seconds)

            def send() -> None:
                for number in range(size >> 20):
                    piece = number.to_bytes(8, "big") + block[8:]
                    sent.update(piece)
                    source.sendall(piece)
                source.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=send)
            thread.start()
            with connection:
                connection.settimeout(seconds)
                while piece := connection.recv(1 << 20):
                    received.update(piece)
            thread.join()
    return sent.hexdigest(), received.hexdigest(), peer[0]

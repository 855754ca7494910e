"""Traffic to pods that notices every packet that does not arrive."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from tests.node.machine import Netns, TestPod

RATE = 2000  # datagrams per second and direction
BULK_BYTES = 32768  # each
BUFFER = 64 << 20  # bytes; holds all datagrams of a test, so that no receiver can be too slow
SO_RCVBUFFORCE = 33
# struct tcp_info (linux/tcp.h): retransmitted segments, and those that the receiver said it had already
TOTAL_RETRANS, DSACK_DUPS = 100, 216


@dataclass
class Datagrams:
    """A UDP flow of numbered datagrams."""

    sender: socket.socket
    receiver: socket.socket
    sent: int = 0

    def send(self) -> None:
        """Send the next datagram."""
        self.sender.send(struct.pack("!I", self.sent))
        self.sent += 1

    def lost(self) -> set[int]:
        """Return the numbers of those that did not arrive."""
        missing = set(range(self.sent))
        self.receiver.settimeout(1)
        while missing:
            try:
                missing.remove(struct.unpack("!I", self.receiver.recv(4))[0])
            except TimeoutError:
                break
        return missing


@dataclass
class Bulk:
    """A TCP flow."""

    sender: socket.socket
    receiver: socket.socket
    sent: int = 0
    received: int = 0
    chunk: bytes = field(default=bytes(BULK_BYTES), repr=False)

    def send(self) -> None:
        """Send the next piece."""
        self.sender.sendall(self.chunk)
        self.sent += len(self.chunk)

    def receive(self) -> None:
        """Receive until the end."""
        buffer = bytearray(1 << 20)
        while size := self.receiver.recv_into(buffer):
            self.received += size

    def lost_segments(self) -> int:
        """Return how many segments had to be sent again because the first one did not arrive."""
        info = self.sender.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        retransmitted, unneeded = (struct.unpack_from("=I", info, at)[0] for at in (TOTAL_RETRANS, DSACK_DUPS))
        return int(retransmitted - unneeded)

    def assert_nothing_lost(self) -> None:
        """Assert that every byte arrived, and that TCP had nothing to make good."""
        assert self.received == self.sent > 0, f"received {self.received} of {self.sent} bytes"
        segments = self.lost_segments()
        assert segments <= 0, f"TCP sent {segments} lost segments again"


def assert_arrived(flows: Sequence[Datagrams], rate: int = RATE) -> None:
    """Assert that every datagram arrived, and that they were enough to tell."""
    sent = sum(flow.sent for flow in flows)
    lost = sum(len(flow.lost()) for flow in flows)
    assert lost == 0, f"lost {lost} of {sent} datagrams"
    assert sent > rate, f"{sent} datagrams are too few to tell"


@contextmanager
def lossless_traffic(a: TestPod, b: TestPod, rate: int = RATE) -> Iterator[None]:
    """Let traffic between pods flow during the block, and assert at its end that nothing was lost.

    `rate` is that of each of four flows of datagrams, and twice that of TCP's writes, per second.
    """
    with ExitStack() as stack:
        ways = [(a, b, 0), (b, a, 0), (a, b, 1), (b, a, 1)]
        flows = [
            _datagrams(stack, source.netns, target, family, port=9000 + number)
            for number, (source, target, family) in enumerate(ways)
        ]
        bulk = _bulk(stack, a, b)
        receiver = threading.Thread(target=bulk.receive)
        receiver.start()
        try:
            with _sending(rate, flows), _sending(rate // 2, [bulk]):
                yield
        finally:
            bulk.sender.shutdown(socket.SHUT_WR)
            receiver.join()
        assert_arrived(flows, rate)
        bulk.assert_nothing_lost()


@contextmanager
def lossless_stream(source: Netns, pods: Iterable[TestPod]) -> Iterator[None]:
    """Let a host send datagrams to pods during the block, and assert at its end that nothing was lost."""
    with ExitStack() as stack:
        flows = [_datagrams(stack, source, pod, 0, port=9020) for pod in pods]
        with _sending(RATE, flows):
            yield
        assert_arrived(flows)


@contextmanager
def _sending(rate: int, flows: Sequence[Datagrams | Bulk]) -> Iterator[None]:
    """Send on each of the flows, `rate` times a second, during the block; late ones are made up for."""
    stop = threading.Event()

    def send() -> None:
        start, done = time.monotonic(), 0
        while not stop.is_set():
            due = int((time.monotonic() - start) * rate)
            for flow in flows:
                for _ in range(due - done):
                    flow.send()
            done = due
            time.sleep(1 / rate)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        stop.set()
        sender.join()


def _datagrams(stack: ExitStack, source: Netns, target: TestPod, family: int, *, port: int) -> Datagrams:
    receiver = _socket(stack, target.netns, family, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    receiver.bind((target.addresses[family], port))
    sender = _socket(stack, source, family, socket.SOCK_DGRAM)
    sender.connect((target.addresses[family], port))
    return Datagrams(sender, receiver)


def _bulk(stack: ExitStack, source: TestPod, target: TestPod) -> Bulk:
    listener = _socket(stack, target.netns, 0, socket.SOCK_STREAM)
    listener.bind((target.addresses[0], 9010))
    listener.listen()
    sender = _socket(stack, source.netns, 0, socket.SOCK_STREAM)
    sender.connect((target.addresses[0], 9010))
    receiver, _ = listener.accept()
    return Bulk(sender, stack.enter_context(receiver))


def _socket(stack: ExitStack, netns: Netns, family: int, kind: socket.SocketKind) -> socket.socket:
    """Make a socket in the namespace; it stays there, whoever uses it."""
    made: socket.socket = netns.call(lambda: socket.socket((socket.AF_INET, socket.AF_INET6)[family], kind))
    made.settimeout(30)
    return stack.enter_context(made)

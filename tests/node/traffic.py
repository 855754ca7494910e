"""Traffic between two pods that notices every packet that does not arrive."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from tests.node.machine import TestPod

RATE = 2000  # datagrams per second and direction
BULK_RATE = 1000  # writes per second
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


@dataclass
class Traffic:
    """Datagrams in both directions and families, and a bulk flow."""

    datagrams: list[Datagrams]
    bulk: Bulk
    stop: threading.Event = field(default_factory=threading.Event)

    def send(self, rate: int, flows: list[Datagrams] | list[Bulk]) -> None:
        """Send on each of the flows, `rate` times a second, until told to stop; late ones are made up for."""
        start, done = time.monotonic(), 0
        while not self.stop.is_set():
            due = int((time.monotonic() - start) * rate)
            for flow in flows:
                for _ in range(due - done):
                    flow.send()
            done = due
            time.sleep(1 / rate)

    def assert_nothing_lost(self) -> None:
        """Assert that every datagram and every byte arrived, and that TCP had nothing to make good."""
        sent = sum(flow.sent for flow in self.datagrams)
        lost = sum(len(flow.lost()) for flow in self.datagrams)
        assert lost == 0, f"lost {lost} of {sent} datagrams"
        assert sent > RATE, f"{sent} datagrams are too few to tell"
        assert self.bulk.received == self.bulk.sent > 0, f"received {self.bulk.received} of {self.bulk.sent} bytes"
        segments = self.bulk.lost_segments()
        assert segments <= 0, f"TCP sent {segments} lost segments again"


@contextmanager
def lossless_traffic(a: TestPod, b: TestPod) -> Iterator[None]:
    """Let traffic flow during the block, and assert at its end that nothing was lost."""
    with ExitStack() as stack:
        ways = [(a, b, 0), (b, a, 0), (a, b, 1), (b, a, 1)]
        flows = [_datagrams(stack, *way, port=9000 + number) for number, way in enumerate(ways)]
        it = Traffic(flows, _bulk(stack, a, b))
        receiver = threading.Thread(target=it.bulk.receive)
        senders = [
            threading.Thread(target=it.send, args=(RATE, it.datagrams)),
            threading.Thread(target=it.send, args=(BULK_RATE, [it.bulk])),
        ]
        for thread in (receiver, *senders):
            thread.start()
        try:
            yield
        finally:
            it.stop.set()
            for thread in senders:
                thread.join()
            it.bulk.sender.shutdown(socket.SHUT_WR)
            receiver.join()
        it.assert_nothing_lost()


def _datagrams(stack: ExitStack, source: TestPod, target: TestPod, family: int, *, port: int) -> Datagrams:
    receiver = _socket(stack, target, family, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    receiver.bind((target.addresses[family], port))
    sender = _socket(stack, source, family, socket.SOCK_DGRAM)
    sender.connect((target.addresses[family], port))
    return Datagrams(sender, receiver)


def _bulk(stack: ExitStack, source: TestPod, target: TestPod) -> Bulk:
    listener = _socket(stack, target, 0, socket.SOCK_STREAM)
    listener.bind((target.addresses[0], 9010))
    listener.listen()
    sender = _socket(stack, source, 0, socket.SOCK_STREAM)
    sender.connect((target.addresses[0], 9010))
    receiver, _ = listener.accept()
    return Bulk(sender, stack.enter_context(receiver))


def _socket(stack: ExitStack, pod: TestPod, family: int, kind: socket.SocketKind) -> socket.socket:
    """Make a socket in the pod; it stays there, whoever uses it."""
    made: socket.socket = pod.netns.call(lambda: socket.socket((socket.AF_INET, socket.AF_INET6)[family], kind))
    made.settimeout(30)
    return stack.enter_context(made)

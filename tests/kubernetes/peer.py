"""What the tests' pods run: it answers others, and asks them when told to. Standard library only, for it runs alone.

    python3 peer.py serve PORT          answers on PORT, by TCP (HTTP) and UDP
    python3 peer.py ask PORT REQUESTS   has the server of this pod do what a JSON list asks for; prints the answers
    python3 peer.py call REQUESTS       does it itself, without a server

A request is {"kind": "tcp" | "udp" | "ping" | "bytes" | "source", "address": …, "port": …, "count": …} or, for servers,
{"kind": "watch", …}, which begins something that goes on until {"kind": "report"}: one connection that is to last, and
new ones and datagrams all the time.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECONDS = 5.0
_BLOCK = bytes(range(256)) * 256
_LINE_SECONDS = 0.05

Document = dict[str, Any]


def content(count: int) -> Iterator[bytes]:
    """Yield `count` bytes, the same each time."""
    for start in range(0, count, len(_BLOCK)):
        yield _BLOCK[: count - start]


class Watch:
    """One connection with a line every 50 ms, new ones and datagrams all the while; counts what goes wrong."""

    def __init__(self, address: str, port: int) -> None:
        self.target = f"{address}:{port}"
        self.lines = self.asked = self.datagrams = 0
        self.faults: list[str] = []
        self._address, self._port = address, port
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._read, self._knock, self._send)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> Document:
        """End, and return what was seen."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(SECONDS)
        counts = {"lines": self.lines, "asked": self.asked, "datagrams": self.datagrams}
        return {"target": self.target, **counts, "faults": self.faults[:5]}

    def _read(self) -> None:
        try:
            with _get(self._address, self._port, "/lines") as answer:
                while not self._stopped.is_set():
                    if answer.readline() != b"%d\n" % self.lines:
                        self.faults.append(f"lasting connection: ended after {self.lines} lines")
                        return
                    self.lines += 1
        except OSError as error:
            self.faults.append(f"lasting connection: after {self.lines} lines {error!r}")

    def _knock(self) -> None:
        while not self._stopped.wait(_LINE_SECONDS):
            try:
                tcp(self._address, self._port)
                self.asked += 1
            except OSError as error:
                self.faults.append(f"connection {self.asked}: {error!r}")

    def _send(self) -> None:
        """Of one flow of datagrams none may be lost: what TCP would send again shows here."""
        with socket.socket(_family(self._address), socket.SOCK_DGRAM) as asker:
            asker.settimeout(SECONDS)
            asker.connect((self._address, self._port))
            while not self._stopped.wait(_LINE_SECONDS):
                try:
                    asker.send(b"who")
                    asker.recv(2048)
                    self.datagrams += 1
                except OSError as error:
                    self.faults.append(f"datagram {self.datagrams}: {error!r}")


class Server(ThreadingHTTPServer):
    """Answers by both families."""

    address_family = socket.AF_INET6 if socket.has_ipv6 and Path("/proc/net/if_inet6").exists() else socket.AF_INET
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        self.watches: list[Watch] = []
        super().__init__(("::" if self.address_family == socket.AF_INET6 else "0.0.0.0", port), Answer)  # noqa: S104


class Answer(BaseHTTPRequestHandler):
    """/who, /bytes/COUNT, /lines; and POST /ask."""

    server: Server

    def do_GET(self) -> None:
        """Answer one of the above."""
        _, kind, *rest = self.path.split("/")
        self.send_response(200)
        if kind == "who":
            body = who(self.client_address[0])
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "who":
            self.wfile.write(body)
        elif kind == "bytes":
            for block in content(int(rest[0])):
                self.wfile.write(block)
        elif kind == "lines":
            self._write_lines()

    def do_POST(self) -> None:
        """Do what the requests ask for."""
        requests = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps([self._carry_out(request) for request in requests]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _write_lines(self) -> None:
        number = 0
        while True:
            self.wfile.write(b"%d\n" % number)
            number += 1
            time.sleep(_LINE_SECONDS)

    def _carry_out(self, request: Document) -> Document:
        if request["kind"] == "watch":
            self.server.watches.append(Watch(request["address"], request["port"]))
            return {}
        if request["kind"] == "report":
            watches, self.server.watches = self.server.watches, []
            return {"watches": [watch.stop() for watch in watches]}
        return carry_out(request)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def carry_out(request: Document) -> Document:
    """Do what one request asks for; return the answer."""
    kind, address, port = request["kind"], request["address"], request.get("port", 0)
    try:
        if kind == "bytes":
            return fetch(address, port, request["count"])
        return {"tcp": tcp, "udp": udp, "ping": ping, "source": source}[kind](address, port)
    except OSError as error:
        return {"error": repr(error)}


def who(client: str) -> bytes:
    """Return who answers whom."""
    return json.dumps({"name": socket.gethostname(), "client": client.removeprefix("::ffff:")}).encode()


def tcp(address: str, port: int) -> Document:
    """Ask by TCP, on a connection of its own."""
    with _get(address, port, "/who") as answer:
        return dict(json.loads(answer.read()))


def udp(address: str, port: int) -> Document:
    """Ask by UDP; three times, for a datagram may be lost."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as asker:
        asker.settimeout(SECONDS / 3)
        asker.connect((address, port))
        for _ in range(3):
            asker.send(b"who")
            try:
                return dict(json.loads(asker.recv(2048)))
            except TimeoutError:
                continue
        raise TimeoutError("no answer by UDP")


def ping(address: str, _: int) -> Document:
    """Ask by an IPv4 ICMP echo; needs CAP_NET_RAW, which containers have as a rule."""
    number = os.getpid() & 0xFFFF
    head = struct.pack("!BBHHH", 8, 0, 0, number, 1)
    total = sum(struct.unpack("!4H", head))
    echo = head[:2] + struct.pack("!H", ~((total >> 16) + (total & 0xFFFF)) & 0xFFFF) + head[4:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as asker:
        asker.settimeout(SECONDS)
        asker.sendto(echo, (address, 0))
        while True:
            answer, (sender, _) = asker.recvfrom(2048)
            if answer[20] == 0 and sender == address and answer[24:28] == echo[4:8]:
                return {"client": sender}


def source(address: str, port: int) -> Document:
    """Tell the own address that leads there."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as asker:
        asker.connect((address, port))
        return {"client": asker.getsockname()[0]}


def fetch(address: str, port: int, count: int) -> Document:
    """Fetch so many bytes, and compare them; tell how long it took."""
    begin = time.monotonic()
    with _get(address, port, f"/bytes/{count}") as answer:
        for expected in content(count):
            if answer.read(len(expected)) != expected:
                raise OSError("other bytes than were sent")
        return {"bytes": count, "seconds": time.monotonic() - begin}


def _get(address: str, port: int, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(address, port, timeout=SECONDS)
    connection.request("GET", path)
    return connection.getresponse()


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def serve_udp(port: int) -> None:
    """Answer every datagram with who answers whom."""
    family = Server.address_family
    with socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))  # noqa: S104
        while True:
            _, client = server.recvfrom(2048)
            server.sendto(who(client[0]), client)


def main() -> None:
    """Serve, ask the server of this pod, or call."""
    if sys.argv[1] == "call":
        print(json.dumps([carry_out(request) for request in json.loads(sys.argv[2])]))
        return
    port = int(sys.argv[2])
    if sys.argv[1] == "serve":
        threading.Thread(target=serve_udp, args=(port,), daemon=True).start()
        Server(port).serve_forever()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", "/ask", sys.argv[3])
    print(connection.getresponse().read().decode())


if __name__ == "__main__":
    main()

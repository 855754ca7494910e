"""A web server outside the node, which logs whom it serves."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv6Address

from tests.node.machine import Netns

PORT = 8080
PAGE = b"the world\n"


class WorldServer(ThreadingHTTPServer):
    """Serves one page by both families; `clients` are the addresses that asked for it, in order."""

    address_family = socket.AF_INET6  # IPv4 clients show as v4-mapped
    daemon_threads = True

    def __init__(self) -> None:
        self.clients: list[str] = []
        super().__init__(("::", PORT), _Page)


class _Page(BaseHTTPRequestHandler):
    server: WorldServer

    def do_GET(self) -> None:
        """Note the client, and answer."""
        address = IPv6Address(self.client_address[0])
        self.server.clients.append(str(address.ipv4_mapped or address))
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the log is `clients`."""


@contextmanager
def world_server(world: Netns) -> Iterator[WorldServer]:
    """Run a server in the given namespace."""
    with world.call(WorldServer) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()

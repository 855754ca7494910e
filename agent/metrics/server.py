"""Metrics and probes over HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from agent.node import Readiness
from agent.state import KernelError
from agent.store import StoreError

_CONNECTIONS = 64  # at a time, from the node itself, and as many from elsewhere


class _ThreadingServer(ThreadingMixIn, WSGIServer):
    """Serves some at a time; one more is hung up on, for anybody may open connections.

    Those of the node itself, kubelet's probes among them, have room of their own: nobody in a pod, or in the world,
    shall have the agent killed by holding all there is.
    """

    daemon_threads = True
    request_queue_size = 128  # those that come at once; the default of 5 makes others wait for a second

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # as the base class has it
        self._rooms = {is_local: threading.BoundedSemaphore(_CONNECTIONS) for is_local in (False, True)}
        super().__init__(*args, **kwargs)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        if self._room(client_address).acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room(client_address).release()

    def _room(self, client_address: Any) -> threading.BoundedSemaphore:  # noqa: ANN401
        address = ip_address(client_address[0])
        mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
        return self._rooms[(mapped or address).is_loopback]

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # not HTTPServer's: that asks DNS for this host's name, which may take for ever
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _IPv6Server(_ThreadingServer):
    address_family = socket.AF_INET6

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # of "[::]", whatever the node's default is
        super().server_bind()


class _QuietHandler(WSGIRequestHandler):
    timeout = 5.0  # seconds to wait for the request

    def log_message(self, format: str, *args: object) -> None:  # the base class's name
        """Scrapes are not news."""


def serve(address: str, registry: CollectorRegistry, readiness: Readiness) -> WSGIServer:
    """Serve /metrics, /healthz and /readyz on "host:port" or "[host]:port" (IPv6), in a thread. Raises OSError.

    "*:port" is all addresses of both families. /healthz says no only where another agent may do better, since the loop
    hangs; /readyz while ADD cannot be served, whatever the cause. "/readyz?exclude=exhausted" is for who waits for a
    node to work, as a rolling update does: it says yes though all addresses are in use. `shutdown()` ends the server.
    """
    metrics_app = make_wsgi_app(registry)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return _scrape(metrics_app, environ, start_response)
        if path == "/healthz":
            return _probed(start_response, readiness.hung(), "ok")
        if path == "/readyz":
            reason = readiness.unwell if environ["QUERY_STRING"] == "exclude=exhausted" else readiness.reason
            return _probed(start_response, reason, "ready")
        return _answer(start_response, "404 Not Found", "there are /metrics, /healthz and /readyz")

    host, _, port = address.rpartition(":")
    if host == "*":
        host = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"  # noqa: S104  # who configures it wants it
    kind = _IPv6Server if host.startswith("[") else _ThreadingServer
    server = make_server(host.strip("[]"), int(port), app, kind, _QuietHandler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server


def _scrape(app: WSGIApplication, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    try:
        return app(environ, start_response)
    except (KernelError, StoreError) as error:
        return _answer(start_response, "500 Internal Server Error", str(error))


def _probed(start_response: StartResponse, trouble: str, well: str) -> Iterable[bytes]:
    return _answer(start_response, "503 Service Unavailable" if trouble else "200 OK", trouble or well)


def _answer(start_response: StartResponse, status: str, text: str) -> Iterable[bytes]:
    start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode() + b"\n"]

"""The API server itself: HTTP/1.1 over TLS, one thread for each connection, and its faults."""

from __future__ import annotations

import base64
import secrets
import socket
import ssl
import threading
from contextlib import suppress
from ipaddress import IPv4Address
from pathlib import Path
from socketserver import TCPServer
from typing import Any

import yaml

from tests.node.api.handler import RULES, Connections, Faults, Handler, Seen
from tests.node.api.objects import Objects
from tests.node.machine import Netns, run

_LOOPBACKS = (1 << 24) - 2


class ApiServer:
    """Serves `objects` in a network namespace, by default the test's own, at one port for all its life.

    Its loopback address is one that nobody else uses: between a stop and the next start, the port could be anybody's.
    """

    def __init__(self, directory: Path, netns: Netns | None = None) -> None:
        self.objects = Objects()
        self.faults = Faults()
        self.tokens = {"token-1"}
        self.rules = set(RULES)
        self.seen: list[Seen] = []
        self.watches = 0
        self._directory = directory
        self._netns = netns
        self._address = (str(IPv4Address("127.0.0.1") + secrets.randbelow(_LOOPBACKS)), 6443 if netns else 0)
        self._certify()
        self._server: _Server | None = None
        self.generation = 0  # of watches: those of an older one end
        self.bookmarks = 0  # that a watch shall have sent
        self.bookmarked = 0  # that one has sent

    def _certify(self) -> None:
        name = "/CN=podlane-test-api"
        run(
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", name, "-addext", f"subjectAltName=IP:{self._address[0]}"),
            *("-keyout", str(self._directory / "key.pem"), "-out", str(self._directory / "ca.crt")),
        )

    @property
    def url(self) -> str:
        """Where it is."""
        host, port = self._address
        return f"https://{host}:{port}"

    def write_service_account(self) -> Path:
        """Write what kubelet mounts into a pod; the token's file is the same as the kubeconfig's."""
        self.write_token("token-1")
        (self._directory / "namespace").write_text("kube-system")
        return self._directory

    def write_kubeconfig(self, *, token_file: bool = True) -> Path:
        """Write a kubeconfig for the token of the moment, which is in a file of its own, or in the kubeconfig."""
        self.write_token("token-1")
        ca = base64.b64encode((self._directory / "ca.crt").read_bytes()).decode()
        token = {"tokenFile": str(self._directory / "token")} if token_file else {"token": "token-1"}
        path = self._directory / "kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "certificate-authority-data": ca}}],
            "users": [{"name": "agent", "user": token}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "agent"}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def write_token(self, token: str) -> None:
        """Write the token file, as kubelet does before a token expires."""
        (self._directory / "token").write_text(token)

    def start(self) -> None:
        """Listen and serve."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._directory / "ca.crt", self._directory / "key.pem")

        def listen() -> _Server:
            return _Server(self, self._address, context)

        self._server = self._netns.call(listen) if self._netns else listen()
        self._address = (self._address[0], self._server.server_port)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        """Stop listening, and break all connections."""
        if self._server is not None:
            self.faults.frozen = False
            self.break_watches()
            self._server.shutdown()
            self._server.break_connections()
            self._server.server_close()
            self._server = None

    def break_watches(self) -> None:
        """End all watches, as the timeout of a load balancer does."""
        with self.objects.changed:
            self.generation += 1
            self.objects.changed.notify_all()

    def bookmark(self) -> None:
        """Have the one watch told the version of the moment, as a real server does about every minute."""
        with self.objects.changed:
            self.bookmarks += 1
            self.objects.changed.notify_all()
            assert self.objects.changed.wait_for(lambda: self.bookmarked == self.bookmarks, 30), "no watch"

    def requests(self, verb: str, resource: str = "nodes") -> list[Seen]:
        """Return the requests of one kind so far."""
        return [each for each in list(self.seen) if (each.verb, each.resource) == (verb, resource)]


class _Server(Connections):
    daemon_threads = True

    def __init__(self, api: ApiServer, address: tuple[str, int], context: ssl.SSLContext) -> None:
        self.api = api
        self._context = context
        self._open: set[socket.socket] = set()
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # without HTTPServer's, which asks a resolver for the address's name
        self.server_port = self.server_address[1]

    def get_request(self) -> tuple[Any, Any]:
        raw, address = super().get_request()
        wrapped = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        self._open.add(wrapped)
        return wrapped, address

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401  # as the base class has it
        self._open.discard(request)
        super().shutdown_request(request)

    def break_connections(self) -> None:
        for each in list(self._open):
            with suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # clients may go at any time
        pass

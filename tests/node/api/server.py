"""The API server itself: HTTP/1.1 over TLS, one thread for each connection, and its faults."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.node.api.objects import Object, Objects, Refusal
from tests.node.machine import Netns, run

RULES = frozenset(
    {
        ("GET", "nodes"),
        ("LIST", "nodes"),
        ("WATCH", "nodes"),
        ("PATCH", "nodes"),
        ("PATCH", "nodes/status"),
        ("POST", "events"),
    }
)
"""The verbs that the agent has."""


@dataclass
class Faults:
    """What goes wrong. Tests set it; the server obeys."""

    refusals: deque[int] = field(default_factory=deque)
    """HTTP statuses that the next requests get, one each."""
    cuts: deque[int] = field(default_factory=deque)
    """For the next replies, one each: the number of bytes after which the connection breaks."""
    pause: float = 0.0
    """Seconds between two pieces of a reply, which are small."""
    frozen: bool = False
    """Requests are accepted and never answered."""
    before: Callable[[str, dict[str, str]], None] = lambda _verb, _query: None
    """Called with each request's verb and query before it is answered."""


@dataclass(frozen=True)
class Seen:
    """A request: what is asked for ("LIST", "WATCH", or the method), of which resource, and how."""

    verb: str
    resource: str
    query: dict[str, str]
    token: str
    status: int


class ApiServer:
    """Serves `objects` in a network namespace, by default the test's own, at one port for all its life."""

    def __init__(self, directory: Path, netns: Netns | None = None, address: str = "127.0.0.1") -> None:
        self.objects = Objects()
        self.faults = Faults()
        self.tokens = {"token-1"}
        self.rules = set(RULES)
        self.seen: list[Seen] = []
        self.watches = 0
        self._directory = directory
        self._netns = netns
        self._address = (address, 6443 if netns else 0)
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
        return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"

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


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, api: ApiServer, address: tuple[str, int], context: ssl.SSLContext) -> None:
        self.api = api
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._context = context
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

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


class _Broken(Exception):
    """The connection breaks here, because a fault says so."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    _budget = -1

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_PATCH(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        api = self.server.api
        while api.faults.frozen:
            time.sleep(0.05)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        resource, name = _resource(url.path)
        verb = self.command
        if verb == "GET" and not name:
            verb = "WATCH" if query.get("watch") == "true" else "LIST"
        self._budget = api.faults.cuts.popleft() if api.faults.cuts else -1
        api.faults.before(verb, query)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        try:
            self._check(verb, resource, token)
            reply: Object | None = None if verb == "WATCH" else self._answer(verb, resource, name, query, body)
            status = 201 if verb == "POST" else 200
        except Refusal as refusal:
            status, reply = refusal.code, refusal.status()
        api.seen.append(Seen(verb, resource, query, token, status))
        try:
            if reply is None:
                self._watch(query)
            else:
                self._reply(status, reply)
        except _Broken:
            self.close_connection = True
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)

    def _check(self, verb: str, resource: str, token: str) -> None:
        api = self.server.api
        if token not in api.tokens:
            raise Refusal(401, "Unauthorized", "Unauthorized")
        if (verb, resource) not in api.rules:
            raise Refusal(403, "Forbidden", f'{resource} is forbidden: User "agent" cannot {verb.lower()} them')
        if api.faults.refusals:
            code = api.faults.refusals.popleft()
            raise Refusal(code, "InternalError", "etcdserver: leader changed")

    def _answer(self, verb: str, resource: str, name: str, query: dict[str, str], body: bytes) -> Object:
        objects = self.server.api.objects
        if verb == "LIST":
            return objects.page(int(query.get("limit", "0")), query.get("continue", ""))
        if verb == "GET":
            return objects.get(name)
        if verb == "PATCH":
            kind = self.headers["Content-Type"]
            return objects.patch(name, json.loads(body), kind, status=resource == "nodes/status")
        event: Object = json.loads(body)
        objects.events.append(event)
        return event

    def _reply(self, status: int, reply: Object) -> None:
        content = json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self._write(content)

    def _watch(self, query: dict[str, str]) -> None:
        api = self.server.api
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with api.objects.changed:
            api.watches += 1
        try:
            self._follow(api, query)
            self._write(b"0\r\n\r\n")
        finally:
            with api.objects.changed:
                api.watches -= 1

    def _follow(self, api: ApiServer, query: dict[str, str]) -> None:
        """Send what changes, until the client's time is over, or the watch is broken."""
        version, generation, bookmarks = int(query["resourceVersion"]), api.generation, api.bookmarks
        try:
            api.objects.check(version)
        except Refusal as refusal:
            self._send("ERROR", refusal.status())
            return
        until = time.monotonic() + float(query.get("timeoutSeconds", "1800"))
        while api.generation == generation and time.monotonic() < until:
            with api.objects.changed:
                changes = api.objects.since(version)
                version = api.objects.version
                if not changes and api.bookmarks == bookmarks:
                    api.objects.changed.wait(0.2)
                    continue
            for _, kind, node in changes:
                self._send(kind, {"kind": "Node", "apiVersion": "v1", **node})
            if api.bookmarks != bookmarks:
                bookmarks = api.bookmarks
                self._bookmark(query, version)
                with api.objects.changed:
                    api.bookmarked = bookmarks
                    api.objects.changed.notify_all()
        self._bookmark(query, version)

    def _bookmark(self, query: dict[str, str], version: int) -> None:
        if query.get("allowWatchBookmarks") == "true":
            bookmark = {"kind": "Node", "apiVersion": "v1", "metadata": {"resourceVersion": str(version)}}
            self._send("BOOKMARK", {**bookmark, "spec": {}, "status": {}})

    def _send(self, kind: str, it: Object) -> None:
        line = json.dumps({"type": kind, "object": it}).encode() + b"\n"
        self._write(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def _write(self, content: bytes) -> None:
        """Write as slowly, and as much, as the faults let it."""
        pause = self.server.api.faults.pause
        size = 500 if pause else len(content)
        for start in range(0, len(content), size):
            piece = content[start : start + size]
            if 0 <= self._budget < len(piece):
                self.wfile.write(piece[: self._budget])
                raise _Broken
            self._budget -= len(piece) if self._budget >= 0 else 0
            self.wfile.write(piece)
            if pause:
                time.sleep(pause)


def _resource(path: str) -> tuple[str, str]:
    """Return the resource, with its subresource, and the name, if any, of a path."""
    parts = path.strip("/").split("/")
    if parts[:3] == ["api", "v1", "namespaces"] and parts[4:] == ["events"]:
        return "events", ""
    if parts[:3] == ["api", "v1", "nodes"]:
        name, *sub = parts[3:] or [""]
        return "/".join(["nodes", *sub]), name
    return path, ""

"""What the API server answers to each request, and what goes wrong with that."""

from __future__ import annotations

import json
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from tests.node.api.objects import Object, Refusal

if TYPE_CHECKING:
    from tests.node.api.server import ApiServer

RULES = frozenset(
    {
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
    errors: deque[int] = field(default_factory=deque)
    """HTTP statuses of the events of type ERROR by which the next watches end, one each."""
    cuts: deque[int] = field(default_factory=deque)
    """For the next replies, one each: the number of bytes after which the connection breaks."""
    pause: float = 0.0
    """Seconds between two pieces of a reply, which are small."""
    frozen: bool = False
    """Requests are accepted and never answered."""
    before: Callable[[str, dict[str, str]], None] = lambda _verb, _query: None
    """Called with each request's verb and query before it is answered."""

    def check_watch(self) -> None:
        """Check that a watch does not end by an error. Raises Refusal."""
        if self.errors:
            raise Refusal(self.errors.popleft(), "InternalError", "etcdserver: leader changed")


@dataclass(frozen=True)
class Seen:
    """A request: what is asked for ("LIST", "WATCH", or the method), of which resource, and how."""

    verb: str
    resource: str
    query: dict[str, str]
    token: str
    status: int


class Connections(ThreadingHTTPServer):
    """The server of the handlers, which find in it whom they work for."""

    api: ApiServer


class _Broken(Exception):
    """The connection breaks here, because a fault says so."""


class Handler(BaseHTTPRequestHandler):
    """Serves one connection."""

    protocol_version = "HTTP/1.1"
    server: Connections
    _budget = -1

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """See `_serve`."""
        self._serve()

    def do_PATCH(self) -> None:
        """See `_serve`."""
        self._serve()

    def do_POST(self) -> None:
        """See `_serve`."""
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
        content = json.dumps(reply, ensure_ascii=False).encode()
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
            api.faults.check_watch()
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
        line = json.dumps({"type": kind, "object": it}, ensure_ascii=False).encode() + b"\n"
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

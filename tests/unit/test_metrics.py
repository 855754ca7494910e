"""The metrics server by itself: what it serves is in tests/packet/test_collector.py and tests/node/test_metrics.py."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from wsgiref.simple_server import WSGIServer

import pytest
from prometheus_client import CollectorRegistry

from agent.metrics import serve
from agent.node import Readiness


@contextmanager
def served(address: str, readiness: Readiness) -> Iterator[WSGIServer]:
    """Run a server."""
    server = serve(address, CollectorRegistry(), readiness)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def get(server: WSGIServer, path: str) -> tuple[int, str]:
    """Return status and text of an answer."""
    connection = http.client.HTTPConnection(str(server.server_address[0]), server.server_port, timeout=10)
    with closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1:0"), (socket.AF_INET6, "[::1]:0")])
def test_no_name_is_looked_up(monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily, address: str) -> None:
    """The server is there at once, however slow the node's resolver is: it asks nobody for the name of its address."""

    def ask(*_: object) -> str:
        raise AssertionError("asked the resolver")

    for name in ("getfqdn", "gethostbyaddr", "getnameinfo"):
        monkeypatch.setattr(socket, name, ask)
    with served(address, Readiness()) as server:
        assert server.address_family == family
        assert get(server, "/healthz") == (200, "ok\n")


def test_flood_of_connections() -> None:
    """However many connections any process of the node's opens, few cost a thread; when they end, all is as before."""
    with served("127.0.0.1:0", Readiness()) as server:
        before, idle = threading.active_count(), []
        for _ in range(200):
            idle.append(socket.create_connection(("127.0.0.1", server.server_port)))
        assert [each for each in idle[64:] if each.recv(1)] == []  # hung up on
        assert threading.active_count() - before <= 64
        for each in idle:
            each.close()
        assert wait_for(lambda: threading.active_count() <= before)
        assert get(server, "/healthz") == (200, "ok\n")


def test_a_loop_that_hangs() -> None:
    """Then the agent is neither alive nor ready."""
    with served("127.0.0.1:0", Readiness("", "", hung=lambda: "it hangs")) as server:
        assert get(server, "/healthz") == (503, "it hangs\n")
        assert get(server, "/readyz") == (503, "it hangs\n")


@pytest.mark.parametrize("trouble", ["trouble", "unaddressed", "exhausted", "refused", "no_tunnel"])
def test_what_no_restart_mends(trouble: str) -> None:
    """An agent that cannot serve ADD, for whatever other reason, is alive: another one would be no better off."""
    readiness = Readiness("", "", needs_tunnel=lambda: True)
    setattr(readiness, trouble, lambda: "why")
    with served("127.0.0.1:0", readiness) as server:
        assert get(server, "/healthz") == (200, "ok\n")
        status, why = get(server, "/readyz")
        assert (status, why.rstrip().endswith("why")) == (503, True)


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until something holds; say whether it does."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()

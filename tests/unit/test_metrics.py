"""The metrics server by itself: what it serves is in tests/packet/test_collector.py and tests/node/test_metrics.py."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Callable

import pytest
from prometheus_client import CollectorRegistry

from agent.metrics import serve
from agent.node import Readiness


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1:0"), (socket.AF_INET6, "[::1]:0")])
def test_no_name_is_looked_up(monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily, address: str) -> None:
    """The server is there at once, however slow the node's resolver is: it asks nobody for the name of its address."""

    def ask(*_: object) -> str:
        raise AssertionError("asked the resolver")

    for name in ("getfqdn", "gethostbyaddr", "getnameinfo"):
        monkeypatch.setattr(socket, name, ask)
    server = serve(address, CollectorRegistry(), Readiness())
    try:
        assert server.address_family == family
        connection = http.client.HTTPConnection(address.rpartition(":")[0].strip("[]"), server.server_port, timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.shutdown()
        server.server_close()


def test_flood_of_connections() -> None:
    """However many connections any process of the node's opens, few cost a thread; when they end, all is as before."""
    server = serve("127.0.0.1:0", CollectorRegistry(), Readiness())
    before, idle = threading.active_count(), []
    try:
        for _ in range(200):
            idle.append(socket.create_connection(("127.0.0.1", server.server_port)))
        assert [each for each in idle[64:] if each.recv(1)] == []  # hung up on
        assert threading.active_count() - before <= 64
        for each in idle:
            each.close()
        assert wait_for(lambda: threading.active_count() <= before)
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
    finally:
        server.shutdown()
        server.server_close()


def wait_for(condition: Callable[[], bool]) -> bool:
    """Wait until something holds; say whether it does."""
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()

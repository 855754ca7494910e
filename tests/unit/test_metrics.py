"""The metrics server by itself: what it serves is in tests/packet/test_collector.py and tests/node/test_metrics.py."""

from __future__ import annotations

import http.client
import socket

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

"""A source of nodes at work in the test's own process, and the nodes that it follows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from agent.cluster import ClusterNode
from agent.kubernetes import Api, NodeSource
from tests.node.api.objects import make_node

_SECONDS = 30.0


class Following:
    """A source at work; `nodes` is what it reported last."""

    def __init__(self, connect: Callable[[], Api]) -> None:
        self.reports: list[dict[str, ClusterNode]] = []
        self.source = NodeSource(connect, "node-001", self._take)
        self.source.start()

    def _take(self, nodes: Sequence[ClusterNode]) -> None:
        self.reports.append({each.name: each for each in nodes})

    @property
    def nodes(self) -> dict[str, ClusterNode]:
        """The last report."""
        return self.reports[-1] if self.reports else {}

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Poll until the condition holds."""
        deadline = time.monotonic() + _SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain for {what}; trouble: {self.source.trouble!r}"
            threading.Event().wait(0.01)

    def wait_until_known(self, *names: str) -> None:
        """Wait until exactly these nodes are reported."""
        self.wait_for(lambda: set(self.nodes) == set(names), f"{names}, has {list(self.nodes)}")


def numbered(number: int, address: str = "") -> dict[str, object]:
    """Return a node with addresses of both families."""
    cidrs = [f"10.{number >> 8}.{number & 255}.0/24", f"fd00:{number:x}::/64"]
    address = address or f"192.168.{number >> 8}.{number & 255}"
    return make_node(f"node-{number:03}", cidrs, [address, f"fd01::{number:x}"], images=2)

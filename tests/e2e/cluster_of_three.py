"""A cluster of three: the nodes of tests/node/nodes.py, each with a real containerd whose pods podlane wires."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.e2e.cluster_of_one import fetch_command, runtime_of
from tests.node.machine import Netns
from tests.node.nodes import Nodes, nodes


class Cluster:
    """Three nodes and the runtimes on them; neither agents nor runtimes run until they are started."""

    def __init__(self, nodes: Nodes, stack: ExitStack) -> None:
        self.nodes = nodes
        self.runtimes = [runtime_of(member) for member in nodes.members]
        self._stack = stack

    def start(self) -> None:
        """Start runtimes and agents, and wait until all nodes are ready for pods."""
        for runtime in self.runtimes:
            self._stack.callback(runtime.stop)
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda runtime: runtime.start(), self.runtimes))
        self.nodes.start()
        for runtime in self.runtimes:
            runtime.wait_ready()


@contextmanager
def cluster_of_three(directory: Path) -> Iterator[Cluster]:
    """Give a cluster in a directory of its own; afterwards nothing of it is left but that directory's files."""
    with nodes(directory, routing="auto") as made, ExitStack() as stack:
        yield Cluster(made, stack)


def fetch_from(netns: Netns, address: str) -> str:
    """Return the page that a node, or the world, gets from an address."""
    return netns.run("busybox", *fetch_command(address)).stdout.strip()

"""A machine whose agent has its addresses from a Kubernetes API server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.node.api.objects import make_node
from tests.node.api.server import ApiServer
from tests.node.machine import Machine


class Node(Machine):
    """A machine with an API server."""

    api: ApiServer

    def add_api(self, **config: object) -> None:
        """Give it an API server that has no Nodes yet, and tell the agent. `config` is more of its configuration."""
        (self.directory / "api").mkdir()
        self.api = ApiServer(self.directory / "api", self.netns)
        self._stack.callback(self.api.stop)
        kubeconfig = self.api.write_kubeconfig()
        self.configure(node_name="n", kubernetes={"kubeconfig": str(kubeconfig)}, **config)

    def register(self, *cidrs: str, age: int = 0) -> None:
        """Write the node's own Node."""
        self.api.objects.put(make_node("n", cidrs, ["192.0.2.10", "2001:db8::10"], age=age))

    def status(self) -> tuple[int, str]:
        """Return the code and the reason that STATUS gives; 0 if all is well."""
        outcome = self.cni("STATUS", ifname="")
        return (outcome.json()["code"], outcome.json()["details"]) if outcome.exit_code else (0, "")

    @property
    def network_unavailable(self) -> str:
        """What the API server has of that condition; empty if nothing."""
        conditions = self.api.objects.get("n")["status"]["conditions"]
        return next((str(each["status"]) for each in conditions if each["type"] == "NetworkUnavailable"), "")

    @property
    def conflist(self) -> Path:
        """Where the CNI configuration is once the node is ready."""
        return self.directory / "conf" / "10-podlane.conflist"

    def native(self) -> set[str]:
        """Return the subnets that are unreachable but for pods: the node's own."""
        routes = (self.netns.run("ip", family, "route", "show", "proto", "112").stdout for family in ("-4", "-6"))
        return {line.split()[1] for text in routes for line in text.splitlines() if line.startswith("unreachable")}


@contextmanager
def api_node(directory: Path, **config: object) -> Iterator[Node]:
    """Yield a machine whose API server is up; the agent is not. `config` is more of its configuration."""
    with ExitStack() as stack:
        it = Node(directory, stack)
        it.world = it.add_uplink()
        it.add_api(**config)
        it.api.start()
        yield it

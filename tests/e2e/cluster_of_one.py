"""A cluster of one: a node with an uplink and podlane's agent, and a real containerd whose pods podlane wires."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from agent.state import Address
from agent.store import unpack
from tests.e2e.containerd import Containerd, Pod
from tests.node.machine import Machine, machine

NODE_ADDRESSES = ("192.0.2.10", "2001:db8::10")
"""The node's own addresses, as `Machine.add_uplink` sets them, IPv4 first."""

WORLD_ADDRESSES = ("192.0.2.1", "2001:db8::1")
"""Those of its neighbour outside."""

_FETCH_SECONDS = "5"


class Cluster:
    """One node and the runtime on it; neither agent nor containerd run until they are started."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.node: Machine = stack.enter_context(machine(directory))
        self.world = self.node.add_uplink()
        self._stack = stack
        self.runtime = runtime_of(self.node)

    def start_runtime(self) -> None:
        """Start containerd, which is not ready for pods before an agent has installed its CNI configuration."""
        self._stack.enter_context(self.runtime)

    def fetch_from_node(self, address: str) -> str:
        """Return the page that the node gets from an address."""
        return self.node.netns.run("busybox", *fetch_command(address)).stdout.strip()

    def fetch_from_world(self, address: str) -> str:
        """Return the page that the world gets from a pod's own address, of which it knows the way by the node."""
        family, gateway = ("-6", NODE_ADDRESSES[1]) if ":" in address else ("-4", NODE_ADDRESSES[0])
        self.world.run("ip", family, "route", "replace", address, "via", gateway)
        return self.world.run("busybox", *fetch_command(address)).stdout.strip()

    def host_devices(self) -> dict[str, str]:
        """Return the host end of each pod's veth pair by sandbox id, from the aliases that podlane gives them."""
        links = json.loads(self.node.netns.run("ip", "-json", "-details", "link").stdout)
        aliases = {link["ifname"]: link.get("ifalias", "") for link in links}
        return {alias.split("/")[1]: name for name, alias in aliases.items() if alias.startswith("podlane:")}

    def spooled(self) -> list[str]:
        """Return the DELs that wait for the agent."""
        with suppress(FileNotFoundError):
            return sorted(path.name for path in (self.node.directory / "spool").iterdir())
        return []

    def stored_addresses(self) -> dict[str, list[Address]]:
        """Return what podlane's store holds: sandbox id → addresses."""
        query = "SELECT container_id, address FROM attachment JOIN address USING (device) ORDER BY address"
        found: dict[str, list[Address]] = {}
        for container_id, address in self.query_store(query):
            found.setdefault(container_id, []).append(unpack(address))
        return found

    def query_store(self, query: str) -> list[tuple[Any, ...]]:
        """Return the rows of a SELECT on podlane's store, whether the agent runs or not."""
        with closing(sqlite3.connect(f"file:{self.node.directory}/state/ipam.db?mode=ro", uri=True)) as store:
            return store.execute(query).fetchall()


def runtime_of(node: Machine) -> Containerd:
    """Return a containerd for a node, in the node's own directory, whose CNI plugin is podlane."""
    home = node.directory
    return Containerd(
        home,
        conf_dir=home / "conf",
        bin_dir=home / "bin",
        netns=node.netns.name,
        env={"PODLANE_SOCKET": str(home / "cni.sock"), "PODLANE_SPOOL": str(home / "spool")},
    )


@contextmanager
def cluster_of_one(directory: Path) -> Iterator[Cluster]:
    """Give a cluster in a directory of its own; afterwards nothing of it is left but that directory's files."""
    with ExitStack() as stack:
        yield Cluster(directory, stack)


def url(address: str) -> str:
    """Return the address of a pod's page."""
    return f"http://[{address}]:8080/" if ":" in address else f"http://{address}:8080/"


def fetch_command(address: str) -> list[str]:
    """Return the command, of busybox, that prints the page at an address."""
    return ["timeout", _FETCH_SECONDS, "wget", "-qO-", url(address)]


def fetch(client: Pod, address: str) -> str:
    """Return the page that a pod gets from an address, or what went wrong."""
    result = client.exec(fetch_command(address))
    return result.stdout.strip() or f"exit code {result.exit_code}: {result.stderr.strip()}"

"""Two nodes that differ in nothing but their plugin: one of the reference plugins on one, podlane on the other."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.node.machine import LAUNCHER, Machine, Netns, Outcome, add_uplink
from tests.node.reference.asking import Listeners

PLUGINS = Path("/usr/lib/cni")  # of Debian's containernetworking-plugins
NODE = {4: "192.0.2.10", 6: "2001:db8::10"}
WORLD = {4: "192.0.2.1", 6: "2001:db8::1"}
PODS = ("a", "b")
_POD_SUBNETS = ("10.0.0.0/8", "fd00::/8")
_NO_DAD = "net.ipv6.conf.default.accept_dad=0"  # the reference waits for it for a second or two in each ADD


class Side(ABC):
    """A node with a neighbour, `world`, that knows the way to the node's pods; and two containers."""

    def __init__(self, directory: Path, node: Netns, world: Netns, stack: ExitStack, listeners: Listeners) -> None:
        self.directory = directory
        self.data_dir = directory / "ipam"
        self.node = node
        self.world = world
        self.pods = {name: Netns(name) for name in PODS}
        for pod in self.pods.values():
            stack.callback(pod.delete)
            pod.run("sysctl", "-qw", _NO_DAD)
        self.node.run("sysctl", "-qw", _NO_DAD)
        for subnet in _POD_SUBNETS:
            self.world.run("ip", "route", "add", subnet, "via", NODE[6 if ":" in subnet else 4])
        for netns in (node, world, *self.pods.values()):
            listeners.listen(netns)

    @abstractmethod
    def configured(self, config: Mapping[str, Any], *, own_ipam: bool) -> dict[str, Any]:
        """Return a reference plugin's configuration as this side's plugin gets it.

        With `own_ipam`, podlane's own IPAM is to be in host-local's place.
        """

    @abstractmethod
    def command(self, kind: str) -> tuple[Path, dict[str, str]]:
        """Return the executable for a reference plugin's type, and what its environment has beside the contract's."""

    @abstractmethod
    def reset(self) -> None:
        """Forget what earlier cases left on the node."""

    def execute(self, kind: str, stdin: str, environment: Mapping[str, str]) -> Outcome:
        """Execute the plugin in the node, as a runtime does; an empty value takes a variable away."""
        binary, more = self.command(kind)
        whole = {"PATH": os.environ["PATH"], **more, **environment}
        done = self.node.call(
            lambda: subprocess.run(
                [str(binary)],
                input=stdin,
                env={name: value for name, value in whole.items() if value},
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def links(self, netns: Netns) -> list[str]:
        """Return the names of a namespace's devices."""
        return netns.call(lambda: [name for _, name in socket.if_nameindex()])

    def reserved(self, container_id: str) -> list[str]:
        """Return the addresses that host-local keeps for a container."""
        files = [path for path in self.data_dir.glob("*/*") if path.is_file()]
        return sorted(path.name for path in files if path.read_text().startswith(container_id))

    def clean_pods(self) -> None:
        """Take away interfaces that a failure has left in the containers."""
        for pod in self.pods.values():
            for name in self.links(pod):
                if name != "lo":
                    pod.run("ip", "link", "delete", name, check=False)
        shutil.rmtree(self.data_dir, ignore_errors=True)


class Reference(Side):
    """bridge and ptp."""

    def __init__(self, directory: Path, stack: ExitStack, listeners: Listeners) -> None:
        directory.mkdir()
        node = Netns("reference")
        stack.callback(node.delete)
        super().__init__(directory, node, add_uplink(node, stack), stack, listeners)

    def configured(self, config: Mapping[str, Any], *, own_ipam: bool) -> dict[str, Any]:
        """See `Side`: unchanged, but for the place of host-local's files."""
        del own_ipam
        return _with_data_dir(dict(config), self.data_dir)

    def command(self, kind: str) -> tuple[Path, dict[str, str]]:
        """See `Side`."""
        return PLUGINS / kind, {"CNI_PATH": str(PLUGINS)}

    def reset(self) -> None:
        """See `Side`: the plugins never delete a bridge, and leave rules and forwarding behind."""
        for name in self.links(self.node):
            if name not in ("lo", "uplink"):
                self.node.run("ip", "link", "delete", name, check=False)
        # Both are switched on by the plugins themselves, where they want it.
        self.node.run("sysctl", "-qw", "net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0")
        self.node.run("nft", "flush", "ruleset")


class Podlane(Side):
    """The agent, and the launcher in the plugin's place."""

    def __init__(self, directory: Path, stack: ExitStack, listeners: Listeners) -> None:
        directory.mkdir()
        self.machine = Machine(directory, stack)
        super().__init__(directory, self.machine.netns, self.machine.add_uplink(), stack, listeners)
        self.machine.start_agent()

    def configured(self, config: Mapping[str, Any], *, own_ipam: bool) -> dict[str, Any]:
        """See `Side`: another type, and nothing else."""
        changed = {**_with_data_dir(dict(config), self.data_dir), "type": "podlane"}
        if own_ipam:
            changed["ipam"] = {**changed["ipam"], "type": "podlane"}
        return changed

    def command(self, kind: str) -> tuple[Path, dict[str, str]]:
        """See `Side`."""
        del kind
        return LAUNCHER, {
            "CNI_PATH": f"{self.directory / 'bin'}:{PLUGINS}",
            "PODLANE_SOCKET": str(self.directory / "cni.sock"),
            "PODLANE_SPOOL": str(self.directory / "spool"),
        }

    def reserved(self, container_id: str) -> list[str]:
        """See `Side`; and those that podlane keeps for it."""
        with sqlite3.connect(self.directory / "state" / "ipam.db") as db:
            query = "SELECT hex(address) FROM address JOIN attachment USING (device) WHERE container_id = ?"
            own = [str(address) for (address,) in db.execute(query, (container_id,))]
        return super().reserved(container_id) + own

    def reset(self) -> None:
        """See `Side`: nothing may be left; only which addresses rest after their release is to be forgotten."""
        with sqlite3.connect(self.directory / "state" / "ipam.db") as db:
            assert db.execute("SELECT * FROM attachment").fetchall() == []
            db.execute("DELETE FROM former")
            db.execute("DELETE FROM last_given")


def _with_data_dir(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    ipam = config.get("ipam")
    if isinstance(ipam, dict) and ipam.get("type") == "host-local":
        config["ipam"] = {"dataDir": str(directory), **ipam}
    return config

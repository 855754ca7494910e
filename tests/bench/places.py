"""The ways to join two pods that the benchmark compares: podlane, the reference plugins, and a bare veth pair."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tests.node.machine import LAUNCHER, Machine, Netns, add_uplink, run

REFERENCE_PLUGINS = Path("/usr/lib/cni")


@dataclass(frozen=True)
class Pair:
    """Two joined pods, and the addresses of the second, IPv4 first."""

    a: Netns
    b: Netns
    addresses: tuple[str, str]


class Runtime(Protocol):
    """Whatever can ADD and DEL a pod: returns the addresses that ADD reports. Its node leads to `world`."""

    world: Netns

    def add(self, netns: Netns) -> list[str]:
        """Wire the pod."""

    def check(self, netns: Netns) -> None:
        """CHECK the pod that was wired last."""

    def delete(self, netns: Netns) -> None:
        """Unwire the pod."""


class Podlane:
    """podlane on a machine that has an uplink and an agent, with its own addresses or those of an IPAM plugin."""

    def __init__(self, machine: Machine, ipam: Mapping[str, object] | None = None) -> None:
        self._config: dict[str, Any] = {"cniVersion": "1.0.0", "name": "podlane", "type": "podlane"}
        if ipam:
            self._config |= {"ipMasq": True, "ipam": {**ipam, "dataDir": str(machine.directory)}}
        self._machine = machine
        self.world = machine.world

    def add(self, netns: Netns) -> list[str]:
        """Wire the pod."""
        self._result = _result(self._call("ADD", netns))
        return _addresses(self._result)

    def check(self, netns: Netns) -> None:
        """CHECK the pod that was wired last."""
        _succeeded(self._call("CHECK", netns, prevResult=self._result))

    def delete(self, netns: Netns) -> None:
        """Unwire the pod."""
        self._call("DEL", netns)

    def _call(self, command: str, netns: Netns, **more: object) -> subprocess.CompletedProcess[str]:
        directory = self._machine.directory
        environment = {"PODLANE_SOCKET": str(directory / "cni.sock"), "PODLANE_SPOOL": str(directory / "spool")}
        config = json.dumps({**self._config, **more})
        return _call(self._machine.netns, LAUNCHER, command, netns, config, environment)


class Reference:
    """One of the reference plugins, with host-local IPAM, in a node of its own."""

    def __init__(self, directory: Path, stack: ExitStack, plugin: str, octet: int, **more: object) -> None:
        directory.mkdir()
        self._node = Netns(plugin)
        stack.callback(self._node.delete)
        self.world = add_uplink(self._node, stack)
        self._node.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        self._plugin = REFERENCE_PLUGINS / plugin
        ipam = {**host_local(octet), "dataDir": str(directory)}
        self._config = {"cniVersion": "1.0.0", "name": plugin, "type": plugin, "ipam": ipam, **more}

    def add(self, netns: Netns) -> list[str]:
        """Wire the pod."""
        self._result = _result(self._call("ADD", netns))
        return _addresses(self._result)

    def check(self, netns: Netns) -> None:
        """CHECK the pod that was wired last."""
        _succeeded(self._call("CHECK", netns, prevResult=self._result))

    def delete(self, netns: Netns) -> None:
        """Unwire the pod."""
        self._call("DEL", netns)

    def _call(self, command: str, netns: Netns, **more: object) -> subprocess.CompletedProcess[str]:
        return _call(self._node, self._plugin, command, netns, json.dumps({**self._config, **more}), {})


def podlane(directory: Path, stack: ExitStack, ipam: Mapping[str, object] | None = None, **config: object) -> Podlane:
    """Start podlane on a machine of its own, with hooks attached as told."""
    directory.mkdir()
    machine = Machine(directory, stack, **config)
    machine.world = machine.add_uplink()
    machine.start_agent()
    return Podlane(machine, ipam)


def host_local(octet: int) -> dict[str, object]:
    """Return host-local's configuration for both families."""
    return {
        "type": "host-local",
        "ranges": [[{"subnet": f"10.{octet}.0.0/16"}], [{"subnet": f"fd00:{octet}::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }


def _call(
    node: Netns, plugin: Path, command: str, netns: Netns, config: str, more: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Execute a plugin as a runtime does, from a thread within the node."""
    environment = {
        "PATH": os.environ["PATH"],
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": netns.name,
        "CNI_NETNS": str(netns.path),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(REFERENCE_PLUGINS),
        **more,
    }
    return node.call(
        lambda: subprocess.run(
            [str(plugin)], input=config, env=environment, capture_output=True, text=True, check=False
        )
    )


def _succeeded(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode != 0:
        raise RuntimeError(f"the call failed: {done.stdout}{done.stderr}")
    return done.stdout


def _result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(_succeeded(done))
    return result


def _addresses(result: Mapping[str, Any]) -> list[str]:
    return [each["address"].partition("/")[0] for each in result["ips"]]


def joined(runtime: Runtime, stack: ExitStack) -> Pair:
    """Make two pods and have the runtime wire them."""
    pods = [Netns("bench"), Netns("bench")]
    for pod in pods:
        stack.callback(pod.delete)
    addresses = [runtime.add(pod) for pod in pods]
    return Pair(pods[0], pods[1], (addresses[1][0], addresses[1][1]))


def sink(netns: Netns, address: str, port: int = 9) -> socket.socket:
    """Return a UDP socket in the namespace, by default bound to the discard port, that nobody reads."""

    def bind() -> socket.socket:
        receiver = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((address, port))
        return receiver

    return netns.call(bind)


def direct(stack: ExitStack) -> Pair:
    """Join two namespaces by one veth pair, with nothing between: what no datapath can beat."""
    a, b = Netns("bench"), Netns("bench")
    for netns in (a, b):
        stack.callback(netns.delete)
    run("ip", "-n", a.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b.name)
    for netns, last in ((a, 1), (b, 2)):
        run("ip", "-n", netns.name, "address", "add", f"10.1.0.{last}/24", "dev", "eth0")
        run("ip", "-n", netns.name, "address", "add", f"fd01::{last}/64", "dev", "eth0", "nodad")
        run("ip", "-n", netns.name, "link", "set", "dev", "eth0", "up")
    return Pair(a, b, ("10.1.0.2", "fd01::2"))

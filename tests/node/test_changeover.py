"""A node changes over from bridge or ptp, as README.md describes it, while pods of theirs run on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.node.contract import PLUGINS, launch
from tests.node.machine import LAUNCHER, Machine, Netns, machine, pings

SUBNET = "10.244.1.0/24"
OUTSIDE = ("10.244.1.1", "192.0.2.10", "198.51.100.1")  # gateway, node, world


class Network:
    """The textbook's configuration with four addresses, in host-local's hands, and a runtime with libcni's cache."""

    def __init__(self, node: Machine, kind: str) -> None:
        self.node = node
        ipam = {"type": "host-local", "subnet": SUBNET, "rangeEnd": "10.244.1.5", "routes": [{"dst": "0.0.0.0/0"}]}
        ipam["dataDir"] = str(node.directory / "networks")
        self.config: dict[str, Any] = {"cniVersion": "0.4.0", "name": "awesomenet", "type": kind, "ipMasq": True}
        self.config |= {"bridge": "cni0", "isGateway": True} if kind == "bridge" else {}
        self.config |= {"ipam": ipam}
        self.data = node.directory / "networks" / "awesomenet"
        self.results: dict[Netns, Any] = {}

    def call(self, command: str, netns: Netns) -> tuple[int, str]:
        """Execute the plugin that the configuration names; return its exit status, and what it printed."""
        kind = self.config["type"]
        prev = {"prevResult": self.results[netns]} if netns in self.results else {}
        variables = {
            "PATH": os.environ["PATH"],
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": netns.name,
            "CNI_NETNS": str(netns.path),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": PLUGINS,
        }
        binary = LAUNCHER if kind == "podlane" else Path(PLUGINS) / kind
        done = launch(self.node, variables, json.dumps(self.config | prev), [str(binary)])
        return done.returncode, done.stdout

    def add(self, hint: str) -> Netns:
        """ADD a container."""
        netns = self.node.add_netns(hint)
        status, printed = self.call("ADD", netns)
        assert status == 0, f"{printed}\n{self.node.log_tail()}"
        self.results[netns] = json.loads(printed)
        return netns

    def delete(self, netns: Netns) -> None:
        """DEL it, and let its namespace go, as runtimes do."""
        assert self.call("DEL", netns) == (0, "")
        netns.delete()
        del self.results[netns]

    def address(self, netns: Netns) -> str:
        """Return the address that ADD printed."""
        return str(self.results[netns]["ips"][0]["address"].partition("/")[0])

    def take_over(self) -> str:
        """Import host-local's directory; return what the command says."""
        command = (*self.node.agent_command, "--config", str(self.node.config), "import", str(self.data))
        return self.node.netns.run(*command).stdout


@pytest.mark.parametrize(("kind", "ipam"), [("bridge", "podlane"), ("ptp", "host-local")])
def test_pods_run_on(tmp_path: Path, kind: str, ipam: str) -> None:
    """Pods of both plugins reach each other, node and world, pass CHECK, keep their addresses, and end by DEL."""
    with machine(tmp_path) as node:
        node.add_world()
        node.start_agent()
        network = Network(node, kind)
        old = [network.add("old")]
        assert " 1 imported" in network.take_over()
        old.append(network.add("between"))
        network.config["type"] = "podlane"
        network.config["ipam"]["type"] = ipam
        assert "2 attachments found, 1 imported" in network.take_over()
        if kind == "bridge":
            node.netns.run("sysctl", "-qw", "net.ipv4.conf.cni0.proxy_arp=1")
        everyone = [*old, network.add("new"), network.add("new")]
        addresses = [network.address(each) for each in everyone]
        assert addresses == [f"10.244.1.{last}" for last in (2, 3, 4, 5)]
        missed = [(one.name, to) for one in everyone for to in (*addresses, *OUTSIDE) if not pings(one, to)]
        assert missed == []
        assert [to for to in addresses if not pings(node.netns, to)] == []
        assert [network.call("CHECK", each) for each in everyone] == [(0, "")] * 4
        assert_taken_again(network, old[0])
        for netns in list(network.results):
            network.delete(netns)
        assert not any(node.traces().values())
        assert ipam == "podlane" or not list(network.data.glob("*.*.*.*"))


def assert_taken_again(network: Network, old: Netns) -> None:
    """Assert that an old pod's address is nobody else's as long as it runs, and the next one's after its DEL."""
    refused = network.node.add_netns("refused")
    status, printed = network.call("ADD", refused)
    assert (status, "no IP addresses available" in printed) == (1, True), printed
    network.delete(old)
    assert network.address(network.add("next")) == "10.244.1.2"

"""The configuration that Debian's podman comes with, as it stands but for the plugin's type."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.node.machine import machine, pings
from tests.node.test_chain import PORTS, Chain, addresses, assert_host_port_leads_to

SHIPPED = Path("/etc/cni/net.d/87-podman-bridge.conflist")


def test_podman_conflist(tmp_path: Path) -> None:
    """With host-local's addresses, and portmap, firewall and tuning behind it, podlane is in bridge's place."""
    if not SHIPPED.exists():
        pytest.skip("podman is absent")
    network: dict[str, Any] = json.loads(SHIPPED.read_text())
    bridge, *others = network["plugins"]
    assert (bridge["type"], [each["type"] for each in others]) == ("bridge", ["portmap", "firewall", "tuning"])
    podlane = bridge | {"type": "podlane", "ipam": bridge["ipam"] | {"dataDir": str(tmp_path / "networks")}}
    named: dict[str, Any] = {"name": network["name"], "version": network["cniVersion"], "unchecked": ("portmap",)}
    with machine(tmp_path) as node, ExitStack() as stack:
        node.add_world()
        node.start_agent()
        published = Chain(node, podlane, *others, **named, runtime_config=PORTS)
        chains = {node.add_netns("one"): published, node.add_netns("two"): Chain(node, podlane, *others, **named)}
        found = []
        for netns, chain in chains.items():
            found += addresses(chain.add(netns))
            stack.callback(chain.delete, netns)
            chain.check(netns)
        assert found == ["10.88.0.2", "10.88.0.3"]
        one, two = chains
        for source in (one, two, node.netns):
            for target in (*found, "10.88.0.1", "192.0.2.10", "198.51.100.1"):
                assert pings(source, target)
        assert_host_port_leads_to(node, one, found[:1])
        stack.close()
        assert not any(node.traces().values())
        assert "10.88.0." not in node.netns.run("iptables-save").stdout

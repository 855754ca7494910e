"""The IPAM plugin dhcp, as Debian has it: its leases come by broadcast, and a pod's link has two ends only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.contract import NEWEST, PLUGINS, Container, assert_refused
from tests.node.machine import Machine, Netns, machine

VERSION = "1.0.0"  # the newest that this plugin has


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Machine]:
    """Make a node on which dhcp's daemon runs."""
    with machine(tmp_path) as it:
        it.add_uplink()
        it.start_agent()
        (it.directory / "bin" / "dhcp").symlink_to(f"{PLUGINS}/dhcp")
        listening = it.directory / "dhcp.sock"
        command = it.netns.command(f"{PLUGINS}/dhcp", "daemon", "-socketpath", str(listening))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as daemon:
            it.wait_for(listening.exists, "dhcp's daemon to listen")
            yield it
            daemon.kill()


def test_is_refused_by_name(node: Machine) -> None:
    """ADD and STATUS refuse dhcp before it is executed; DEL, of a pod that bridge has made, has it end the lease."""
    before = node.traces()
    ipam: dict[str, Any] = {"type": "dhcp", "daemonSocketPath": str(node.directory / "dhcp.sock")}
    it = Container(node, Netns("leased"), {"cniVersion": VERSION, "name": "leases", "ipam": ipam})
    try:
        for command, version in (("ADD", VERSION), ("STATUS", NEWEST)):
            refused = it.call(command, cniVersion=version)
            assert_refused(refused, 2, '"ipam.type": "dhcp"', "layer 2", version=version)
        assert node.traces() == before
        it.done("DEL")
        ipam["daemonSocketPath"] = "/nowhere"
        assert_refused(it.call("DEL"), 999, "error dialing DHCP daemon")
    finally:
        it.netns.delete()

"""The agent as its systemd unit starts it: with no more privileges than deploy/podlane-agent.service leaves."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.node.contract import Delegate, container
from tests.node.machine import ROOT, machine

UNIT = (ROOT / "deploy" / "podlane-agent.service").read_text()


def privileges() -> list[str]:
    """Return the command that gives up what the unit's capabilities and NoNewPrivileges= give up."""
    line = re.search(r"^CapabilityBoundingSet=(.+)$", UNIT, re.MULTILINE)
    assert line
    assert "\nNoNewPrivileges=yes\n" in UNIT
    kept = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in line[1].split())
    return ["setpriv", "--bounding-set", f"-all,{kept}", "--inh-caps=-all", "--no-new-privs"]


def test_privileges_are_enough(tmp_path: Path) -> None:
    """With the unit's capabilities, each command works, limits and delegated addresses included, after a crash too."""
    limits = {"ingressRate": 8_000_000, "ingressBurst": 80_000, "egressRate": 8_000_000, "egressBurst": 80_000}
    with machine(tmp_path) as node:
        node.add_world()
        node.agent_command = (*privileges(), sys.executable, "-m", "agent")
        node.start_agent()
        delegate = Delegate(node)
        delegate.gives({"ips": [{"address": "10.66.0.2/24"}], "routes": [{"dst": "0.0.0.0/0"}]})
        other = {"name": "other", "isGateway": True, "ipMasq": True, "ipam": delegate.ipam}
        with container(node) as one, container(node, **other, runtimeConfig={"bandwidth": limits}) as two:
            results = [it.add() for it in (one, two)]
            node.kill_agent()
            node.netns.run("ip", "link", "delete", results[0]["interfaces"][0]["name"])
            node.start_agent()
            node.wait_for(lambda: one.pings("198.51.100.1"), "the pair that was deleted to be back")
            assert one.pings(results[1]["ips"][0]["address"].partition("/")[0])
            assert two.pings("198.51.100.1")
            for it, result in zip((one, two), results, strict=True):
                it.done("CHECK", prevResult=result)
            one.done("STATUS")
            one.done("GC", **{"cni.dev/valid-attachments": []})
            two.done("DEL")
        assert not any(node.traces().values())

"""`podlane-agent uninstall`: a node is afterwards as it was before podlane came."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.machine import ROOT, Machine, machine

pytestmark = pytest.mark.root

_FOREIGN = "05-other.conf"
_PEERS = [
    {"name": "here", "addresses": ["192.0.2.10", "2001:db8::10"], "pod_cidrs": ["10.244.0.0/24", "fd00:10:244::/64"]},
    {"name": "near", "addresses": ["192.0.2.11"], "pod_cidrs": ["10.244.1.0/24"]},
    {"name": "far", "addresses": ["198.51.100.7"], "pod_cidrs": ["10.244.2.0/24"]},
]

_HALF_WRITTEN = (
    "conf/.10-podlane.conflist.tmp",
    "bin/.podlane.tmp",
    "state/.cluster.json.tmp",
    "state/cache/.0.object.tmp",
)

Snapshot = dict[str, list[str]]


@pytest.fixture
def hooks() -> str:
    """Return how programs are attached."""
    return "auto"


@pytest.fixture
def node(tmp_path: Path, hooks: str) -> Iterator[Machine]:
    """Make a node in a cluster, as it is before podlane comes: it forwards nothing, and reserves a port."""
    with machine(tmp_path, hooks=hooks, node_name="here", nodes=_PEERS) as node:
        node.add_uplink()
        for setting in ("net.ipv4.ip_forward=0", "net.ipv6.conf.all.forwarding=0"):
            node.netns.run("sysctl", "-qw", setting)
        node.netns.run("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=50000,8080")
        (node.directory / "conf" / _FOREIGN).write_text("{}")
        node.wait_for(lambda: "tentative" not in node.netns.run("ip", "address").stdout, "the link-local address")
        yield node


def uninstall(node: Machine, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command on the node."""
    command = [*node.agent_command, "--config", str(node.config), "uninstall", *options]
    return subprocess.run(node.netns.command(*command), capture_output=True, text=True, check=False, cwd=ROOT)


def snapshot(node: Machine) -> Snapshot:
    """Return all that podlane could leave on a node, by kind."""
    commands = {
        "links": "ip -o link",
        "addresses": "ip -o address",
        "routes": "ip route show table all",
        "ipv6 routes": "ip -6 route show table all",
        "rules": "ip rule",
        "neighbours": "ip neighbour show nud permanent",
        "queues": "tc qdisc",
        "programs": "bpftool net show",
        "sysctls": "sysctl -a -r ^net[.]",
    }
    found = {kind: _lines(node.netns.run(*command.split(), check=False).stdout) for kind, command in commands.items()}
    files = {path for path in node.directory.rglob("*") if path not in (node.log, node.config)}
    state = node.directory / "state"  # made by the test, with a warm cache, and gone afterwards
    return {**found, "files": sorted(str(path) for path in files if not path.is_relative_to(state))}


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Return what has come and what has gone."""
    gone = [f"- {kind}: {line}" for kind in before for line in before[kind] if line not in after[kind]]
    return gone + [f"+ {kind}: {line}" for kind in before for line in after[kind] if line not in before[kind]]


def _lines(text: str) -> list[str]:
    """Return lines without what changes by itself: ages of routes, and counters."""
    unsteady = ("expires", "random", "_count", "neigh.eth", "nf_conntrack", "nf_log")
    return sorted(line for line in text.splitlines() if not any(word in line for word in unsteady))


@pytest.mark.parametrize("hooks", ["tcx", "clsact"])
def test_nothing_is_left(node: Machine) -> None:
    """After pods, peers and a tunnel, the command takes all back: devices, routes, programs, pins, settings, files.

    What others have there, stays: their configuration, the ports that they reserved before and since.
    """
    before = snapshot(node)
    node.start_agent()
    one, other = node.make_pod(), node.make_pod()
    assert all(node.pings(one, address) for address in other.addresses)
    assert "podlane.vx" in node.netns.run("ip", "link").stdout
    for pod in (one, other):
        node.delete_pod(pod)
    node.stop_agent()
    assert snapshot(node) != before
    for path in _HALF_WRITTEN:
        (node.directory / path).touch()  # as an agent that is killed while it writes leaves them
    done = uninstall(node)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert differences(before, snapshot(node)) == []
    assert not (node.directory / "state").exists()
    assert not node.bpffs.exists()


def test_running_agent_is_left_alone(node: Machine) -> None:
    """While the agent runs, the command refuses, and changes nothing."""
    node.start_agent()
    before = snapshot(node)
    done = uninstall(node)
    assert (done.returncode, "another agent is at work" in done.stderr) == (1, True), done.stderr
    assert snapshot(node) == before


@pytest.mark.parametrize("hooks", ["tcx", "clsact"])
def test_attached_pods_are_not_cut_off_unasked(node: Machine) -> None:
    """While pods are attached, the command refuses and names them; with --force it takes their devices, too."""
    before = snapshot(node)
    node.start_agent()
    pod = node.make_pod()
    node.stop_agent()
    done = uninstall(node)
    assert (done.returncode, pod.container_id in done.stderr) == (1, True), done.stderr
    assert (node.directory / "conf" / "10-podlane.conflist").exists()
    done = uninstall(node, "--force")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert differences(before, snapshot(node)) == []
    assert "eth0" not in pod.netns.run("ip", "link").stdout


def test_again(node: Machine) -> None:
    """On a node without podlane the command succeeds, and changes nothing."""
    uninstall(node)
    before = snapshot(node)
    done = uninstall(node)
    assert (done.returncode, done.stderr) == (0, "")
    assert snapshot(node) == before

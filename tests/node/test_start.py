"""What an agent says when it cannot start."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.machine import Machine, machine, run

# Per mistake: the file, the field that the message names, what it says was given, and what it says is allowed.
MISTAKES = [
    ("ranges: []", "ranges", "[]", "at least one subnet"),
    ("ranges: [{subnet: 10.0.0.1/24}]", "ranges.0.subnet", "10.0.0.1/24", "host bits"),
    ("ranges: [{subnet: 10.0.0.0/33}]", "ranges.0.subnet", "10.0.0.0/33", "network"),
    ("ranges: [{subnet: 10.0.0.0/24, last: 10.0.1.1}]", "ranges.0", "10.0.1.1", "in subnet 10.0.0.0/24"),
    ("ranges: [{subnet: 10.0.0.0/8}, {subnet: 10.1.0.0/16}]", "ranges", "10.1.0.0/16", "overlap"),
    ("mtu: -1", "mtu", "-1", "greater than or equal to 0"),
    ("hooks: xdp", "hooks", "xdp", "'auto', 'tcx' or 'clsact'"),
    ("resync_seconds: soon", "resync_seconds", "soon", "a valid number"),
    ("metrics: localhost", "metrics", "localhost", r"match pattern '^.+:[0-9]"),
    ("network: ../x", "network", "../x", "match pattern"),
    ("log_level: loud", "log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
    ("mtuu: 1500", "mtuu", "1500", "not permitted"),
    ("paths: {sockett: /x}", "paths.sockett", "/x", "not permitted"),
]


@pytest.mark.parametrize(("text", "field", "given", "allowed"), MISTAKES, ids=[text for text, *_ in MISTAKES])
def test_bad_configuration(tmp_path: Path, text: str, field: str, given: str, allowed: str) -> None:
    """A mistake in the configuration ends the agent with status 2, naming file, field, what is given and allowed."""
    file = tmp_path / "agent.yaml"
    file.write_text(text)
    done = run(sys.executable, "-m", "agent", "--config", str(file), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    start, _, reason = done.stderr.partition(f"{file}: ")
    assert start == "podlane-agent: "
    assert reason.startswith(f"{field}: ")
    assert "given: " in reason
    assert given in reason.partition("given: ")[2]
    assert allowed in reason


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Machine]:
    """Make a node with no agent on it."""
    with machine(tmp_path) as node:
        yield node


def start(node: Machine) -> tuple[int, str]:
    """Start an agent that cannot; return its status and its last words."""
    node.start_agent(wait=False)
    assert node.agent is not None
    status = node.agent.wait(timeout=30)
    node.agent = None
    return status, node.log.read_text().splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("masqLinkLocal: maybe", "masqLinkLocal: Input should be a valid boolean (given: 'maybe'); the keys are "),
        ("nonMasqueradeCIDRs: [10.0.0.1/8]", "nonMasqueradeCIDRs.0: 10.0.0.1/8 has host bits set (given: "),
        ("[", "neither YAML nor JSON: "),
    ],
)
def test_bad_ip_masq_configuration(empty: Machine, text: str, words: str) -> None:
    """A mistake in the file of ip-masq-agent's is one in the configuration: told the same way, and nothing is begun."""
    rules = empty.directory / "rules"
    rules.write_text(text)
    empty.configure(masquerade={"config_file": str(rules)})
    status, _ = start(empty)
    assert status == 2
    assert empty.log.read_text().startswith(f"podlane-agent: {rules}: {words}")
    assert [each.name for each in (empty.directory / "state").iterdir()] == ["cache"]


def test_no_bpf_filesystem(empty: Machine) -> None:
    """Without a bpf filesystem the agent ends with status 1 and says which command mounts one."""
    empty.configure(paths={"bpffs": empty.directory / "plain"})
    status, words = start(empty)
    assert status == 1
    assert str(empty.directory) in words
    assert "mount -t bpf bpf /sys/fs/bpf" in words


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_metrics_port_is_taken(empty: Machine, family: socket.AddressFamily, host: str) -> None:
    """If somebody else listens on the metrics port, the agent ends with status 1 and names the address."""
    address = f"[{host}]:9999" if ":" in host else f"{host}:9999"
    empty.configure(metrics=address)
    with empty.netns.call(lambda: socket.socket(family)) as other:
        other.bind((host, 9999))
        other.listen()
        status, words = start(empty)
    assert status == 1
    assert f"serve metrics on {address}: Address already in use" in words


def test_nothing_is_claimed_by_a_failed_start(empty: Machine) -> None:
    """An agent that could not start has not told the runtime to use it."""
    empty.configure(paths={"bpf_source": empty.directory / "nowhere"})
    status, words = start(empty)
    assert status == 1
    assert "datapath.c" in words
    assert list((empty.directory / "conf").iterdir()) == []
    assert not (empty.directory / "cni.sock").exists()

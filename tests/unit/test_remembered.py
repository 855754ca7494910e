"""Who was in the cluster, on disk."""

from __future__ import annotations

import json
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from agent.cluster import ClusterNode
from agent.remembered import Remembered

NODES = [
    ClusterNode("a", (ip_address("192.168.0.1"), ip_address("fd01::1")), (ip_network("10.0.0.0/24"),), "2026-01-01"),
    ClusterNode("b"),
]


def test_what_was_kept_is_recalled(tmp_path: Path) -> None:
    """All that was known of each node is there again for the next agent."""
    Remembered(tmp_path / "cluster.json").keep(NODES, at_once=True)
    assert Remembered(tmp_path / "cluster.json").recall() == NODES


def test_what_can_wait_is_written_at_the_end(tmp_path: Path) -> None:
    """What was kept last is written when the agent ends, at the latest."""
    it = Remembered(tmp_path / "cluster.json")
    it.start()
    for count in range(3):
        it.keep(NODES[:count], at_once=False)
    it.stop()
    assert Remembered(tmp_path / "cluster.json").recall() == NODES[:2]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"version": 2}',
        '{"version": 1}\n{}',
        '{"version": 1}\n' + json.dumps({"name": "a", "addresses": ["x"], "pod_cidrs": [], "created": ""}),
        '{"version": 1}\n' + json.dumps({"name": "a", "addresses": [], "pod_cidrs": [], "created": ""}) + '\n{"na',
    ],
)
def test_a_file_that_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    """A missing, damaged or newer file means that nothing is remembered, and hinders nobody."""
    path = tmp_path / "cluster.json"
    assert Remembered(path).recall() == []
    path.write_text(content)
    assert Remembered(path).recall() == []


def test_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    """Where the file cannot be written, the agent goes on; later it is, though nothing new is told."""
    path = tmp_path / "cluster.json"
    (tmp_path / ".cluster.json.tmp").mkdir()
    it = Remembered(path)
    it.keep(NODES, at_once=True)
    assert it.recall() == []
    (tmp_path / ".cluster.json.tmp").rmdir()
    it.start()
    it.stop()
    assert it.recall() == NODES

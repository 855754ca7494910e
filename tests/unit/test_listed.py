"""The list of nodes in the configuration file: what it may say, and what its changes lead to."""

from __future__ import annotations

import logging
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
import yaml

from agent.cluster import ClusterNode
from agent.config import ConfigError, load
from agent.listed import ListedNodes

OWN = {"name": "n1", "addresses": ["192.0.2.1"], "pod_cidrs": ["10.244.0.0/16"]}
OTHER = {"name": "n2", "addresses": ["192.0.2.2", "2001:db8::2"], "pod_cidrs": ["10.245.0.0/24"]}


def write(path: Path, nodes: object, **more: object) -> None:
    """Write a configuration."""
    path.write_text(
        yaml.safe_dump({"node_name": "n1", "ranges": [{"subnet": "10.244.1.0/24"}], "nodes": nodes, **more})
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Provide a configuration with two nodes."""
    path = tmp_path / "agent.yaml"
    write(path, [OWN, OTHER])
    return path


def reports(path: Path) -> tuple[ListedNodes, list[list[ClusterNode]]]:
    """Return the list, and what it has reported."""
    told: list[list[ClusterNode]] = []
    return ListedNodes(load(path), path, lambda nodes, _cidrs: told.append(list(nodes))), told


def test_reported_at_once(path: Path) -> None:
    """The nodes are as the file lists them."""
    _, told = reports(path)
    assert told == [
        [
            ClusterNode("n1", (ip_address("192.0.2.1"),), (ip_network("10.244.0.0/16"),)),
            ClusterNode("n2", (ip_address("192.0.2.2"), ip_address("2001:db8::2")), (ip_network("10.245.0.0/24"),)),
        ]
    ]


def test_own_node_is_among_them(path: Path) -> None:
    """Whoever is not listed is there with its ranges: others must not claim these."""
    write(path, [OTHER])
    _, told = reports(path)
    assert told[0][-1] == ClusterNode("n1", (), (ip_network("10.244.1.0/24"),))


def test_without_a_file() -> None:
    """Without a configuration the node is alone, and there is nothing to look at."""
    from agent.config import Config

    told: list[object] = []
    listed = ListedNodes(Config(), None, lambda nodes, _cidrs: told.append(nodes))
    listed.poll()
    assert len(told) == 1


def test_changes(path: Path) -> None:
    """A changed list is reported, once."""
    listed, told = reports(path)
    listed.poll()
    write(path, [OWN])
    listed.poll()
    listed.poll()
    assert [[node.name for node in each] for each in told] == [["n1", "n2"], ["n1"]]


def test_bounds(path: Path) -> None:
    """Other prefixes of the cluster are reported with the nodes, once; what lacks the own range changes nothing."""
    told: list[tuple[str, ...]] = []
    listed = ListedNodes(load(path), path, lambda _nodes, cidrs: told.append(tuple(map(str, cidrs))))
    for cidrs in (["10.240.0.0/12"], ["10.240.0.0/12"], ["10.240.0.0/16"], ["10.240.0.0/13"]):
        write(path, [OWN, OTHER], cluster_cidrs=cidrs)
        listed.poll()
    assert told == [(), ("10.240.0.0/12",), ("10.240.0.0/13",)]


def test_other_changes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another key needs a start of the agent; the log says so, once."""
    listed, told = reports(path)
    write(path, [OWN, OTHER], mtu=1400)
    with caplog.at_level(logging.WARNING):
        listed.poll()
        listed.poll()
    assert len(told) == 1
    assert [record.message for record in caplog.records] == [
        "the configuration has changed: all but its nodes and cluster_cidrs takes effect when the agent starts again"
    ]


@pytest.mark.parametrize("text", ["nodes: [", "nodes: 7", None])
def test_unusable(path: Path, caplog: pytest.LogCaptureFixture, text: str | None) -> None:
    """A file that cannot be used changes nothing; the log says why, once; what comes after it counts again."""
    listed, told = reports(path)
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    with caplog.at_level(logging.ERROR):
        listed.poll()
        listed.poll()
    assert len(caplog.records) == 1
    assert str(path) in caplog.records[0].message
    write(path, [OWN])
    listed.poll()
    assert len(told) == 2


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([OWN, OWN], "n1 is there twice"),
        ([{**OWN, "pod_cidrs": ["10.245.0.0/16"]}], "n1, which is this node, lack its range 10.244.1.0/24"),
        ([{**OTHER, "addresses": []}], "addresses"),
        ([{**OTHER, "addresses": ["192.0.2.300"]}], "addresses"),
        ([{**OTHER, "pod_cidrs": ["10.0.0.1/24"]}], "host bits"),
        ([{**OTHER, "cidrs": []}], "nodes.*.pod_cidrs"),
    ],
)
def test_refused(path: Path, nodes: object, reason: str) -> None:
    """What makes no sense is refused with a reason."""
    write(path, nodes)
    with pytest.raises(ConfigError) as refused:
        load(path)
    assert reason in str(refused.value)

"""STATUS and VERSION as a runtime sees them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import pytest

from tests.node.machine import Machine, Netns, machine
from tests.node.verbs import VERSIONS, add, assert_refused, delete


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture
def netns() -> Iterator[Netns]:
    """Make a network namespace for a container."""
    it = Netns("verbs")
    yield it
    it.delete()


def test_version(node: Machine) -> None:
    """VERSION lists the versions, and needs nothing else."""
    outcome = node.cni("VERSION", ifname="", env={"CNI_PATH": ""})
    assert outcome.exit_code == 0
    assert outcome.json()["supportedVersions"] == list(VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_status(node: Machine, version: str) -> None:
    """STATUS succeeds without a word on a ready node; configurations before 1.1.0 do not have it."""
    outcome = node.cni("STATUS", ifname="", config={"cniVersion": version})
    if version == "1.1.0":
        assert (outcome.exit_code, outcome.stdout) == (0, "")
    else:
        assert_refused(outcome, 1, "does not allow STATUS")


def test_status_of_a_network_without_addresses(node: Machine, netns: Netns) -> None:
    """STATUS says 50 when the addresses of its own network have run out, and of no other one."""
    small = {"name": "small", "ipam": {"type": "podlane", "subnet": "10.79.0.0/30"}}  # two, one of them the gateway
    assert node.cni("STATUS", ifname="", config=small).exit_code == 0
    add(node, netns, **small)
    assert_refused(node.cni("STATUS", ifname="", config=small), 50, "10.79.0.0/30")
    assert node.cni("STATUS", ifname="").exit_code == 0
    delete(node, netns, **small)
    assert node.cni("STATUS", ifname="", config=small).exit_code == 0


def test_status_in_trouble(node: Machine) -> None:
    """STATUS says 51 when the kernel cannot be kept up to date: running pods are concerned as well. It recovers."""
    with sqlite3.connect(node.directory / "state" / "ipam.db", timeout=20) as db:
        db.execute("ALTER TABLE attachment RENAME TO hidden")

    def code() -> object:
        outcome = node.cni("STATUS", ifname="")
        return outcome.json()["code"] if outcome.exit_code else 0

    try:
        node.wait_for(lambda: code() == 51, "STATUS to say 51")
    finally:
        with sqlite3.connect(node.directory / "state" / "ipam.db", timeout=20) as db:
            db.execute("ALTER TABLE hidden RENAME TO attachment")
    node.wait_for(lambda: code() == 0, "STATUS to say that all is well")

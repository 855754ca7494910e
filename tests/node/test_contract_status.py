"""STATUS, from version 1.1.0 on: whether ADD can be served, quickly, whatever else the agent is busy with."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tests.node.contract import NEWEST, VERSIONS, Container, Delegate, assert_refused, container
from tests.node.machine import Machine, Outcome, machine

SMALL = {"name": "small", "ipam": {"type": "podlane", "subnet": "10.79.0.0/30"}}  # two addresses, one the gateway's


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share, with four addresses for pods."""
    ranges = [{"subnet": "10.244.0.0/24", "first": "10.244.0.10", "last": "10.244.0.13"}]
    with machine(tmp_path_factory.mktemp("node"), ranges=ranges) as it:
        it.add_uplink()
        it.start_agent()
        yield it
        assert not any(it.traces().values())


def status(node: Machine, **config: object) -> Outcome:
    """STATUS as libcni calls it: with the variables of an attachment empty."""
    return node.cni("STATUS", ifname="", config=config)


def assert_well(node: Machine, **config: object) -> None:
    """Assert that STATUS succeeds, and prints nothing."""
    outcome = status(node, **config)
    assert (outcome.exit_code, outcome.stdout) == (0, ""), outcome.stdout


def test_well(node: Machine) -> None:
    """1.4, P18: STATUS succeeds without a word if ADD can be served; before 1.1.0 there is none."""
    assert_well(node)
    for version in VERSIONS[:-1]:
        outcome = status(node, cniVersion=version)
        assert_refused(outcome, 1, "config version does not allow STATUS", version=version)


def test_needs_path_only(node: Machine) -> None:
    """1.1: of the environment STATUS needs CNI_COMMAND and CNI_PATH."""
    bad = {"CNI_CONTAINERID": "/", "CNI_IFNAME": "a b", "CNI_NETNS": "/nowhere", "CNI_ARGS": "x"}
    assert node.cni("STATUS", env=bad).exit_code == 0
    assert_refused(node.cni("STATUS", env={"CNI_PATH": ""}), 4, "CNI_PATH")


def test_exhausted(node: Machine) -> None:
    """G05: STATUS says 50 when the network's addresses have run out, and which; other commands go on as they do."""
    with ExitStack() as stack:
        them: list[Container] = [stack.enter_context(container(node)) for _ in range(5)]
        results = [it.add() for it in them[:4]]
        assert_refused(status(node), 50, "10.244.0.10-10.244.0.13", version=NEWEST)
        assert_refused(them[4].call("ADD"), 101, "10.244.0.10-10.244.0.13")
        assert_well(node, **SMALL)
        them[0].done("CHECK", prevResult=results[0])
        them[0].done("GC")
        them[0].done("DEL")
        assert_well(node)
        them[4].add()


def test_exhausted_network(node: Machine) -> None:
    """G05: of a network with ranges of its own these count, and no others."""
    with container(node, **SMALL) as it:
        assert_well(node, **SMALL)
        it.add()
        assert_refused(status(node, **SMALL), 50, "10.79.0.0/30")
        assert_well(node)
        it.done("DEL")
        assert_well(node, **SMALL)


def test_delegate(node: Machine) -> None:
    """G04, B43: the delegate's STATUS is asked, with all of stdin; its error comes out; ADD does not depend on it."""
    delegate = Delegate(node)
    with container(node, ipam=delegate.ipam) as it:
        assert_well(node, ipam=delegate.ipam)
        assert delegate.calls() == ["STATUS"]
        assert delegate.stdin("STATUS")["ipam"] == delegate.ipam
        delegate.fails("STATUS", {"code": 51, "msg": "leases run out", "details": "soon"})
        error = {"cniVersion": NEWEST, "code": 51, "msg": "leases run out", "details": "soon"}
        assert status(node, ipam=delegate.ipam).json() == error
        it.add()
        it.done("DEL")


def test_delegate_that_is_not_there(node: Machine) -> None:
    """G05, 1.4: STATUS says 50 if the delegate is nowhere on CNI_PATH."""
    assert_refused(status(node, ipam={"type": "nowhere"}), 50, '"nowhere"')


def test_delegate_that_hangs(node: Machine) -> None:
    """1.4: STATUS is bounded, also where a delegate is not, and says 50; nobody else waits for that."""
    plugin = node.directory / "bin" / "hangs"
    plugin.write_text("#!/bin/sh\nexec sleep 60\n")
    plugin.chmod(0o755)
    assert_refused(status(node, ipam={"type": "hangs"}), 50, "in time")
    assert_well(node)


@pytest.mark.parametrize("given", [{"vlan": 7}, {"portIsolation": True}, {"ipMasqBackend": "foo"}, {"mtu": "x"}])
def test_configuration_that_no_add_serves(node: Machine, given: dict[str, Any]) -> None:
    """1.4: STATUS speaks of ADD: what ADD would refuse in the configuration, STATUS refuses likewise."""
    with container(node) as it:
        added, told = it.call("ADD", **given).json(), status(node, **given).json()
    assert (told["code"], told["msg"]) == (added["code"], added["msg"])


def test_store_in_trouble(node: Machine) -> None:
    """1.2: while the agent cannot keep the kernel up to date it is 51: running pods may be cut off. It recovers."""
    with closing(sqlite3.connect(node.directory / "state" / "ipam.db", timeout=20)) as db, db:
        db.execute("ALTER TABLE attachment RENAME TO hidden")
    try:
        node.wait_for(lambda: status(node).exit_code == 1 and status(node).json()["code"] == 51, "STATUS to say 51")
    finally:
        with closing(sqlite3.connect(node.directory / "state" / "ipam.db", timeout=20)) as db, db:
            db.execute("ALTER TABLE hidden RENAME TO attachment")
    node.wait_for(lambda: status(node).exit_code == 0, "STATUS to say that all is well")


def test_agent_hangs(node: Machine) -> None:
    """G05, 1.4: of an agent that hangs STATUS says 50 in good time, by the launcher's own deadline."""
    assert node.agent
    os.kill(node.agent.pid, signal.SIGSTOP)
    try:
        assert_refused(status(node), 50, "deadline")
    finally:
        os.kill(node.agent.pid, signal.SIGCONT)
    assert_well(node)


def test_agent_is_away(node: Machine) -> None:
    """G05: of an agent that is dead STATUS says 50, and ADD 11; both succeed when it is back."""
    node.kill_agent()
    assert_refused(status(node), 50, "agent")
    with container(node) as it:
        assert_refused(it.call("ADD"), 11, "agent")
        node.start_agent()
        assert_well(node)
        it.add()

"""GC, from version 1.1.0 on: what is not among the valid attachments goes, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.node.contract import NEWEST, PLUGINS, VERSIONS, Container, Delegate, assert_refused, container, rows
from tests.node.machine import Machine, Outcome

KEYS = ("cni.dev/valid-attachments", "cni.dev/attachments")
keys = pytest.mark.parametrize("key", KEYS)


@pytest.fixture(scope="module")
def node(clean_node: Machine) -> Machine:
    """Share the node among all tests of this module."""
    return clean_node


@pytest.fixture
def three(node: Machine) -> Iterator[list[Container]]:
    """Make three containers that are attached."""
    with ExitStack() as stack:
        them = [stack.enter_context(container(node)) for _ in range(3)]
        for it in them:
            it.add()
        yield them


def gc(node: Machine, **config: object) -> Outcome:
    """GC as libcni calls it: with the variables of an attachment empty."""
    return node.cni("GC", ifname="", config=config)


def valid(*them: Container, ifname: str = "eth0") -> list[dict[str, str]]:
    """Return the list that names these containers."""
    return [{"containerID": it.netns.name, "ifname": ifname} for it in them]


@keys
def test_invalid_ones_go(node: Machine, three: list[Container], key: str) -> None:
    """G01: all that the list does not name goes, with devices, addresses and map entries; nothing is printed."""
    outcome = gc(node, **{key: valid(three[1])})
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert rows(node) == [three[1].netns.name]
    traces = node.traces()
    assert (len(traces["devices"]), len(traces["routes"]), traces["spool"]) == (1, 2, [])
    assert three[1].pings("192.0.2.1")


def test_needs_two_variables(three: list[Container]) -> None:
    """1.4: of the environment GC needs CNI_COMMAND and CNI_PATH, and nothing else has to be right."""
    env = {"CNI_CONTAINERID": "/", "CNI_IFNAME": "a b", "CNI_NETNS": "/nowhere", "CNI_ARGS": "x"}
    three[0].done("GC", env=env, **{KEYS[0]: valid(*three[:2])})
    assert rows(three[0].node) == sorted(it.netns.name for it in three[:2])
    assert_refused(three[0].call("GC", env={"CNI_PATH": ""}), 4, "CNI_PATH")


def test_interface_counts(node: Machine, three: list[Container]) -> None:
    """G01: an attachment is a container's interface; others of the same container are not meant."""
    three[0].add(ifname="net1")
    assert gc(node, **{KEYS[0]: [*valid(*three[1:]), *valid(three[0], ifname="net1")]}).exit_code == 0
    assert sorted(rows(node)) == sorted(it.netns.name for it in three)
    assert "net1" in three[0].netns.run("ip", "-o", "link").stdout
    assert "eth0" not in three[0].netns.run("ip", "-o", "link").stdout
    three[0].done("DEL", ifname="net1")


@keys
@pytest.mark.parametrize("nothing", [None, []])
def test_none_is_valid(node: Machine, three: list[Container], key: str, nothing: object) -> None:
    """G03: a list that is null (CRI-O without pods), or empty, says that nothing is valid."""
    assert gc(node, **{key: nothing}).exit_code == 0
    assert not any(node.traces().values())
    assert len(three) == 3


def test_no_list(node: Machine, three: list[Container]) -> None:
    """G03: without either key (libcni without arguments) GC does nothing."""
    assert gc(node).exit_code == 0
    assert rows(node) == sorted(it.netns.name for it in three)


def test_both_lists(node: Machine, three: list[Container]) -> None:
    """1.4: libcni sends the list under two keys; they may well be the same, and an attachment of either is valid."""
    both = valid(*three)
    assert gc(node, **{KEYS[0]: both, KEYS[1]: both}).exit_code == 0
    assert gc(node, **{KEYS[0]: both[:2], KEYS[1]: both[2:]}).exit_code == 0
    assert rows(node) == sorted(it.netns.name for it in three)


def test_more_than_there_is(node: Machine, three: list[Container]) -> None:
    """1.4: Multus names the attachments of all its networks; those that podlane does not know do not matter."""
    others = [{"containerID": f"other{number}", "ifname": f"net{number}"} for number in range(50)]
    assert gc(node, **{KEYS[0]: [*others, *valid(*three)]}).exit_code == 0
    assert rows(node) == sorted(it.netns.name for it in three)


def test_other_networks(node: Machine, three: list[Container]) -> None:
    """1.4: GC is of one network; attachments of others stay."""
    assert gc(node, name="another", **{KEYS[0]: []}).exit_code == 0
    assert rows(node) == sorted(it.netns.name for it in three)


@keys
@pytest.mark.parametrize("wrong", ["x", {}, [1], [{}], [{"containerID": "c"}], [{"containerID": 1, "ifname": "e"}]])
def test_bad_list(node: Machine, three: list[Container], key: str, wrong: object) -> None:
    """1.4: a list that cannot be read releases nothing: code 7, with the key."""
    assert_refused(gc(node, **{key: wrong}), 7, "cni.dev", version=NEWEST)
    assert rows(node) == sorted(it.netns.name for it in three)


def test_not_before_1_1_0(node: Machine, three: list[Container]) -> None:
    """P18: configurations before 1.1.0 have no GC."""
    for version in VERSIONS[:-1]:
        assert_refused(gc(node, cniVersion=version, **{KEYS[0]: []}), 1, "does not allow GC", version=version)
    assert rows(node) == sorted(it.netns.name for it in three)


@keys
def test_delegate(node: Machine, key: str) -> None:
    """G02, B43: what goes is taken back by the delegate's DEL, as ADD was called, and then it has its own GC."""
    delegate = Delegate(node)
    with container(node, ipam=delegate.ipam) as it:
        it.add(env={"CNI_ARGS": "IgnoreUnknown=1;A=b"})
        delegate.forget()
        config: dict[str, Any] = {"ipam": delegate.ipam, key: []}
        assert gc(node, **config).exit_code == 0
        assert delegate.calls() == ["DEL", "GC"]
        assert delegate.env("DEL")["CNI_ARGS"] == "IgnoreUnknown=1;A=b"
        assert delegate.stdin("GC") == {"cniVersion": NEWEST, "name": "podlane", "type": "podlane", **config}
        assert rows(node) == []


def test_goes_on_after_errors(node: Machine, three: list[Container]) -> None:
    """1.4: what fails does not keep GC from the rest; the errors are told in the end, and a later GC heals."""
    delegate = Delegate(node)
    with container(node, ipam=delegate.ipam) as it:
        it.add()
        for command in ("DEL", "GC"):
            delegate.fails(command, {"code": 77, "msg": f"no {command} today"})
        config: dict[str, Any] = {"ipam": delegate.ipam, KEYS[0]: []}
        assert_refused(gc(node, **config), 77, "no DEL today", "no GC today", version=NEWEST)
        assert rows(node) == [it.netns.name]
        assert len(three) == 3
        for command in ("DEL", "GC"):
            delegate.fails(command, None)
        assert gc(node, **config).exit_code == 0
        assert rows(node) == []


def test_delegate_without_gc(node: Machine, tmp_path: Path) -> None:
    """G02: Debian's host-local is older than GC: its part of it is the DEL of what goes, and that is no failure."""
    ipam = {"type": "host-local", "subnet": "10.66.0.0/24", "dataDir": str(tmp_path)}
    it = Container(node, node.add_netns("contract"), {"ipam": ipam})
    it.add(env={"CNI_PATH": PLUGINS}, cniVersion="1.0.0")
    env = {"CNI_PATH": PLUGINS, "CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": ""}
    for valid_now in ([it], []):
        it.done("GC", env=env, cniVersion=NEWEST, **{KEYS[0]: valid(*valid_now)})
        assert len(rows(node)) == len(list(tmp_path.glob("*/10.*"))) == len(valid_now)
    assert_refused(it.call("STATUS", env=env, cniVersion=NEWEST), 50, "host-local", "1.0.0", version=NEWEST)

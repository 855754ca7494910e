"""CHECK on a real node: it succeeds as long as all is as ADD left it, and names what is not."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.node.machine import Machine, Outcome, TestPod, machine, run
from tests.node.programs import wait_settled

VERSIONS = ("0.4.0", "1.0.0", "1.1.0")
MAC = "02:00:00:00:00:99"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture
def pod(node: Machine) -> Iterator[TestPod]:
    """Make a pod, and delete it whatever was done to it."""
    it = node.make_pod("check")
    yield it
    node.delete_pod(it)
    assert node.traces()["rows"] == []


def check(node: Machine, pod: TestPod, **config: object) -> Outcome:
    """CHECK a pod, with the result of its ADD as prevResult if `config` has no other."""
    return node.cni(
        "CHECK",
        container_id=pod.container_id,
        netns=str(pod.netns.path),
        config={"prevResult": pod.result, **config},
    )


def assert_healthy(node: Machine, pod: TestPod, **config: object) -> None:
    """Assert that CHECK succeeds, and prints nothing."""
    outcome = check(node, pod, **config)
    assert (outcome.exit_code, outcome.stdout) == (0, "")


def assert_named(outcome: Outcome, *words: str, code: int = 103) -> None:
    """Assert that CHECK failed, and said all of these words."""
    assert outcome.exit_code == 1
    error = outcome.json()
    assert error["code"] == code, error
    assert [word for word in words if word not in error["msg"]] == [], error


@pytest.mark.parametrize("version", VERSIONS)
def test_healthy(node: Machine, version: str) -> None:
    """CHECK succeeds right after ADD, and later, in every version that has it."""
    netns = node.add_netns("check")
    ids: Any = {"container_id": netns.name, "netns": str(netns.path)}
    added = node.cni("ADD", **ids, config={"cniVersion": version})
    pod = TestPod(netns, netns.name, added.json())
    for _ in range(3):
        assert_healthy(node, pod, cniVersion=version)
    wait_settled(node, pod)
    assert_healthy(node, pod, cniVersion=version)
    node.delete_pod(pod)


@pytest.mark.parametrize("nothing", [None, {}])
def test_needs_prev_result(node: Machine, pod: TestPod, nothing: object) -> None:
    """Without prevResult there is nothing to compare with: CHECK fails and says so."""
    outcome = check(node, pod, prevResult=nothing)
    assert outcome.exit_code == 1
    assert "prevResult" in outcome.json()["msg"]


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.3.1"])
def test_not_before_0_4_0(node: Machine, pod: TestPod, version: str) -> None:
    """Configurations before 0.4.0 do not have CHECK."""
    assert_named(check(node, pod, cniVersion=version), "does not allow CHECK", code=1)


@pytest.mark.parametrize(
    ("commands", "words"),
    [
        (["link set eth0 down", "link set eth0 name other"], ["interface eth0 is missing"]),
        (["link set eth0 down"], ["interface eth0 is down"]),
        (["link set eth0 mtu 9000"], ["eth0 has MTU 9000", "1500"]),
        ([f"link set eth0 address {MAC}"], [f"eth0 has MAC address {MAC}, not 02:"]),
        (["address del {4}/32 dev eth0"], ["address {4}/32 is missing"]),
        (["address del {6}/128 dev eth0"], ["address {6}/128 is missing"]),
        (
            ["-4 address flush dev eth0", "address add {4}/16 dev eth0"],
            ["address {4}/32 is missing", "route 0.0.0.0/0"],
        ),
        (["route del default"], ["route 0.0.0.0/0 via 169.254.1.1 is missing"]),
        (["-6 route del default"], ["route ::/0 via fe80::1 is missing"]),
        (["route replace default dev lo"], ["route 0.0.0.0/0 via 169.254.1.1 is missing"]),
        (["neigh del 169.254.1.1 dev eth0"], ["neighbour 169.254.1.1 is missing"]),
        ([f"neigh replace fe80::1 lladdr {MAC} dev eth0"], [f"neighbour fe80::1 is {MAC}"]),
    ],
)
def test_altered_in_the_pod(node: Machine, pod: TestPod, commands: list[str], words: list[str]) -> None:
    """What was taken from the pod or changed there is named; taking it back heals nothing of it by itself."""
    addresses = {"4": pod.addresses[0], "6": pod.addresses[1]}
    named = [word.replace("{4}", addresses["4"]).replace("{6}", addresses["6"]) for word in words]
    for command in commands:
        filled = command.replace("{4}", addresses["4"]).replace("{6}", addresses["6"])
        pod.netns.run("ip", *filled.split())
    for _ in range(2):
        assert_named(check(node, pod), *named)


@pytest.mark.parametrize(
    "command",
    [
        "address add 192.0.2.77/24 dev eth0",
        "address add 2001:db8::77/64 dev eth0 nodad",
        "route add 198.51.100.0/24 via 169.254.1.1",
        "-6 route add 2001:db8:1::/64 via fe80::1 dev eth0",
        "rule add from 192.0.2.77 lookup 100",
        "link add extra type veth peer name extra2",
        "link set eth0 mtu 1300",
        "link set eth0 promisc on",
        "neigh add 192.0.2.78 lladdr 02:00:00:00:00:01 dev eth0",
    ],
)
def test_additions_are_tolerated(node: Machine, pod: TestPod, command: str) -> None:
    """What later plugins, or the pod itself, have added is no fault."""
    pod.netns.run("ip", *command.split())
    assert_healthy(node, pod)


def test_routes_may_move_to_another_table(node: Machine, pod: TestPod) -> None:
    """Routes in a table of their own, as sbr puts them, are there."""
    for command in ("route add default via 169.254.1.1 dev eth0 table 100", "route del default table main"):
        pod.netns.run("ip", *command.split())
    assert_healthy(node, pod)


def test_prev_result_edited(node: Machine, pod: TestPod) -> None:
    """A route that a meta plugin took away, and out of the result, is not missed; an address of another pod is."""
    edited = {**pod.result, "routes": [each for each in pod.result["routes"] if each["dst"] != "0.0.0.0/0"]}
    pod.netns.run("ip", "route", "del", "default")
    assert_healthy(node, pod, prevResult=edited)
    text = json.dumps(edited).replace(pod.addresses[0], "10.244.0.200")
    outcome = check(node, pod, prevResult=json.loads(text))
    assert_named(
        outcome,
        f"address {pod.addresses[0]} is reserved, but not in prevResult",
        "address 10.244.0.200 is in prevResult, but not reserved",
    )


def test_another_namespace(node: Machine, pod: TestPod) -> None:
    """The same names in another network namespace are not the pod."""
    other = node.make_pod("other")
    assert_named(check(node, replace(pod, netns=other.netns)), "CNI_NETNS is another network namespace than at ADD")
    node.delete_pod(other)


def test_unknown_attachment(node: Machine, pod: TestPod) -> None:
    """An attachment that was never made, or is not any more, has no reservation."""
    assert_named(check(node, replace(pod, container_id="never")), "no addresses are reserved")
    for table, words in (
        ("address", f"address {pod.addresses[0]} is in prevResult, but not reserved"),
        ("attachment", "no addresses are reserved"),
    ):
        with sqlite3.connect(node.directory / "state" / "ipam.db") as db:
            db.execute(f"DELETE FROM {table}")  # noqa: S608
        assert_named(check(node, pod), words)
    node.netns.run("ip", "link", "delete", pod.device)  # nobody knows it any more


def test_host_end(node: Machine, pod: TestPod) -> None:
    """A host end with another MAC address, or under another name, is named."""
    node.netns.run("ip", "link", "set", pod.device, "address", MAC)
    assert_named(check(node, pod), f"host device {pod.device} has MAC address {MAC}")
    node.netns.run("ip", "link", "set", pod.device, "name", "renamed")
    assert_named(check(node, pod), f"host device {pod.device} is missing")
    node.netns.run("ip", "link", "set", "renamed", "name", pod.device)


def endpoint_pin(node: Machine) -> str:
    """Return the path of the pinned endpoint map."""
    (pin,) = (node.bpffs / "maps").glob("endpoints*")
    return str(pin)


def test_datapath_is_read_from_the_kernel(tmp_path: Path) -> None:
    """CHECK looks at what is in the kernel now: what was taken away since is put back before it succeeds."""
    with machine(tmp_path, resync_seconds=3600.0) as node:  # nobody else looks in the meantime
        node.add_uplink()
        node.start_agent()
        pod = node.make_pod()
        before = node.endpoints()
        for entry in before:
            run("bpftool", "map", "delete", "pinned", endpoint_pin(node), "key", *json.loads(entry.replace("'", '"')))
        assert node.endpoints() == []
        assert_healthy(node, pod)
        assert sorted(node.endpoints()) == sorted(before)
        wait_settled(node, pod)
        for link in (node.bpffs / "links").glob("pl*"):
            run("bpftool", "link", "detach", "pinned", str(link))
        assert_healthy(node, pod)
        assert node.pings(pod, "192.0.2.1")
        assert node.repairs().keys() >= {"endpoints", "hooks"}
        assert_healthy(node, pod)


def test_datapath_that_cannot_be_put_right(node: Machine, pod: TestPod) -> None:
    """What keeps the host from reaching the pod, and is not podlane's to change, is named."""
    route = ["ip", "route", "replace", f"{pod.addresses[0]}/32", "dev", "lo"]
    node.netns.run("ip", "route", "del", f"{pod.addresses[0]}/32", "proto", "112")
    node.netns.run(*route)
    assert_named(check(node, pod), pod.addresses[0], code=102)
    node.netns.run("ip", "route", "del", f"{pod.addresses[0]}/32", "dev", "lo")
    assert_healthy(node, pod)

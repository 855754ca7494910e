"""ADD, DEL and CHECK, with delegation, concurrency and sudden ends (specification 1.1.0, section 2 and 4)."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from tests.node.contract import (
    PLUGINS,
    VERSIONS,
    WITH_CHECK,
    WITH_LISTS,
    Container,
    Delegate,
    assert_refused,
    container,
    rows,
)
from tests.node.machine import LAUNCHER, Machine

OTHER_MAC = "02:00:00:00:00:99"
OTHERS_ETH0 = ("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
versions = pytest.mark.parametrize("version", VERSIONS)
with_check = pytest.mark.parametrize("version", WITH_CHECK)


@pytest.fixture(scope="module")
def node(clean_node: Machine) -> Machine:
    """Share the node among all tests of this module."""
    return clean_node


@pytest.fixture
def delegate(node: Machine) -> Delegate:
    """Make a delegate that gives 10.66.0.2/24."""
    return Delegate(node)


def devices(node: Machine) -> list[str]:
    """Return the host ends on the node."""
    return node.traces()["devices"]


# ADD


@versions
def test_second_add(it: Container, version: str) -> None:
    """B37, H03: ADD of an interface that the container has fails, and the first one does not notice."""
    it.add(cniVersion=version)
    before = it.node.traces()["rows"], it.netns.run("ip", "-o", "address").stdout
    assert_refused(it.call("ADD", cniVersion=version), 100, it.netns.name, version=version)
    assert (it.node.traces()["rows"], it.netns.run("ip", "-o", "address").stdout) == before
    assert it.pings("192.0.2.1")


@versions
def test_interface_of_somebody_else(it: Container, version: str) -> None:
    """B37, B53: ADD fails if the namespace has that name; it stays, no device is left, no address is taken."""
    it.netns.run(*OTHERS_ETH0)
    assert_refused(it.call("ADD", cniVersion=version), 102, "eth0", version=version)
    assert (rows(it.node), devices(it.node)) == ([], [])
    assert "eth0@other" in it.netns.run("ip", "link", "show", "eth0").stdout


@versions
def test_second_interface(it: Container, version: str) -> None:
    """B38: the same container may have another interface, which goes by itself."""
    it.add(cniVersion=version)
    it.add(cniVersion=version, ifname="net1")
    assert rows(it.node) == [it.netns.name] * 2
    it.done("DEL", cniVersion=version, ifname="net1")
    assert rows(it.node) == [it.netns.name]
    assert it.pings("192.0.2.1")


@versions
def test_failed_add_is_undone(it: Container, delegate: Delegate, version: str) -> None:
    """B15, B27, B44, B53: what ADD had begun is undone before it answers, by the delegate's DEL, too."""
    delegate.fails("ADD", {"code": 123, "msg": "no lease"})
    outcome = it.call("ADD", cniVersion=version, ipam=delegate.ipam)
    assert_refused(outcome, 123, "no lease", version=version)
    delegate.fails("ADD", None)
    it.netns.run(*OTHERS_ETH0)
    assert_refused(it.call("ADD", cniVersion=version, ipam=delegate.ipam), 102, "eth0", version=version)
    assert delegate.calls() == ["ADD", "DEL"] * 2
    assert (rows(it.node), devices(it.node)) == ([], [])


@versions
def test_default_route_twice(it: Container, version: str) -> None:
    """B50: isDefaultGateway beside IPAM's own default route without a gateway is one default route."""
    ipam = {"type": "podlane", "subnet": "10.66.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}
    it.add(cniVersion=version, isDefaultGateway=True, ipMasq=True, ipam=ipam)
    assert len(it.netns.run("ip", "route", "show", "default").stdout.splitlines()) == 1
    assert it.pings("192.0.2.1")


# DEL


@versions
def test_delete_again_and_again(it: Container, version: str) -> None:
    """T08, H05: DEL succeeds repeatedly, and of a container that never was."""
    it.done("DEL", cniVersion=version)
    it.add(cniVersion=version)
    for _ in range(3):
        it.done("DEL", cniVersion=version)
    assert it.node.traces()["devices"] == []


@pytest.mark.parametrize("path", ["", "/nowhere", "/run/netns/gone", "/etc/passwd", "/proc/self/ns/uts"])
@versions
def test_delete_without_namespace(it: Container, version: str, path: str) -> None:
    """B35, B36, B52: with CNI_NETNS empty, dangling, or no namespace, DEL releases everything that there is."""
    it.add(cniVersion=version)
    it.done("DEL", cniVersion=version, env={"CNI_NETNS": path})
    assert not any(it.node.traces().values())


@versions
def test_delete_when_all_is_gone(it: Container, version: str) -> None:
    """B35, T08: when interface, or the whole namespace with it, are gone already, DEL releases the address."""
    it.add(cniVersion=version)
    it.netns.run("ip", "link", "delete", "eth0")
    it.done("DEL", cniVersion=version)
    assert not any(it.node.traces().values())
    it.add(cniVersion=version)
    it.netns.delete()
    it.done("DEL", cniVersion=version)
    assert not any(it.node.traces().values())


@versions
def test_delete_with_any_prev_result(it: Container, version: str) -> None:
    """X04: prevResult, absent, empty, or that of another container, makes no difference to DEL."""
    foreign = {"cniVersion": version, "interfaces": [{"name": "eth9", "sandbox": "/run/netns/other"}], "ips": []}
    variants: list[dict[str, Any]] = [{}, {"prevResult": None}, {"prevResult": {}}, {"prevResult": foreign}]
    for given in variants:
        it.add(cniVersion=version)
        it.done("DEL", cniVersion=version, **given)
        assert rows(it.node) == []


WRONG: tuple[dict[str, Any], ...] = (
    {"mtu": "1400"},
    {"ipam": []},
    {"dns": 7},
    {"runtimeConfig": {"portMappings": [{"hostPort": 70000}], "bandwidth": {"ingressRate": "x"}}},
    {"args": "x", "prevResult": "x"},
)


@versions
def test_delete_with_a_wrong_configuration(it: Container, version: str) -> None:
    """1.4: what ADD refuses in the configuration keeps DEL from nothing, be it there since ADD failed, or ADD did not.

    A runtime calls DEL after a failed ADD, too, and a pod for which it fails does not end.
    """
    for wrong in WRONG:
        assert_refused(it.call("ADD", cniVersion=version, **wrong), 7, version=version)
        it.done("DEL", cniVersion=version, **wrong)
        it.add(cniVersion=version)
        it.done("DEL", cniVersion=version, **wrong)
        assert rows(it.node) == []


@versions
def test_delete_after_failed_add(it: Container, version: str) -> None:
    """1.4: the DEL after a failed ADD has no prevResult, and succeeds."""
    it.netns.run(*OTHERS_ETH0)
    assert it.call("ADD", cniVersion=version).exit_code == 1
    it.done("DEL", cniVersion=version)
    it.netns.run("ip", "link", "show", "eth0")  # which is not podlane's


@versions
def test_delete_fails_with_the_delegate(it: Container, delegate: Delegate, version: str) -> None:
    """B44, H05: DEL calls the delegate, also for what podlane does not know, and fails with it; it is repeatable."""
    it.done("DEL", cniVersion=version, ipam=delegate.ipam)
    assert delegate.calls() == ["DEL"]
    it.add(cniVersion=version, ipam=delegate.ipam)
    delegate.fails("DEL", {"code": 11, "msg": "the server is away"})
    for _ in range(2):
        assert_refused(it.call("DEL", cniVersion=version, ipam=delegate.ipam), 11, "the server is away")
        assert rows(it.node) == [it.netns.name]
    delegate.fails("DEL", None)
    it.done("DEL", cniVersion=version, ipam=delegate.ipam)
    assert rows(it.node) == []


# CHECK


@with_check
def test_check_at_once(it: Container, version: str) -> None:
    """B40: CHECK succeeds immediately after ADD, as CRI-O calls it, and ever after; nothing is printed."""
    result = it.add(cniVersion=version)
    for _ in range(5):
        it.done("CHECK", cniVersion=version, prevResult=result)


@pytest.mark.parametrize("given", [{}, {"prevResult": None}])
@with_check
def test_check_needs_prev_result(it: Container, version: str, given: dict[str, Any]) -> None:
    """1.4: CHECK without prevResult is an error, whatever state the container is in."""
    assert_refused(it.call("CHECK", cniVersion=version, **given), 7, "Required prevResult missing", version=version)
    it.add(cniVersion=version)
    assert_refused(it.call("CHECK", cniVersion=version, **given), 7, "Required prevResult missing", version=version)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("link set eth0 down name gone", ["eth0"]),
        ("link set eth0 down", ["eth0", "down"]),
        (f"link set eth0 address {OTHER_MAC}", [OTHER_MAC]),
        ("address delete {}/32 dev eth0", ["is missing"]),
        ("route delete default", ["route 0.0.0.0/0"]),
        ("-6 route delete default", ["route ::/0"]),
    ],
)
@with_check
def test_check_sees(it: Container, version: str, damage: str, words: list[str]) -> None:
    """B40: CHECK names an interface, address or route that is missing, or is not as it was."""
    result = it.add(cniVersion=version)
    address = result["ips"][0]["address"].partition("/")[0]
    it.netns.run("ip", *damage.format(address).split())
    assert_refused(it.call("CHECK", cniVersion=version, prevResult=result), 103, *words, version=version)


@with_check
def test_check_sees_the_reservation(it: Container, version: str) -> None:
    """H23: CHECK fails if the address is not reserved for the container any more, or is another's by now."""
    result = it.add(cniVersion=version)
    it.done("DEL", cniVersion=version)
    assert_refused(it.call("CHECK", cniVersion=version, prevResult=result), 103, "reserved", version=version)
    again = it.add(cniVersion=version)
    assert_refused(it.call("CHECK", cniVersion=version, prevResult=result), 103, "reserved", version=version)
    it.done("CHECK", cniVersion=version, prevResult=again)


@with_check
def test_check_tolerates_additions(it: Container, version: str) -> None:
    """B41, X03: what later plugins add, and a MAC address that they change and record, is no fault."""
    result = it.add(cniVersion=version)
    for command in (
        "address add 198.18.0.1/24 dev eth0",
        "route add 198.19.0.0/16 dev eth0",
        "link add other type veth",
        f"link set eth0 address {OTHER_MAC}",
        "link set eth0 mtu 1400",
    ):
        it.netns.run("ip", *command.split())
    result["interfaces"][1]["mac"] = OTHER_MAC
    result["interfaces"].append({"name": "ifb0", "mac": "02:00:00:00:00:98"})
    result["ips"].append({**result["ips"][0], "address": "198.18.0.1/24", "gateway": "198.18.0.254"})
    it.done("CHECK", cniVersion=version, prevResult=result)


@with_check
def test_check_tolerates_routes_that_went(it: Container, version: str) -> None:
    """2.4: a route that was taken away, and out of prevResult, is not missed (Multus moves default routes)."""
    result = it.add(cniVersion=version)
    it.netns.run("ip", "route", "delete", "default")
    result["routes"] = [route for route in result["routes"] if route["dst"] != "0.0.0.0/0"]
    it.done("CHECK", cniVersion=version, prevResult=result)


# Delegation


@versions
def test_delegate_is_given_everything(it: Container, delegate: Delegate, version: str) -> None:
    """B43, 1.5: the delegate gets all of stdin, and the variables, as they came, with each command.

    Only in the prevResult of CHECK it finds its own address and gateway, where podlane has put others into the result.
    """
    delegate.gives({"cniVersion": "1.0.0", "ips": [{"address": "10.66.0.2/24", "gateway": "10.66.0.254"}]})
    given = {"cniVersion": version, "ipam": delegate.ipam, "unknown": {"a": [1.5, "x"]}, "bridge": "cni0"}
    env = {"CNI_ARGS": "IgnoreUnknown=1;A=b"}
    result = it.add(env=env, **given)
    more = {"prevResult": result} if version in WITH_CHECK else {}
    commands = ["ADD", *(["CHECK"] if version in WITH_CHECK else []), "DEL"]
    for command in commands[1:]:
        it.done(command, env=env, **given, **more)
    assert delegate.calls() == commands
    for command in commands:
        added = {} if command == "ADD" else more
        if command == "CHECK":
            (ip,) = result["ips"]
            its = {**result, "ips": [{**ip, "address": "10.66.0.2/24", "gateway": "10.66.0.254"}]}
            added = {"prevResult": its}
        assert delegate.stdin(command) == {"name": "podlane", "type": "podlane", **given, **added}
        assert delegate.env(command) == {
            "CNI_ARGS": env["CNI_ARGS"],
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": it.netns.name,
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": str(it.netns.path),
            "CNI_PATH": str(it.node.directory / "bin"),
        }


# Concurrency, and sudden ends


def test_many_at_once(node: Machine) -> None:
    """IO8, B40, B46, H24: concurrent ADDs of different containers, each with a CHECK at once, give each its own."""

    def added_and_checked(it: Container) -> Any:  # noqa: ANN401
        result = it.add()
        it.done("CHECK", prevResult=result)
        return result

    with ExitStack() as stack:
        many = [stack.enter_context(container(node)) for _ in range(16)]
        with ThreadPoolExecutor(16) as pool:
            results = list(pool.map(added_and_checked, many))
            addresses = [ip["address"].partition("/")[0] for result in results for ip in result["ips"]]
            assert len(set(addresses)) == 32
            assert all(pool.map(lambda it: it.pings(addresses[0]), many[1:]))
            list(pool.map(lambda it: it.done("DEL"), many))
    assert not any(node.traces().values())


def test_same_one_at_once(it: Container) -> None:
    """IO8, H03: of several ADDs of one interface at a time one succeeds, and the others do not touch what it made."""
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda _: it.call("ADD"), range(8)))
    (result,) = [each.json() for each in outcomes if each.exit_code == 0]
    for each in outcomes:
        if each.exit_code:
            assert_refused(each, 100)
    assert len(devices(it.node)) == 1
    it.done("CHECK", prevResult=result)
    assert it.pings("192.0.2.1")


def test_added_and_deleted_at_once(it: Container) -> None:
    """IO8: whatever order ADDs and DELs of one interface come in, what is left is what the last of them made."""
    for _ in range(5):
        with ThreadPoolExecutor(6) as pool:
            outcomes = list(pool.map(it.call, ["ADD", "DEL"] * 3))
        assert {each.exit_code for each in outcomes[1::2]} == {0}
        assert len(rows(it.node)) == len(devices(it.node)) <= 1
        it.done("DEL")
        assert not any(it.node.traces().values())


@pytest.mark.parametrize("version", WITH_LISTS)
def test_beside_loopback(it: Container, version: str) -> None:
    """X05: ADD works while another plugin works in the same namespace, as containerd's loopback does."""
    given = {"cniVersion": "0.3.1", "name": "cni-loopback", "type": "loopback"}
    environment = {
        "CNI_CONTAINERID": it.netns.name,
        "CNI_NETNS": str(it.netns.path),
        "CNI_IFNAME": "lo",
        "CNI_PATH": PLUGINS,
    }
    for _ in range(5):
        with subprocess.Popen(
            it.node.netns.command(f"{PLUGINS}/loopback"),
            env={**environment, "CNI_COMMAND": "ADD"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        ) as loopback:
            assert loopback.stdin
            loopback.stdin.write(json.dumps(given).encode())
            loopback.stdin.close()
            result = it.add(cniVersion=version)
        assert loopback.returncode == 0
        assert it.pings(result["ips"][0]["address"].partition("/")[0])
        it.done("DEL", cniVersion=version)


def test_killed_at_any_moment(it: Container) -> None:
    """IO8, X06: a launcher killed during ADD leaves nothing that its DEL does not take, or the next ADD minds."""
    environment = {
        "PATH": os.environ["PATH"],
        "PODLANE_SOCKET": f"{it.node.directory}/cni.sock",
        "PODLANE_SPOOL": f"{it.node.directory}/spool",
        "CNI_COMMAND": "ADD",
        "CNI_CONTAINERID": it.netns.name,
        "CNI_NETNS": str(it.netns.path),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/",
    }
    stdin = json.dumps({"cniVersion": "1.1.0", "name": "podlane", "type": "podlane"}).encode()
    for milliseconds in range(0, 60, 4):
        with subprocess.Popen(
            it.node.netns.command(str(LAUNCHER)), env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        ) as launcher:
            assert launcher.stdin
            launcher.stdin.write(stdin)
            launcher.stdin.close()
            time.sleep(milliseconds / 1000)
            launcher.kill()
        it.done("DEL")
        it.add()
        assert it.pings("192.0.2.1")
        it.done("DEL")
    assert not any(it.node.traces().values())

"""ADD as a runtime sees it: what it answers in each version's form, what it honours, and what it leaves behind."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping

import pytest

from agent.wiring import HOST_MAC
from tests.node.machine import Machine, Netns, machine
from tests.node.verbs import VERSIONS, add, assert_refused, delete, traces

DEFAULT_4, DEFAULT_6 = {"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}
SECOND = {
    "name": "second",
    "ipMasq": True,
    "ipam": {"type": "podlane", "subnet": "10.77.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]},
}


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


@pytest.mark.parametrize("version", VERSIONS)
def test_add_and_delete(node: Machine, netns: Netns, version: str) -> None:
    """ADD answers in the exact form of each version, with what the kernel has; DEL takes all of it away."""
    before = traces(node)
    outcome = add(node, netns, cniVersion=version)
    assert outcome.exit_code == 0, outcome.stdout
    result = outcome.json()
    assert result == expected_result(version, netns, result)
    (device,) = (name for name in traces(node)["devices"] if name not in before["devices"])
    assert result.get("interfaces", [{"name": device}])[0]["name"] == device
    assert node.netns.run("ip", "-br", "link", "show", device).stdout.split()[2] == HOST_MAC
    delete(node, netns, cniVersion=version)
    assert traces(node) == before
    assert node.traces()["links"] == []


def expected_result(version: str, netns: Netns, result: Mapping[str, list[dict[str, str]]]) -> dict[str, object]:
    """Return the result of a version, by specification and kernel; only the host end's name is taken from ours."""
    (eth0,) = json.loads(netns.run("ip", "-j", "address", "show", "eth0").stdout)
    addresses = {each["family"]: each["local"] for each in eth0["addr_info"] if each["scope"] == "global"}
    if version < "0.3.0":
        return {
            "cniVersion": version,
            "ip4": {"ip": f"{addresses['inet']}/32", "gateway": "169.254.1.1", "routes": [DEFAULT_4]},
            "ip6": {"ip": f"{addresses['inet6']}/128", "gateway": "fe80::1", "routes": [DEFAULT_6]},
            "dns": {},
        }
    mtu = {"mtu": 1500} if version == "1.1.0" else {}
    old = version < "1.0.0"
    body: dict[str, object] = {
        "cniVersion": version,
        "interfaces": [
            {"name": result["interfaces"][0]["name"], "mac": HOST_MAC, **mtu},
            {"name": "eth0", "mac": eth0["address"], "sandbox": str(netns.path), **mtu},
        ],
        "ips": [
            {"interface": 1, "address": f"{addresses['inet']}/32", "gateway": "169.254.1.1"}
            | ({"version": "4"} if old else {}),
            {"interface": 1, "address": f"{addresses['inet6']}/128", "gateway": "fe80::1"}
            | ({"version": "6"} if old else {}),
        ],
        "routes": [DEFAULT_4, DEFAULT_6],
    }
    return body | ({"dns": {}} if old else {})


def test_second_add_is_refused(node: Machine, netns: Netns) -> None:
    """A second ADD of a container's interface fails with code 100, and the first one does not notice."""
    first = add(node, netns).json()
    before = traces(node), netns.run("ip", "address").stdout
    assert_refused(add(node, netns), 100, netns.name)
    assert (traces(node), netns.run("ip", "address").stdout) == before
    for each in first["ips"]:
        node.netns.run("ping", "-c", "1", "-W", "2", each["address"].partition("/")[0])
    delete(node, netns)


def test_second_interface(node: Machine, netns: Netns) -> None:
    """Another interface of a container, on the same network or another one, leaves the first one's routes in front.

    Its own default routes stand behind those; its own subnets lead to it. Each is deleted by itself.
    """
    before = traces(node)
    add(node, netns)
    with_one, first = traces(node), routes(netns)
    for config in ({}, SECOND):
        outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), ifname="net1", config=config)
        assert outcome.exit_code == 0, outcome.stdout
        assert [line for line in routes(netns) if "net1" not in line] == first
        for address in ("192.0.2.1", "2001:db8::1"):
            assert " dev eth0 " in netns.run("ip", "route", "get", address).stdout
        if config:
            assert " dev net1 " in netns.run("ip", "route", "get", "10.77.0.99").stdout
        own = outcome.json()["ips"][0]["address"].partition("/")[0]
        node.netns.run("ping", "-c", "1", "-W", "2", own)
        netns.run("ping", "-c", "1", "-W", "2", "-I", own, "192.0.2.1")
        netns.run("ping", "-c", "1", "-W", "2", "-I", "net1", "192.0.2.1")
        outcome = node.cni("DEL", container_id=netns.name, netns=str(netns.path), ifname="net1", config=config)
        assert outcome.exit_code == 0, outcome.stdout
        assert traces(node) == with_one
    delete(node, netns)
    assert traces(node) == before


def routes(netns: Netns) -> list[str]:
    """Return the routes of a namespace, both families."""
    return [line for family in ("-4", "-6") for line in netns.run("ip", family, "route").stdout.splitlines()]


def test_interface_exists_already(node: Machine, netns: Netns) -> None:
    """ADD fails if the name is taken in the namespace: what is there stays, nothing else does, the address is free."""
    netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    before = traces(node), netns.run("ip", "-o", "link").stdout
    outcome = add(node, netns)
    assert_refused(outcome, 102, "eth0", "already")
    assert (traces(node), netns.run("ip", "-o", "link").stdout) == before


def test_harmless_fields(node: Machine, netns: Netns) -> None:
    """Fields that podlane does not know, and empty ones, are no obstacle."""
    unknown = {"type": "podlane", "capabilities": {"mac": True}, "runtimeConfig": {"x": 1}, "another": {"y": "z"}}
    assert add(node, netns, ipam={}, prevResult=None, dns={}, **unknown).exit_code == 0
    delete(node, netns)


@pytest.mark.parametrize(
    ("configured", "uplink", "expected"), [(1280, 1500, 1280), (9000, 1500, 9000), (0, 1400, 1400)]
)
def test_mtu(node: Machine, netns: Netns, configured: int, uplink: int, expected: int) -> None:
    """The MTU is the configured one, else the uplink's: in the result, and at both ends."""
    node.netns.run("ip", "link", "set", "uplink", "mtu", str(uplink))
    result = add(node, netns, mtu=configured).json()
    node.netns.run("ip", "link", "set", "uplink", "mtu", "1500")
    assert [each["mtu"] for each in result["interfaces"]] == [expected, expected]
    assert f" mtu {expected} " in netns.run("ip", "link", "show", "eth0").stdout
    assert f" mtu {expected} " in node.netns.run("ip", "link", "show", result["interfaces"][0]["name"]).stdout
    delete(node, netns)


def test_mac(node: Machine, netns: Netns) -> None:
    """The MAC address that is asked for is the pod's; runtimeConfig counts more than args, and these than CNI_ARGS."""
    weak, middle, strong = (f"02:00:00:00:00:0{number}" for number in (1, 2, 3))
    given: dict[str, object] = {}
    for wanted, keys in (
        (weak, {}),
        (middle, {"args": {"cni": {"mac": middle}}}),
        (strong, {"runtimeConfig": {"mac": strong}}),
    ):
        given |= keys
        env = {"CNI_ARGS": f"IgnoreUnknown=1;MAC={weak}"}
        outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), config=given, env=env)
        assert outcome.exit_code == 0, outcome.stdout
        assert outcome.json()["interfaces"][1]["mac"] == wanted
        assert f" {wanted} " in netns.run("ip", "link", "show", "eth0").stdout
        for each in outcome.json()["ips"]:
            node.netns.run("ping", "-c", "1", "-W", "2", each["address"].partition("/")[0])
        delete(node, netns)


def test_mac_that_is_taken(node: Machine, netns: Netns) -> None:
    """A MAC address that another pod has, or podlane's own end, is refused with its holder's name; nothing is left."""
    other = node.make_pod("other")
    before = traces(node)
    for mac, holder in ((other.mac, other.container_id), (HOST_MAC, "the node's own end")):
        assert_refused(add(node, netns, runtimeConfig={"mac": mac}), 105, mac, holder)
    assert_refused(add(node, netns, runtimeConfig={"mac": "01:00:5e:00:00:01"}), 7, "01:00:5e:00:00:01")
    assert traces(node) == before
    node.delete_pod(other)


def test_requested_addresses(node: Machine, netns: Netns) -> None:
    """Addresses that are asked for are given from the agent's ranges; one that is taken, or of none, is refused."""
    env = {"CNI_ARGS": "IgnoreUnknown=1;IP=10.244.0.200"}
    config = {"runtimeConfig": {"ips": ["fd00:10:244::c8/64"]}}
    outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), env=env, config=config)
    assert [each["address"] for each in outcome.json()["ips"]] == ["10.244.0.200/32", "fd00:10:244::c8/128"]
    before = traces(node)
    for address, code in (("10.244.0.200", 105), ("10.9.9.9", 7)):
        config = {"runtimeConfig": {"ips": [address]}}
        outcome = node.cni("ADD", container_id="c", netns=str(netns.path), ifname="net1", config=config)
        assert_refused(outcome, code, address)
    assert traces(node) == before
    delete(node, netns)


def test_ranges_of_the_runtime(node: Machine, netns: Netns) -> None:
    """With runtimeConfig.ipRanges the address is of these, with or without an ipam in the configuration."""
    ranges = {"runtimeConfig": {"ipRanges": [[{"subnet": "10.78.0.0/24", "rangeStart": "10.78.0.50"}]]}}
    for number, ipam in enumerate((None, {"type": "podlane"})):
        assert add(node, netns, **ranges, ipam=ipam).json()["ips"][0]["address"] == f"10.78.0.{50 + number}/32"
        delete(node, netns, **ranges, ipam=ipam)


def test_prev_result_passes_through(node: Machine, netns: Netns) -> None:
    """What plugins before podlane made stays in the result, before podlane's own."""
    previous = {
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "dummy0"}, {"name": "eth9", "mac": "02:00:00:00:09:09", "sandbox": str(netns.path)}],
        "ips": [{"address": "198.18.0.1/24", "gateway": "198.18.0.254", "interface": 1}],
        "routes": [{"dst": "198.19.0.0/16", "gw": "198.18.0.254", "mtu": 1400}],
        "dns": {"nameservers": ["198.18.0.53"]},
    }
    result = add(node, netns, prevResult=previous).json()
    for key in ("interfaces", "ips", "routes"):
        assert result[key][: len(previous[key])] == previous[key]
    assert result["dns"] == previous["dns"]
    assert [each["interface"] for each in result["ips"]] == [1, 3, 3]
    assert result["interfaces"][3]["name"] == "eth0"
    check = node.cni("CHECK", container_id=netns.name, netns=str(netns.path), config={"prevResult": result})
    assert (check.exit_code, check.stdout) == (0, "")
    delete(node, netns, prevResult=result)


def test_names(node: Machine, netns: Netns) -> None:
    """Namespace and name of the Kubernetes pod, from CNI_ARGS, are in the store and in the log."""
    env = {"CNI_ARGS": "K8S_POD_NAME=web;IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0"}
    outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), env=env)
    assert outcome.exit_code == 0, outcome.stdout
    assert row(node, netns, "pod_name") == "shop/web-0"
    assert f"reserved pod=podlane/{netns.name}/eth0 name=shop/web-0 " in node.log_tail()
    delete(node, netns)
    assert f"released pod=podlane/{netns.name}/eth0 name=shop/web-0" in node.log_tail()


def row(node: Machine, netns: Netns, column: str) -> object:
    """Return a column of a container's row in the store."""
    with sqlite3.connect(f"file:{node.directory}/state/ipam.db?mode=ro", uri=True) as db:
        query = f"SELECT {column} FROM attachment WHERE container_id = ?"  # noqa: S608  # a name of our own
        ((value,),) = db.execute(query, (netns.name,)).fetchall()
    return value

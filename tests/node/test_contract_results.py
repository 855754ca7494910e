"""Results and errors in the form of each version: what ADD prints, what it reads of others, what a failure says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from agent.wiring import HOST_MAC
from tests.node.contract import (
    NEWEST,
    VERSIONS,
    WITH_CHECK,
    WITH_LISTS,
    Container,
    Delegate,
    assert_refused,
    container,
    rows,
)
from tests.node.machine import Machine

DEFAULTS = [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}]
SUBNET = {"dst": "10.66.0.0/24", "gw": "169.254.1.1"}
before_lists = pytest.mark.parametrize("version", [each for each in VERSIONS if each not in WITH_LISTS])
with_lists = pytest.mark.parametrize("version", WITH_LISTS)


@pytest.fixture(scope="module")
def node(clean_node: Machine) -> Machine:
    """Share the node among all tests of this module."""
    return clean_node


@pytest.fixture
def delegated(node: Machine) -> Iterator[tuple[Container, Delegate]]:
    """Make a container whose addresses come from a delegate."""
    delegate = Delegate(node)
    with container(node, ipam=delegate.ipam) as it:
        yield it, delegate


def kernel(it: Container) -> tuple[str, str, str]:
    """Return IPv4 and IPv6 address and MAC address of the container's eth0 as the kernel has them."""
    (eth0,) = json.loads(it.netns.run("ip", "-j", "address", "show", "eth0").stdout)
    of_family = {each["family"]: each["local"] for each in eth0["addr_info"] if each["scope"] == "global"}
    return of_family["inet"], of_family["inet6"], eth0["address"]


@before_lists
def test_families(it: Container, version: str) -> None:
    """1.3: before 0.3.0 a result has an address of each family with its gateway and routes, dns, and no interfaces."""
    result = it.add(cniVersion=version)
    v4, v6, _ = kernel(it)
    assert result == {
        "cniVersion": version,
        "ip4": {"ip": f"{v4}/32", "gateway": "169.254.1.1", "routes": DEFAULTS[:1]},
        "ip6": {"ip": f"{v6}/128", "gateway": "fe80::1", "routes": DEFAULTS[1:]},
        "dns": {},
    }


@with_lists
def test_lists(it: Container, version: str) -> None:
    """1.3: ips[].version and "dns": {} until 0.4.0, mtu from 1.1.0 on; sandbox is CNI_NETNS as it was given."""
    path = f"//run/../run/netns/{it.netns.name}"
    result = it.add(cniVersion=version, env={"CNI_NETNS": path})
    v4, v6, mac = kernel(it)
    old, mtu = version < "1.0.0", {"mtu": 1500} if version == NEWEST else {}
    assert result == {
        "cniVersion": version,
        "interfaces": [
            {"name": result["interfaces"][0]["name"], "mac": HOST_MAC, **mtu},
            {"name": "eth0", "mac": mac, "sandbox": path, **mtu},
        ],
        "ips": [
            {"interface": 1, "address": f"{v4}/32", "gateway": "169.254.1.1", **({"version": "4"} if old else {})},
            {"interface": 1, "address": f"{v6}/128", "gateway": "fe80::1", **({"version": "6"} if old else {})},
        ],
        "routes": DEFAULTS,
        **({"dns": {}} if old else {}),
    }
    it.node.netns.run("ip", "link", "show", result["interfaces"][0]["name"])


@before_lists
def test_down_conversion(delegated: tuple[Container, Delegate], version: str) -> None:
    """R08: the first address of each family, and of the routes those of a family that has one, as dst and gw."""
    it, delegate = delegated
    delegate.gives(
        {
            "cniVersion": "1.1.0",
            "ips": [{"address": "10.66.0.2/24"}, {"address": "10.67.0.2/24"}],
            "routes": [{"dst": "10.9.0.0/16", "mtu": 1400, "priority": 5}, {"dst": "fd09::/16", "mtu": 1400}],
        }
    )
    result = it.add(cniVersion=version)
    routes = result["ip4"].pop("routes")
    assert result == {
        "cniVersion": version,
        "ip4": {"ip": "10.66.0.2/32", "gateway": "169.254.1.1"},
        "dns": {},
    }
    assert {"dst": "10.9.0.0/16", "gw": "169.254.1.1"} in routes
    assert all(":" not in route["dst"] and route.keys() == {"dst", "gw"} for route in routes)


@before_lists
def test_two_addresses_of_a_family(it: Container, version: str) -> None:
    """1.3: before 0.3.0 two range sets of a family are refused by podlane's own IPAM, in host-local's words."""
    ipam = {"type": "podlane", "ranges": [[{"subnet": "10.66.0.0/24"}], [{"subnet": "10.67.0.0/24"}]]}
    message = f"CNI version {version} does not support more than 1 address per family"
    assert_refused(it.call("ADD", cniVersion=version, ipam=ipam), 7, message, version=version)
    assert rows(it.node) == []


@before_lists
def test_no_address(delegated: tuple[Container, Delegate], version: str) -> None:
    """1.3: a result without any address, which these versions cannot hold, is an error, and everything is undone."""
    it, delegate = delegated
    delegate.gives({"cniVersion": version, "dns": {"domain": "x"}})
    outcome = it.call("ADD", cniVersion=version)
    assert outcome.exit_code == 1
    assert rows(it.node) == []
    assert delegate.calls() == ["ADD", "DEL"]


@with_lists
def test_route_attributes(it: Container, version: str) -> None:
    """1.3: mtu, advmss, priority, table and scope of a route are told from 1.1.0 on; in the kernel they are always."""
    asked = {"dst": "10.9.0.0/16", "mtu": 1300, "advmss": 1200, "priority": 7, "table": 1000}
    ipam = {"type": "podlane", "subnet": "10.66.0.0/24", "routes": [asked]}
    result = it.add(cniVersion=version, ipam=ipam)
    told = asked if version == NEWEST else {"dst": asked["dst"]}
    assert {**told, "gw": "169.254.1.1"} in result["routes"]
    shown = it.netns.run("ip", "route", "show", "table", "1000").stdout
    assert [word for word in ("10.9.0.0/16", "mtu 1300", "advmss 1200", "metric 7") if word not in shown] == []


def old_form(version: str) -> dict[str, Any]:
    """Return what a delegate gives, in the form of a version; an empty one names none."""
    body: dict[str, Any] = {"cniVersion": version} if version else {}
    if version and version < "0.3.0":
        return body | {"ip4": {"ip": "10.66.0.2/24", "gateway": "10.66.0.1", "routes": [{"dst": "0.0.0.0/0"}]}}
    return body | {
        "ips": [{"version": "4", "address": "10.66.0.2/24", "gateway": "10.66.0.1"}],
        "routes": [{"dst": "0.0.0.0/0"}],
    }


@pytest.mark.parametrize("answered", VERSIONS)
def test_delegate_of_another_version(delegated: tuple[Container, Delegate], answered: str) -> None:
    """B45: a delegate may answer in any version: ADD's result is that of the configuration's version all the same."""
    it, delegate = delegated
    delegate.gives(old_form(answered))
    for version in VERSIONS:
        result = it.add(cniVersion=version)
        assert result["cniVersion"] == version
        found = result["ip4"]["ip"] if version not in WITH_LISTS else result["ips"][0]["address"]
        assert found == "10.66.0.2/32"
        routes = result["ip4"]["routes"] if version not in WITH_LISTS else result["routes"]
        assert routes == [DEFAULTS[0], SUBNET]
        it.done("DEL", cniVersion=version)


@pytest.mark.parametrize("version", VERSIONS)
def test_delegate_that_names_no_version(delegated: tuple[Container, Delegate], version: str) -> None:
    """B45: a delegate's result without a version is one of the configuration's."""
    it, delegate = delegated
    delegate.gives({key: value for key, value in old_form(version).items() if key != "cniVersion"})
    assert it.add(cniVersion=version)["cniVersion"] == version
    assert it.netns.run("ip", "-o", "-4", "address", "show", "eth0").stdout.split()[3] == "10.66.0.2/32"


def previous(it: Container, version: str) -> dict[str, Any]:
    """Return the result of an earlier plugin, without its version, in the form of a version."""
    number = {"version": "4"} if version < "1.0.0" else {}
    return {
        "interfaces": [{"name": "lo", "sandbox": str(it.netns.path)}],
        "ips": [{**number, "interface": 0, "address": "127.0.0.1/8"}],
        "routes": [{"dst": "198.18.0.0/15", "gw": "127.0.0.1"}],
        "dns": {"nameservers": ["198.18.0.53"]},
    }


@with_lists
@pytest.mark.parametrize("named", [True, False])
def test_prev_result(it: Container, version: str, named: bool) -> None:
    """L02, X01, B42, 1.3: prevResult, also without a version, comes first in the result; its index 0 is printed."""
    given = previous(it, version)
    result = it.add(cniVersion=version, prevResult=given | ({"cniVersion": version} if named else {}))
    assert [each["name"] for each in result["interfaces"]][::2] == ["lo", "eth0"]
    for key in ("ips", "routes"):
        assert result[key][:1] == given[key]
    assert [each["interface"] for each in result["ips"]] == [0, 2, 2]
    assert result["dns"] == given["dns"]
    if version in WITH_CHECK:
        it.done(
            "CHECK", cniVersion=version, prevResult={key: result[key] for key in result if named or key != "cniVersion"}
        )


@with_lists
def test_newer_keys_in_prev_result(it: Container, version: str) -> None:
    """1.3: what only 1.1.0 has is understood in the results of older versions, and told where the version has it."""
    given = previous(it, version)
    given["interfaces"][0] |= {"mtu": 65536, "pciID": "0000:00:1f.6", "socketPath": "/run/x"}
    given["routes"][0] |= {"mtu": 1400, "table": 7, "scope": 0}
    result = it.add(cniVersion=version, prevResult={"cniVersion": version, **given})
    assert (result["interfaces"][0] == given["interfaces"][0]) == (version == NEWEST)
    assert (result["routes"][0] == given["routes"][0]) == (version == NEWEST)


@with_lists
@pytest.mark.parametrize("wrong", [{"ips": [{"address": "x"}]}, {"interfaces": {}}, {"cniVersion": "7.7.7"}])
def test_bad_prev_result(it: Container, version: str, wrong: Mapping[str, Any]) -> None:
    """1.4: a prevResult that cannot be read is an error of ADD, before anything is done; DEL does not care (X04)."""
    assert_refused(it.call("ADD", cniVersion=version, prevResult=wrong), 6, version=version)
    assert rows(it.node) == []
    it.add(cniVersion=version)
    it.done("DEL", cniVersion=version, prevResult=wrong)
    assert rows(it.node) == []


CODES: list[tuple[int, dict[str, Any], list[str]]] = [
    (1, {"cniVersion": "9.9.9"}, ['"9.9.9"']),
    (2, {"vlan": 7}, ['"vlan"', "7"]),
    (4, {"env": {"CNI_IFNAME": ""}}, ["CNI_IFNAME"]),
    (6, {"cniVersion": 1}, ["cniVersion"]),
    (7, {"mtu": -1}, ["mtu", "-1"]),
    (8, {"env": {"CNI_NETNS": "/nowhere"}}, ["/nowhere"]),
]


@pytest.mark.parametrize(("code", "given", "words"), CODES)
@pytest.mark.parametrize("version", VERSIONS)
def test_error_codes(it: Container, version: str, code: int, given: dict[str, Any], words: list[str]) -> None:
    """1.2: each failure has the specification's code, and names key and value, or variable, at fault."""
    expected = version if code not in (1, 6) else NEWEST
    assert_refused(it.call("ADD", **{"cniVersion": version, **given}), code, *words, version=expected)


def test_try_again_later(node: Machine, it: Container) -> None:
    """1.2: without the agent ADD and CHECK are code 11, STATUS is 50, and DEL succeeds: it waits for the agent."""
    result = it.add()
    away = {"PODLANE_SOCKET": str(node.directory / "nobody.sock")}
    for command in ("ADD", "CHECK", "GC"):
        assert_refused(it.call(command, env=away, prevResult=result), 11, "agent")
    assert_refused(it.call("STATUS", env=away), 50, "agent")
    it.done("DEL", env={**away, "PODLANE_SPOOL": str(node.directory / "elsewhere")})


@pytest.mark.parametrize("code", [3, 11, 100, 999, 4711])
def test_error_of_a_delegate(delegated: tuple[Container, Delegate], code: int) -> None:
    """B44, G04: code, msg and details of a delegate's error come out as they were, of every command."""
    it, delegate = delegated
    result = it.add()
    error = {"cniVersion": "0.3.1", "code": code, "msg": 'no\nmore "leases"', "details": "ask ü"}
    for command, versions in (("CHECK", WITH_CHECK), ("GC", [NEWEST]), ("STATUS", [NEWEST]), ("DEL", VERSIONS)):
        delegate.fails(command, error)
        for version in versions:
            told = it.call(command, cniVersion=version, prevResult=result)
            assert told.exit_code == 1
            assert told.json() == {**error, "cniVersion": version}
        delegate.fails(command, None)
    it.done("DEL")
    delegate.fails("ADD", error)
    for version in VERSIONS:
        assert it.call("ADD", cniVersion=version).json() == {**error, "cniVersion": version}
    delegate.fails("ADD", None)

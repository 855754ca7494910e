"""Configurations of the reference plugins bridge and ptp, with nothing but their type changed."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node.machine import Machine, Netns, Outcome, TestPod, machine
from tests.node.programs import wait_settled

TEXTBOOK = """{
    "cniVersion": "0.4.0", "name": "awesomenet", "type": "podlane", "bridge": "cni0", "isGateway": true, "ipMasq": true,
    "ipam": {"type": "host-local", "subnet": "10.244.1.0/24", "routes": [{"dst": "0.0.0.0/0"}]}
}"""
HOST_LOCAL = Path("/var/lib/cni/networks/awesomenet")  # where it keeps the addresses of this network
IPAM = {"type": "podlane", "subnet": "10.77.0.0/24"}
DEFAULT = {"dst": "0.0.0.0/0", "gw": "169.254.1.1"}
SUBNET = {"dst": "10.77.0.0/24", "gw": "169.254.1.1"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture
def netns(node: Machine) -> Iterator[Netns]:
    """Make a network namespace for a container; of the container nothing may be left in the end."""
    it = Netns("reference")
    yield it
    node.cni("DEL", container_id=it.name, config={"name": "reference", "ipam": IPAM})
    it.delete()
    assert node.traces()["rows"] == []


def call(node: Machine, command: str, netns: Netns, **config: object) -> Outcome:
    """Call the launcher with a bridge's configuration, changed so."""
    whole = {"cniVersion": "1.0.0", "name": "reference", "ipam": IPAM, **config}
    return node.cni(command, container_id=netns.name, netns=str(netns.path), config=whole)


def add(node: Machine, netns: Netns, **config: object) -> Any:  # noqa: ANN401  # whatever was printed
    """ADD a container, and return the result."""
    outcome = call(node, "ADD", netns, **config)
    assert outcome.exit_code == 0, f"{outcome.stdout}\n{node.log_tail()}"
    return outcome.json()


def refused(outcome: Outcome) -> tuple[int, str]:
    """Return code and text of a refusal."""
    error = outcome.json()
    assert outcome.exit_code == 1
    return error["code"], f"{error['msg']} {error.get('details', '')}"


def test_textbook(node: Machine) -> None:
    """The textbook's configuration works as it stands: a pod of its subnet, that reaches other pods and the world."""
    env = {"CNI_PATH": f"{node.directory}/bin:/usr/lib/cni"}
    containers = [Netns("textbook"), Netns("textbook")]
    try:
        for index, netns in enumerate(containers):
            outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), stdin=TEXTBOOK, env=env)
            assert outcome.exit_code == 0, f"{outcome.stdout}\n{node.log_tail()}"
            (ip,) = outcome.json()["ips"]
            assert ip["address"] == f"10.244.1.{index + 2}/32"
            assert (HOST_LOCAL / f"10.244.1.{index + 2}").read_bytes() == f"{netns.name}\r\neth0".encode()
            prev = {**json.loads(TEXTBOOK), "prevResult": outcome.json()}
            check = node.cni("CHECK", container_id=netns.name, netns=str(netns.path), config=prev, env=env)
            assert check.exit_code == 0, check.stdout
        for address in ("10.244.1.3", "192.0.2.1"):
            containers[0].run("ping", "-c", "2", "-i", "0.01", "-W", "2", address)
        for netns in containers:
            outcome = node.cni("DEL", container_id=netns.name, netns=str(netns.path), stdin=TEXTBOOK, env=env)
            assert (outcome.exit_code, outcome.stdout) == (0, "")
        assert list(HOST_LOCAL.glob("10.*")) == []
        assert node.traces()["rows"] == []
    finally:
        for netns in containers:
            netns.delete()
        shutil.rmtree(HOST_LOCAL, ignore_errors=True)


def test_keys_without_effect(node: Machine, netns: Netns) -> None:
    """What cannot matter without a bridge is accepted, and named in one line of the log with the reasons."""
    keys = {
        "bridge": "cni0",
        "forceAddress": True,
        "hairpinMode": True,
        "ipMasqBackend": "nftables",
        "macspoofchk": True,
        "enabledad": True,
    }
    labels = {"cni": {"labels": [{"key": "app", "value": "web"}]}}
    add(node, netns, **keys, args=labels, vlan=0, promiscMode=False, preserveDefaultVlan=True)  # these as if absent
    (line,) = [line for line in node.log.read_text().splitlines() if "have no effect" in line and netns.name in line]
    assert [key for key in (*keys, "args.cni.labels") if f"{key} (" not in line] == []
    assert "cni0" not in node.netns.run("ip", "-o", "link").stdout


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vlan", 100),
        ("vlanTrunk", [{"id": 101}]),
        ("portIsolation", True),
        ("disableContainerInterface", True),
        ("runtimeConfig", {"portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "dccp"}]}),
    ],
)
def test_refused_by_name(node: Machine, netns: Netns, key: str, value: object) -> None:
    """What would have to be done, and is not, is refused with code 2, with key and value, by ADD and STATUS."""
    before = node.traces()
    for command, version in (("ADD", "1.0.0"), ("STATUS", "1.1.0")):
        code, text = refused(call(node, command, netns, **{key: value}, cniVersion=version))
        assert code == 2
        assert f'"{key}' in text
    assert node.traces() == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vlan": 4095}, "invalid VLAN ID 4095 (must be between 0 and 4094)"),
        ({"ipMasqBackend": "foo"}, 'unknown ipmasq backend "foo"'),
        ({"hairpinMode": True, "promiscMode": True}, "cannot set hairpin mode and promiscuous mode at the same time"),
        ({"isGateway": "true"}, "isGateway"),
        ({"ipMasq": "true"}, "ipMasq"),
        ({"mtu": "1400"}, "mtu"),
        ({"bridge": 7}, "bridge"),
        ({"dns": {"nameservers": "10.0.0.53"}}, "nameservers"),
    ],
)
def test_refused_as_the_reference_does(node: Machine, netns: Netns, config: dict[str, object], message: str) -> None:
    """Values that the reference plugins refuse podlane refuses too, in their words where they have some."""
    code, text = refused(call(node, "ADD", netns, **config))
    assert code == 7
    assert message in text


@pytest.mark.parametrize(
    ("subnet", "mtu", "message"),
    [
        ("127.0.0.0/24", 0, "no pod can have an address of 127.0.0.0/24"),
        ("224.0.1.0/24", 0, "224.0.1.0/24"),
        ("169.254.0.0/16", 0, "169.254.0.0/16"),
        ("fe80::/64", 0, "fe80::/64"),
        ("::ffff:10.77.0.0/120", 0, "10.77.0.0"),
        ("10.77.0.0/24", 67, "mtu 67: IPv4 needs 68 at least"),
        ("fd77::/64", 1279, "mtu 1279: IPv6 needs 1280 at least"),
    ],
)
def test_no_life_for_a_pod(node: Machine, netns: Netns, subnet: str, mtu: int, message: str) -> None:
    """What the kernel, or the world, has no place for is refused with code 7, key and value; nothing is left."""
    before = node.traces()
    code, text = refused(call(node, "ADD", netns, ipam={"type": "podlane", "subnet": subnet}, mtu=mtu))
    assert (code, message in text) == (7, True), text
    assert node.traces() == before


@pytest.mark.parametrize("subnet", ["10.77.0.0/24", "fd77::/64"])
def test_least_mtu(node: Machine, netns: Netns, subnet: str) -> None:
    """The least MTU that a family has works."""
    add(node, netns, ipam={"type": "podlane", "subnet": subnet}, mtu=1280 if ":" in subnet else 68)


@pytest.mark.parametrize(
    ("given", "is_default_gateway", "expected"),
    [
        ([], False, [SUBNET]),
        ([], True, [DEFAULT, SUBNET]),
        ([{"dst": "0.0.0.0/0"}], True, [DEFAULT, SUBNET]),  # where the reference fails: "file exists"
        ([{"dst": "0.0.0.0/0", "gw": "10.77.0.1"}], True, [DEFAULT, SUBNET]),
        ([{"dst": "10.5.0.0/16"}], False, [{"dst": "10.5.0.0/16", "gw": "169.254.1.1"}, SUBNET]),
    ],
)
def test_default_route(
    node: Machine, netns: Netns, given: list[object], is_default_gateway: bool, expected: list[object]
) -> None:
    """A pod has a default route if IPAM or isDefaultGateway says so, else none, and always one to its subnet."""
    result = add(node, netns, ipam={**IPAM, "routes": given}, isDefaultGateway=is_default_gateway)
    assert result["routes"] == expected
    shown = json.loads(netns.run("ip", "-j", "route").stdout)
    found = [{"dst": each["dst"].replace("default", "0.0.0.0/0"), "gw": each["gateway"]} for each in shown[:-1]]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert shown[-1]["dst"] == "169.254.1.1"


def test_attributes_of_routes(node: Machine, netns: Netns) -> None:
    """Metric, table, MTU and MSS of IPAM's routes are in the kernel and in the result."""
    asked = {"dst": "10.5.0.0/16", "mtu": 1300, "advmss": 1200, "priority": 77}
    elsewhere = {"dst": "10.6.0.0/16", "table": 1000}
    result = add(node, netns, cniVersion="1.1.0", ipam={**IPAM, "routes": [asked, elsewhere]})
    assert result["routes"] == [{**asked, "gw": "169.254.1.1"}, {**elsewhere, "gw": "169.254.1.1"}, SUBNET]
    shown = netns.run("ip", "route", "show", "10.5.0.0/16").stdout
    assert [word for word in ("metric 77", "mtu 1300", "advmss 1200") if word not in shown] == []
    assert "10.6.0.0/16" in netns.run("ip", "route", "show", "table", "1000").stdout


def test_several_range_sets(node: Machine, netns: Netns) -> None:
    """An address of each range set is given; towards each subnet the pod has its address of that subnet."""
    sets = [[{"subnet": "10.77.0.0/24"}], [{"subnet": "10.78.0.0/24"}], [{"subnet": "fd77::/64"}]]
    result = add(node, netns, ipam={"type": "podlane", "ranges": sets}, isDefaultGateway=True)
    addresses = [each["address"].partition("/")[0] for each in result["ips"]]
    assert [each.rpartition("." if "." in each else ":")[0] for each in addresses] == ["10.77.0", "10.78.0", "fd77:"]
    for address, other in zip(addresses, ("10.77.0.99", "10.78.0.99"), strict=False):
        assert f" src {address} " in netns.run("ip", "route", "get", other).stdout
    for address in addresses:
        node.netns.run("ping", "-c", "1", "-W", "2", address)


def test_dns(node: Machine, netns: Netns, tmp_path: Path) -> None:
    """DNS settings are those of IPAM's resolvConf; any in the configuration take the place of all of these."""
    file = tmp_path / "resolv.conf"
    file.write_text("nameserver 10.0.0.53\nsearch example.org\n")
    ipam = {**IPAM, "resolvConf": str(file)}
    assert add(node, netns, ipam=ipam)["dns"] == {"nameservers": ["10.0.0.53"], "search": ["example.org"]}
    assert call(node, "DEL", netns, ipam=ipam).exit_code == 0
    assert add(node, netns, ipam=ipam, dns={"domain": "other"})["dns"] == {"domain": "other"}


@pytest.mark.parametrize(("given", "expected"), [({}, 0), ({"ipMasq": True}, 1), ({"ipMasq": False}, 0)])
def test_masquerade_is_kept(node: Machine, netns: Netns, given: dict[str, object], expected: int | None) -> None:
    """What ipMasq says is kept with the pod; absent means false, as with bridge and ptp."""
    add(node, netns, **given)
    with sqlite3.connect(f"file:{node.directory}/state/ipam.db?mode=ro", uri=True) as db:
        query = "SELECT masquerade FROM attachment WHERE container_id = ?"
        assert db.execute(query, (netns.name,)).fetchall() == [(expected,)]


def test_mtu(node: Machine, netns: Netns) -> None:
    """The configured MTU is that of both ends."""
    result = add(node, netns, mtu=1400, cniVersion="1.1.0")
    assert [each["mtu"] for each in result["interfaces"]] == [1400, 1400]
    assert " mtu 1400 " in netns.run("ip", "link", "show", "eth0").stdout


def test_exhausted(node: Machine, netns: Netns) -> None:
    """When a network has no address left ADD says so in host-local's words, with code 101, and leaves nothing."""
    small = {"type": "podlane", "subnet": "10.77.9.0/30"}  # two addresses, of which one is the gateway
    wait_settled(node, TestPod(netns, netns.name, add(node, netns, ipam=small)))  # its links come a little later
    before = node.traces()
    config = {"cniVersion": "1.0.0", "name": "reference", "ipam": small}
    outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), ifname="net1", config=config)
    code, text = refused(outcome)
    assert code == 101
    assert "failed to allocate for range 0: no IP addresses available in range set: 10.77.9.1-10.77.9.2" in text
    assert node.traces() == before


@pytest.mark.parametrize(
    ("request_", "code", "message"),
    [
        ("10.77.0.1", 7, "requested ip 10.77.0.1 is subnet's gateway"),
        ("10.99.0.1", 7, "failed to allocate all requested IPs: 10.99.0.1"),
        ("nonsense", 7, "nonsense"),
    ],
)
def test_requests_that_cannot_be_met(node: Machine, netns: Netns, request_: str, code: int, message: str) -> None:
    """An address that is asked for and cannot be given is named, in host-local's words; one that can be is given."""
    found, text = refused(call(node, "ADD", netns, runtimeConfig={"ips": [request_]}))
    assert (found, message in text) == (code, True), text
    assert add(node, netns, args={"cni": {"ips": ["10.77.0.200"]}})["ips"][0]["address"] == "10.77.0.200/32"

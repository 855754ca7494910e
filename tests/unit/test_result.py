"""The result of ADD, compared with documents written by hand after the specification of each version."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cni.errors import CniError
from cni.result import Dns, Interface, Ip, Result, Route, parse_result
from tests.unit.calls import VERSIONS

RESULT = Result(
    interfaces=(
        Interface(name="pl0123", mac="02:70:6c:61:6e:65", mtu=1450),
        Interface("eth0", "02:00:00:00:00:01", 1450, "/run/netns/x", socket_path="/s", pci_id="0000:01:00.0"),
    ),
    ips=(
        Ip(ip_interface("10.0.0.1/32"), ip_address("169.254.1.1"), 1),
        Ip(ip_interface("fd00::1/128"), ip_address("fe80::1"), 1),
        Ip(ip_interface("10.0.0.2/24")),
    ),
    routes=(
        Route(ip_network("0.0.0.0/0"), ip_address("169.254.1.1"), table=0, scope=0),
        Route(ip_network("::/0"), ip_address("fe80::1"), mtu=1400, advmss=1360, priority=5),
        Route(ip_network("10.9.0.0/16")),
    ),
    dns=Dns(nameservers=("10.0.0.53",), search=("svc", "cluster"), options=("ndots:5",), domain="local"),
)
DNS = {"nameservers": ["10.0.0.53"], "search": ["svc", "cluster"], "options": ["ndots:5"], "domain": "local"}
INTERFACES = [
    {"name": "pl0123", "mac": "02:70:6c:61:6e:65"},
    {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"},
]
IPS: list[dict[str, object]] = [
    {"interface": 1, "address": "10.0.0.1/32", "gateway": "169.254.1.1"},
    {"interface": 1, "address": "fd00::1/128", "gateway": "fe80::1"},
    {"address": "10.0.0.2/24"},
]
ROUTES: list[dict[str, object]] = [
    {"dst": "0.0.0.0/0", "gw": "169.254.1.1"},
    {"dst": "::/0", "gw": "fe80::1"},
    {"dst": "10.9.0.0/16"},
]
DOCUMENTS: dict[str, dict[str, object]] = {
    **{
        version: {
            "cniVersion": version,
            "ip4": {"ip": "10.0.0.1/32", "gateway": "169.254.1.1", "routes": [ROUTES[0], ROUTES[2]]},
            "ip6": {"ip": "fd00::1/128", "gateway": "fe80::1", "routes": [ROUTES[1]]},
            "dns": DNS,
        }
        for version in ("0.1.0", "0.2.0")
    },
    **{
        version: {
            "cniVersion": version,
            "interfaces": INTERFACES,
            "ips": [{"version": family} | ip for family, ip in zip("464", IPS, strict=True)],
            "routes": ROUTES,
            "dns": DNS,
        }
        for version in ("0.3.0", "0.3.1", "0.4.0")
    },
    "1.0.0": {"cniVersion": "1.0.0", "interfaces": INTERFACES, "ips": IPS, "routes": ROUTES, "dns": DNS},
    "1.1.0": {
        "cniVersion": "1.1.0",
        "interfaces": [
            INTERFACES[0] | {"mtu": 1450},
            INTERFACES[1] | {"mtu": 1450, "socketPath": "/s", "pciID": "0000:01:00.0"},
        ],
        "ips": IPS,
        "routes": [
            ROUTES[0] | {"table": 0, "scope": 0},
            ROUTES[1] | {"mtu": 1400, "advmss": 1360, "priority": 5},
            ROUTES[2],
        ],
        "dns": DNS,
    },
}


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_has_its_form(version: str) -> None:
    """R01 to R08: a result is printed in exactly the form of each version, with what that version can hold."""
    assert RESULT.to_json(version) == DOCUMENTS[version]


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_empty(version: str) -> None:
    """Empty lists are left out; an empty dns is there as {} up to 0.4.0, and left out from 1.0.0 on."""
    result = Result(ips=(Ip(ip_interface("10.0.0.1/24")),))
    families: dict[str, object] = {"ip4": {"ip": "10.0.0.1/24"}, "dns": {}}
    old: dict[str, object] = {"ips": [{"version": "4", "address": "10.0.0.1/24"}], "dns": {}}
    new: dict[str, object] = {"ips": [{"address": "10.0.0.1/24"}]}
    expected = {"0.1.0": families, "0.2.0": families, "1.0.0": new, "1.1.0": new}.get(version, old)
    assert result.to_json(version) == {"cniVersion": version, **expected}


def test_interface_zero_is_printed() -> None:
    """With a single interface, its index is 0 and stays in the document."""
    only = Result((Interface("eth0", sandbox="/x"),), (Ip(ip_interface("10.0.0.1/24"), interface=0),))
    assert only.to_json("1.0.0") == {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "sandbox": "/x"}],
        "ips": [{"interface": 0, "address": "10.0.0.1/24"}],
    }


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_before_0_3_a_family_needs_an_address(version: str) -> None:
    """R08: before 0.3.0 the routes of a family without an address are lost, and a result without any is an error."""
    result = Result(ips=(Ip(ip_interface("fd00::1/64")),), routes=RESULT.routes)
    routes = [{"dst": "::/0", "gw": "fe80::1"}]
    assert result.to_json(version) == {
        "cniVersion": version,
        "ip6": {"ip": "fd00::1/64", "routes": routes},
        "dns": {},
    }
    with pytest.raises(CniError) as caught:
        replace(result, ips=()).to_json(version)
    assert (caught.value.code, caught.value.message) == (7, "cannot convert: no valid IP addresses")


@pytest.mark.parametrize("version", VERSIONS)
def test_each_form_is_read(version: str) -> None:
    """B45: a result of any version is read, and printed again as it was."""
    read = parse_result(DOCUMENTS[version], "1.1.0")
    assert read.to_json(version) == DOCUMENTS[version]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("named", [{}, {"cniVersion": ""}, {"cniVersion": None}])
def test_result_without_version(version: str, named: dict[str, object]) -> None:
    """B42, B45: a result that names no version is one of the configuration's version."""
    document = {key: value for key, value in DOCUMENTS[version].items() if key != "cniVersion"} | named
    assert parse_result(document, version).to_json(version) == DOCUMENTS[version]


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"])
def test_newer_keys_are_understood_in_older_results(version: str) -> None:
    """Whatever version a result from 0.3.0 on names, it may have all the keys that the newest has."""
    assert parse_result(DOCUMENTS["1.1.0"] | {"cniVersion": version}, version) == RESULT


def test_keys_match_in_any_case() -> None:
    """P23: keys match whatever their case, null is absent, an empty gateway is none, unknown keys are ignored."""
    document = {
        "CNIVersion": "1.0.0",
        "IPs": [{"Address": "10.0.0.1/24", "Gateway": "", "interface": None, "x": 1}],
        "Routes": [{"DST": "10.1.2.3/8", "GW": None}],
        "Interfaces": [{"Name": "eth0", "SocketPath": "/s", "PciID": "p", "MTU": None}],
        "DNS": None,
    }
    assert parse_result(document, "0.2.0") == Result(
        interfaces=(Interface("eth0", socket_path="/s", pci_id="p"),),
        ips=(Ip(ip_interface("10.0.0.1/24")),),
        routes=(Route(ip_network("10.0.0.0/8")),),
    )


@pytest.mark.parametrize(
    ("document", "details"),
    [
        ({"ips": {}}, "ips: Input should be a valid list (given: {})"),
        ({"ips": ["10.0.0.1/24"]}, "ips.0: "),
        ({"ips": [{}]}, "ips.0.address: Field required"),
        *(
            ({"ips": [{"address": address}]}, "ips.0.address: ")
            for address in (5, "", "10.0.0.1", "10.0.0.1/33", "10.0.0.1/255.0.0.0", "fe80::1%eth0/64", "x/24", ["10/8"])
        ),
        ({"ips": [{"address": "10.0.0.1/24", "gateway": 5}]}, "ips.0.gateway: "),
        ({"ips": [{"address": "10.0.0.1/24", "gateway": "fe80::1%eth0"}]}, "ips.0.gateway: "),
        *(
            ({"ips": [{"address": "10.0.0.1/24", "interface": index}]}, "ips.0.interface: ")
            for index in (-1, "0", True, 0.5, 1 << 32)
        ),
        ({"routes": [{"gw": "10.0.0.1"}]}, "routes.0.dst: Field required"),
        ({"routes": [{"dst": "default"}]}, "routes.0.dst: "),
        ({"routes": [{"dst": "0.0.0.0/0", "mtu": 1 << 40}]}, "routes.0.mtu: "),
        ({"interfaces": [{"mac": "x"}]}, "interfaces.0.name: Field required"),
        ({"dns": {"search": [1]}}, "dns.search.0: "),
        ({"cniVersion": "0.2.0", "ip4": {"gateway": "10.0.0.1"}}, "ip4.ip: Field required"),
        ({"cniVersion": "0.2.0", "ip4": {"ip": "10.0.0.1/8", "routes": [{"dst": 1}]}}, "ip4.routes.0.dst: "),
    ],
)
def test_bad_results(document: dict[str, object], details: str) -> None:
    """A result that is none is code 6, and the field at fault is named."""
    with pytest.raises(CniError) as caught:
        parse_result(document, "1.0.0")
    assert (caught.value.code, caught.value.message.startswith("invalid CNI result of version")) == (6, True)
    assert details in caught.value.details


@pytest.mark.parametrize("version", ["0.5.0", "9.9.9", "x", 3, [], True])
def test_result_of_unknown_version(version: object) -> None:
    """A result of a version that nobody knows is code 6, and not guessed at."""
    with pytest.raises(CniError) as caught:
        parse_result({"cniVersion": version or [0]}, "1.0.0")
    assert (caught.value.code, caught.value.message[:30]) == (6, "unsupported CNI result version")


def test_chain() -> None:
    """L02: the result of a chain is what came before, then ours, whose interfaces have other numbers then."""
    before = parse_result(
        {"interfaces": [{"name": "a"}, {"name": "b"}], "ips": [{"address": "10.1.0.1/24", "interface": 1}], "dns": DNS},
        "1.0.0",
    )
    ours = replace(RESULT, dns=Dns())
    both = ours.after(before)
    assert both.interfaces == (*before.interfaces, *ours.interfaces)
    assert [(ip.address, ip.interface) for ip in both.ips] == [
        (ip_interface("10.1.0.1/24"), 1),
        (ip_interface("10.0.0.1/32"), 3),
        (ip_interface("fd00::1/128"), 3),
        (ip_interface("10.0.0.2/24"), None),
    ]
    assert (both.routes, both.dns) == (RESULT.routes, RESULT.dns)
    assert RESULT.after(replace(before, dns=Dns(domain="other"))).dns == RESULT.dns
    assert before.after(Result()) == Result().after(before) == before

"""The result of ADD, compared with documents written by hand after the specification of each version."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network

import pytest

from cni.result import Interface, Result, Route

RESULT = Result(
    interfaces=(
        Interface(name="pl0123", mac="02:70:6c:61:6e:65", mtu=1450),
        Interface(name="eth0", mac="02:00:00:00:00:01", mtu=1450, sandbox="/run/netns/x"),
    ),
    addresses=(ip_interface("10.0.0.1/32"), ip_interface("fd00::1/128")),
    gateways=("169.254.1.1", "fe80::1"),
    routes=(Route(ip_network("0.0.0.0/0"), "169.254.1.1"), Route(ip_network("::/0"), "fe80::1")),
)
ROUTES = [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}]


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_before_1_0(version: str) -> None:
    """Up to 0.4.0 each address says its family, and dns is there though empty."""
    assert RESULT.to_json(version) == {
        "cniVersion": version,
        "interfaces": [
            {"name": "pl0123", "mac": "02:70:6c:61:6e:65"},
            {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"},
        ],
        "ips": [
            {"version": "4", "interface": 1, "address": "10.0.0.1/32", "gateway": "169.254.1.1"},
            {"version": "6", "interface": 1, "address": "fd00::1/128", "gateway": "fe80::1"},
        ],
        "routes": ROUTES,
        "dns": {},
    }


def test_1_0_0() -> None:
    """From 1.0.0 on an address has no version, and an empty dns is left out."""
    assert RESULT.to_json("1.0.0") == {
        "cniVersion": "1.0.0",
        "interfaces": [
            {"name": "pl0123", "mac": "02:70:6c:61:6e:65"},
            {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"},
        ],
        "ips": [
            {"interface": 1, "address": "10.0.0.1/32", "gateway": "169.254.1.1"},
            {"interface": 1, "address": "fd00::1/128", "gateway": "fe80::1"},
        ],
        "routes": ROUTES,
    }


def test_1_1_0() -> None:
    """From 1.1.0 on interfaces have an MTU."""
    assert RESULT.to_json("1.1.0") == {
        "cniVersion": "1.1.0",
        "interfaces": [
            {"name": "pl0123", "mac": "02:70:6c:61:6e:65", "mtu": 1450},
            {"name": "eth0", "mac": "02:00:00:00:00:01", "mtu": 1450, "sandbox": "/run/netns/x"},
        ],
        "ips": [
            {"interface": 1, "address": "10.0.0.1/32", "gateway": "169.254.1.1"},
            {"interface": 1, "address": "fd00::1/128", "gateway": "fe80::1"},
        ],
        "routes": ROUTES,
    }


def test_interface_zero_is_printed() -> None:
    """With a single interface, its index is 0 and stays in the document."""
    only = Result(
        (Interface("eth0", "02:00:00:00:00:01", 1500, "/x"),), (ip_interface("10.0.0.1/24"),), ("10.0.0.254",)
    )
    assert only.to_json("1.0.0") == {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/x"}],
        "ips": [{"interface": 0, "address": "10.0.0.1/24", "gateway": "10.0.0.254"}],
        "routes": [],
    }


def test_unknown_version() -> None:
    """A version without a form is a mistake of the caller, not a guess."""
    with pytest.raises(ValueError):
        RESULT.to_json("0.2.0")

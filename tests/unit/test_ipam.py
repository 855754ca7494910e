"""podlane's own IPAM: each field and rule of host-local's, beside the real host-local, and the fields beyond it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from agent import ipam
from agent.resolv import parse_resolv_conf, read_resolv_conf
from agent.store import AddressNotInRange, AddressTaken, RangeExhausted, Store
from cni.errors import CniError, Code
from cni.result import Dns, Route
from tests.unit.host_local import HostLocal, needs_host_local
from tests.unit.stores import addresses, attachment, open_store, reserve

SUBNET = {"subnet": "10.1.0.0/29"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Open a store."""
    return open_store(tmp_path / "ipam.db")


def read(config: Mapping[str, Any], version: str = "1.0.0", **keys: Any) -> ipam.OwnIpam:  # noqa: ANN401
    """Read an `ipam` object, with the other keys of a network configuration that concern it."""
    ip_ranges = keys.get("runtimeConfig", {}).get("ipRanges", [])
    return ipam.read(config, network="net", version=version, ip_ranges=ip_ranges)


def requests(keys: Mapping[str, Any], cni_args: str) -> list[str]:
    """Return the requested addresses in host-local's order."""
    asked = [each.removeprefix("IP=") for each in cni_args.split(";") if each.startswith("IP=")]
    asked += keys.get("args", {}).get("cni", {}).get("ips", [])
    return [*asked, *keys.get("runtimeConfig", {}).get("ips", [])]


def add(store: Store, name: object, config: Mapping[str, Any], cni_args: str = "", **keys: Any) -> dict[str, Any]:  # noqa: ANN401
    """Do what ADD does with addresses; return the result or error object."""
    try:
        own = read(config, **keys)
        asked = [str(each) for each in ipam.parse_requests(requests(keys, cni_args))]
        pod = reserve(store, attachment(name), own.pools, *asked)
    except CniError as error:
        return {"code": int(error.code), "msg": error.message}
    except (AddressNotInRange, AddressTaken, RangeExhausted) as error:
        return {"code": 999, "msg": str(error)}
    dns = read_resolv_conf(own.resolv_conf) if own.resolv_conf else Dns()
    return own.result(pod.addresses, dns).to_json("1.0.0")


SET = {"subnet": "10.2.0.0/24", "rangeStart": "10.2.0.10", "rangeEnd": "10.2.0.12"}
V6 = {"subnet": "fd01::/64", "gateway": "fd01::ff"}
SAME: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "textbook": ({"subnet": "10.1.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]}, [{}] * 3),
    "whole subnet": (SUBNET, [{}] * 7),
    "smallest": ({"subnet": "10.1.0.0/30"}, [{}] * 2),
    "smallest IPv6": ({"subnet": "fd01::/126"}, [{}] * 3),
    "part": (SET, [{}] * 4),
    "network and broadcast address": (
        {"subnet": "10.1.0.0/30", "rangeStart": "10.1.0.0", "rangeEnd": "10.1.0.3", "gateway": "10.1.0.2"},
        [{}] * 4,
    ),
    "gateway elsewhere": ({**SUBNET, "gateway": "10.99.0.1"}, [{}] * 7),
    "one set of two subnets": ({"ranges": [[{**SET, "gateway": "10.2.0.11"}, SUBNET]]}, [{}] * 9),
    "dual stack": ({"ranges": [[SET], [V6]]}, [{}] * 3),
    "IPv6 first": ({"ranges": [[V6], [SET]]}, [{}] * 2),
    "three of a family": ({"ranges": [[SET], [SUBNET], [{"subnet": "10.3.0.0/24"}]]}, [{}] * 2),
    "all three places": (
        {**SUBNET, "ranges": [[SET]]},
        [{"runtimeConfig": {"ipRanges": [[{"subnet": "10.4.0.0/24", "rangeStart": "10.4.0.7"}], [V6]]}}] * 2,
    ),
    "keys in any case, null, unknown": (
        {"SUBNET": "10.1.0.0/24", "rangestart": None, "RangeEnd": "10.1.0.3", "Gateway": "", "what": {"is": "this"}},
        [{}] * 3,
    ),
    "old keys without a subnet": ({"gateway": "10.9.9.9", "rangeEnd": "10.9.9.5", "ranges": [[SET]]}, [{}]),
    "routes": (
        {**SUBNET, "routes": [{"dst": "0.0.0.0/0", "gw": "10.1.0.5"}, {"dst": "192.168.0.0/16"}, {"dst": "fd00::/8"}]},
        [{}],
    ),
    "requested by CNI_ARGS": (SUBNET, [{"cni_args": "IP=10.1.0.5"}, {"cni_args": "IP=10.1.0.3"}, {}, {}]),
    "requested by args": ({"ranges": [[SET], [V6]]}, [{"args": {"cni": {"ips": ["fd01::9", "10.2.0.11"]}}}, {}]),
    "requested with lengths": (
        {"ranges": [[SET], [V6]]},
        [{"runtimeConfig": {"ips": ["10.2.0.12/16", "fd01::5/128"]}}, {"runtimeConfig": {"ips": ["::ffff:10.2.0.11"]}}],
    ),
    "requested from three sides": (
        {"ranges": [[SET], [V6], [SUBNET]]},
        [{"cni_args": "IP=10.1.0.4", "args": {"cni": {"ips": ["fd01::4"]}}, "runtimeConfig": {"ips": ["10.2.0.12"]}}],
    ),
}


@needs_host_local
@pytest.mark.parametrize("case", SAME)
def test_gives_what_host_local_gives(case: str, tmp_path: Path, store: Store) -> None:
    """The same configuration and calls give the same addresses, lengths, gateways and routes, call by call."""
    config, calls = SAME[case]
    host_local = HostLocal(tmp_path / "networks")
    for number, keys in enumerate(calls):
        theirs = host_local.call("ADD", str(number), {"type": "host-local", **config}, **keys)
        ours = add(store, number, config, **keys)
        if "code" in theirs:
            assert ours["msg"].startswith(theirs["msg"])
        else:
            assert [ours.get(key) for key in ("ips", "routes")] == [theirs.get(key) for key in ("ips", "routes")]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no ranges": ({}, {}),
    "empty set": ({"ranges": [[]]}, {}),
    "host bits": ({"subnet": "10.1.0.5/24"}, {}),
    "host bits of IPv6": ({"ranges": [[{"subnet": "fd01::5/64"}]]}, {}),
    "too small": ({"subnet": "10.1.0.0/31"}, {}),
    "too small IPv6": ({"ranges": [[SET], [{"subnet": "fd01::/127"}]]}, {}),
    "start outside": ({**SUBNET, "rangeStart": "10.1.0.8"}, {}),
    "end outside": ({**SUBNET, "rangeEnd": "10.0.0.1"}, {}),
    "end before start": ({**SUBNET, "rangeStart": "10.1.0.5", "rangeEnd": "10.1.0.4"}, {}),
    "start of the other family": ({**SUBNET, "rangeStart": "fd01::1"}, {}),
    "overlap in a set": ({"ranges": [[SET, {**SET, "rangeStart": "10.2.0.12", "rangeEnd": "10.2.0.20"}]]}, {}),
    "overlap of sets": ({"ranges": [[SUBNET], [V6], [{"subnet": "10.0.0.0/8"}]]}, {}),
    "overlap with the runtime's": (SUBNET, {"runtimeConfig": {"ipRanges": [[SUBNET]]}}),
    "mixed families": ({"ranges": [[SET, V6]]}, {}),
    "two of a family in 0.2.0": ({"ranges": [[SET], [SUBNET]]}, {"cniVersion": "0.2.0"}),
    "invalid CIDR": ({"subnet": "10.1.0.0"}, {}),
    "request of the gateway": (SUBNET, {"cni_args": "IP=10.1.0.1"}),
    "request of another gateway": (
        {"ranges": [[V6], [{**SUBNET, "gateway": "10.1.0.4"}]]},
        {"cni_args": "IP=10.1.0.4"},
    ),
    "request outside": (SUBNET, {"args": {"cni": {"ips": ["10.1.0.2", "10.1.0.7"]}}}),
    "exhausted by a gateway": ({**SUBNET, "rangeStart": "10.1.0.1", "rangeEnd": "10.1.0.1"}, {}),
}


@needs_host_local
@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_host_local_refuses(case: str, tmp_path: Path, store: Store) -> None:
    """What host-local refuses is refused, in its words, perhaps with more behind them."""
    config, keys = REFUSED[case]
    theirs = HostLocal(tmp_path / "networks").call("ADD", "0", {"type": "host-local", **config}, **keys)
    ours = add(store, 0, config, **{key: value for key, value in keys.items() if key != "cniVersion"})
    if "cniVersion" in keys:
        with pytest.raises(CniError) as caught:
            read(config, keys["cniVersion"])
        ours = {"code": int(caught.value.code), "msg": caught.value.message}
    assert "code" in theirs
    assert theirs["msg"] in ours["msg"]
    assert theirs["code"] == 999
    assert ours["code"] in (7, 999)


@needs_host_local
def test_more_requests_than_sets(tmp_path: Path, store: Store) -> None:
    """Of two requests for one range set one is refused in host-local's words: there a random one, here the second."""
    keys: dict[str, Any] = {"runtimeConfig": {"ips": ["10.1.0.2", "10.1.0.4"]}}
    theirs = HostLocal(tmp_path / "networks").call("ADD", "0", {"type": "host-local", **SUBNET}, **keys)
    ours = add(store, 0, SUBNET, **keys)
    words, _, refused = theirs["msg"].rpartition(" ")
    assert refused in ("10.1.0.2", "10.1.0.4")
    assert f"{words} 10.1.0.4" in ours["msg"]


@needs_host_local
def test_taken_request(tmp_path: Path, store: Store) -> None:
    """A requested address that is in use is refused in host-local's words, and podlane says who has it."""
    host_local = HostLocal(tmp_path / "networks")
    for name in ("a", "b"):
        theirs = host_local.call("ADD", name, {"type": "host-local", **SUBNET}, cni_args="IP=10.1.0.4")
        ours = add(store, name, SUBNET, cni_args="IP=10.1.0.4")
    assert theirs["msg"] == (
        "failed to allocate for range 0: requested IP address 10.1.0.4 is not available in range set 10.1.0.1-10.1.0.6"
    )
    assert ours["msg"] == f"{theirs['msg']} (10.1.0.4 is in use by net/container-a/eth0)"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"subnet": 5}, "subnet: "),
        ({"ranges": [SET]}, "ranges.0: "),
        ({"ranges": [[{"subnet": ["10.0.0.0/8"]}]]}, "ranges.0.0.subnet: "),
        ({"ranges": [[{}]]}, "invalid range set 0: subnet is missing"),
        ({"subnet": "usePodCidr"}, "invalid range set 0: invalid CIDR address: usePodCidr"),
        ({"subnet": "10.1.0.0/33"}, "'10.1.0.0/33' does not appear to be an IPv4 or IPv6 network"),
        ({"subnet": "::ffff:10.1.0.0/120"}, "invalid range set 0: network ::ffff:10.1.0.0/120 has addresses that mean"),
        ({"subnet": "::/64"}, "invalid range set 0: network ::/64 has addresses that mean IPv4 ones"),
        ({**SUBNET, "gateway": "fd01::1"}, "gateway fd01::1 is not of the family of network 10.1.0.0/29"),
        ({**SUBNET, "gateway": "router"}, "gateway: 'router' does not appear to be"),
        ({"subnet": "fe80::/64", "rangeStart": "fe80::5%eth0"}, "rangeStart: fe80::5%eth0 has a zone"),
        ({**SUBNET, "routes": [{"dst": "0.0.0.0/0"}, {"gw": "10.1.0.1"}]}, "routes.1.dst: "),
        ({**SUBNET, "routes": [{"dst": "everywhere"}]}, "ipam.routes.0: 'everywhere' does not"),
        ({**SUBNET, "routes": [{"dst": "0.0.0.0/0", "gw": "x"}]}, "ipam.routes.0: gw: 'x' does not"),
        ({**SUBNET, "routes": [{"dst": "0.0.0.0/0", "mtu": "1400"}]}, "routes.0.mtu: "),
        ({**SUBNET, "routes": [{"dst": "0.0.0.0/0", "priority": -1}]}, "routes.0.priority: "),
        ({**SUBNET, "exclude": ["10.1.0.1/24"]}, "ipam.exclude: 10.1.0.1/24 has host bits set; allowed are addresses"),
        ({**SUBNET, "reserved": ["some"]}, "ipam.reserved: 'some' does not"),
        ({**SUBNET, "exclude": "10.1.0.1"}, "exclude: "),
        ({**SUBNET, "sticky": "yes"}, "sticky: "),
        ({**SUBNET, "dataDir": 7}, "dataDir: "),
    ],
)
def test_refusals_say_where_and_why(config: dict[str, Any], message: str) -> None:
    """A field that cannot be understood is named with what was given, under code 7."""
    with pytest.raises(CniError) as caught:
        read(config)
    assert caught.value.code == Code.INVALID_NETWORK_CONFIG
    assert message in f"{caught.value.message} {caught.value.details}"


@pytest.mark.parametrize("requested", ["", "10.1.0", "10.1.0.4/33", "fe80::1%eth0", "10.1.0.4,10.1.0.5"])
def test_requests_that_are_no_addresses(requested: str) -> None:
    """A request that is no address, with or without a length, is refused under code 7."""
    with pytest.raises(CniError, match="cannot understand ip: ") as caught:
        ipam.parse_requests([requested])
    assert caught.value.code == Code.INVALID_NETWORK_CONFIG


def test_beyond_host_local(store: Store) -> None:
    """Excluded addresses go to nobody, reserved ones to who asks, and sticky is told; all apply to every set."""
    own = read(
        {"ranges": [[SUBNET], [V6]], "exclude": ["10.1.0.2", "fd01::/125"], "reserved": ["10.1.0.3/32"], "sticky": True}
    )
    assert own.sticky
    assert [pool.name for pool in own.pools] == ["net/0", "net/1"]
    assert addresses(reserve(store, attachment("a"), own.pools)) == ["10.1.0.4", "fd01::8"]
    assert addresses(reserve(store, attachment("b"), own.pools, "10.1.0.3")) == ["10.1.0.3", "fd01::9"]
    with pytest.raises(AddressNotInRange, match="excluded"):
        reserve(store, attachment("c"), own.pools, "10.1.0.2")
    assert not read(SUBNET).sticky


def test_what_has_no_effect_is_told() -> None:
    """A dataDir, and keys of the older form without its subnet, are accepted and noted."""
    assert read(SUBNET).notes == ()
    assert read({**SUBNET, "dataDir": "/x"}).notes == (
        "ipam.dataDir /x has no effect: the agent's store holds the addresses",
    )
    assert read({"gateway": "10.0.0.1", "rangeEnd": "x", "ranges": [[SET]]}).notes == (
        "ipam.rangeEnd, gateway without ipam.subnet: no effect, as in host-local; see ipam.ranges",
    )


def test_result_with_all_that_routes_have() -> None:
    """Routes keep all attributes of CNI 1.1.0, and an address that is of no pool any more stands alone."""
    route = {
        "dst": "10.0.0.0/8",
        "gw": "10.1.0.1",
        "mtu": 1400,
        "advmss": 1300,
        "priority": 5,
        "table": 99,
        "scope": 253,
    }
    own = read({**SUBNET, "routes": [route, {"dst": "10.9.8.7/8"}]})
    result = own.result([ip_address("10.1.0.3"), ip_address("10.5.5.5")], Dns(nameservers=("10.1.0.1",)))
    assert result.to_json("1.1.0") == {
        "cniVersion": "1.1.0",
        "ips": [{"address": "10.1.0.3/29", "gateway": "10.1.0.1"}, {"address": "10.5.5.5/32"}],
        "routes": [route, {"dst": "10.0.0.0/8"}],
        "dns": {"nameservers": ["10.1.0.1"]},
    }
    assert isinstance(own.routes[1], Route)


RESOLV_CONF = """
# comment
; nameserver 192.0.2.1
nameserver 10.0.0.53
  nameserver\tfd00::53  # what follows the address means nothing
domain example.org
domain example.com
search a.example b.example
search c.example
options ndots:5 edns0
options
sortlist 10.0.0.0
"""


@needs_host_local
def test_resolv_conf(tmp_path: Path, store: Store) -> None:
    """The file's settings come out as host-local's: lists add up, the last domain counts, comments are none."""
    (tmp_path / "resolv.conf").write_text(RESOLV_CONF)
    config = {**SUBNET, "resolvConf": str(tmp_path / "resolv.conf")}
    theirs = HostLocal(tmp_path / "networks").call("ADD", "a", {"type": "host-local", **config})
    assert add(store, "a", config)["dns"] == theirs["dns"]
    assert parse_resolv_conf("") == parse_resolv_conf("nameserver\nwhat is this") == Dns()


@pytest.mark.parametrize("obstacle", ["missing", "directory", "fifo"])
def test_resolv_conf_that_cannot_be_read(obstacle: str, tmp_path: Path) -> None:
    """A file that is missing, or no file, is refused by name and at once."""
    path = tmp_path / "resolv.conf"
    if obstacle == "directory":
        path.mkdir()
    elif obstacle == "fifo":
        os.mkfifo(path)
    with pytest.raises(CniError, match=f"ipam.resolvConf: cannot read '{path}'") as caught:
        read_resolv_conf(str(path))
    assert caught.value.details

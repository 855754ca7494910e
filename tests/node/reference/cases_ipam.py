"""Addresses: host-local on one side, podlane's own IPAM, with nothing but the type changed, on the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.node.reference.acts import life
from tests.node.reference.acts_calls import calls, failed, kept, resolv_conf
from tests.node.reference.case import Act, Case
from tests.node.reference.cases_keys import BRIDGE, DUAL, IPV4, LAYER_2, PTP

SMALL = "10.77.0.0/29"  # the gateway, and .2 to .6
OTHER = [{"subnet": "10.78.0.0/24"}]
ADD: Mapping[str, Any] = {}
ADD_B: Mapping[str, Any] = {"pod": "b"}
DEL: Mapping[str, Any] = {"command": "DEL"}


def own(name: str, key: str, act: Act, rule: str = "", plugin: Mapping[str, Any] = BRIDGE, **ipam: object) -> Case:
    """Return a case of an `ipam` object whose type is host-local here, and podlane there."""
    config = {**plugin, "ipam": {"type": "host-local", **ipam}}
    return Case(name, key, config, act, rule=rule, own_ipam=True)


def asks(phrase: str = "", **request: Any) -> Act:  # noqa: ANN401  # whatever `Scene.call` takes
    """Return an act of one ADD with a request."""
    return calls({**request, "phrases": [phrase] if phrase else []})


def with_args(*ips: str) -> dict[str, Any]:
    """Return what a runtime sets for addresses that a user asks for."""
    return {"args": {"cni": {"ips": list(ips)}}}


RANGES = [
    own("subnet", "`ipam` ranges", life, subnet="10.77.0.0/24"),
    own("ranges of both families", "`ipam` ranges", life, ranges=DUAL["ranges"]),
    own(
        "rangeStart and rangeEnd",
        "`ipam` ranges",
        calls(ADD, ADD_B),
        subnet="10.77.0.0/24",
        rangeStart="10.77.0.100",
        rangeEnd="10.77.0.101",
    ),
    own("gateway", "`ipam` ranges", calls(ADD, ADD_B), subnet="10.77.0.0/24", gateway="10.77.0.2"),
    own(
        "two sets of a family",
        "`ipam` ranges",
        calls(ADD),
        plugin=LAYER_2,
        ranges=[[{"subnet": "10.77.0.0/24"}], OTHER],
    ),
    own(
        "two subnets in a set",
        "`ipam` ranges",
        calls(ADD, ADD_B, DEL),
        plugin=LAYER_2,
        ranges=[[{"subnet": "10.77.0.0/24", "rangeStart": "10.77.0.9", "rangeEnd": "10.77.0.9"}, *OTHER]],
    ),
    own("subnet and ranges", "`ipam` ranges", calls(ADD), plugin=LAYER_2, subnet="10.77.0.0/24", ranges=[OTHER]),
    own(
        "runtimeConfig.ipRanges",
        "`ipam` ranges",
        calls({"runtimeConfig": {"ipRanges": [OTHER]}}),
        plugin=LAYER_2,
        subnet="10.77.0.0/24",
    ),
    own("routes", "`ipam.routes`", calls(ADD), subnet="10.77.0.0/24", routes=[{"dst": "10.5.0.0/16"}]),
    own(
        "resolvConf",
        "`ipam.resolvConf`",
        resolv_conf("nameserver 10.0.0.53\n# no\nsearch a b\noptions c\nsearch d\n"),
        subnet="10.77.0.0/24",
    ),
    own(
        "resolvConf, ptp",
        "`ipam.resolvConf`",
        resolv_conf("nameserver 10.0.0.53\nsearch a b\n"),
        plugin=PTP,
        subnet="10.77.0.0/24",
    ),
    own("dataDir", "`ipam.dataDir`", kept, subnet="10.77.0.0/24"),
    own("resolvConf absent", "`ipam.resolvConf`", calls(ADD), subnet="10.77.0.0/24", resolvConf="/nonexistent"),
]
FAULTS = [
    own("no range", "`ipam` faults", asks("no IP ranges specified")),
    own("host bits", "`ipam` faults", asks("Network has host bits set"), subnet="10.77.0.1/24"),
    own("subnet too small", "`ipam` faults", asks("too small to allocate from"), subnet="10.77.0.0/31"),
    own("no subnet", "`ipam` faults", asks("invalid CIDR address"), subnet="10.77.0.0"),
    own(
        "rangeStart outside",
        "`ipam` faults",
        asks("RangeStart 10.78.0.1 not in network 10.77.0.0/24"),
        subnet="10.77.0.0/24",
        rangeStart="10.78.0.1",
    ),
    own(
        "rangeEnd outside",
        "`ipam` faults",
        asks("RangeEnd 10.78.0.1 not in network 10.77.0.0/24"),
        subnet="10.77.0.0/24",
        rangeEnd="10.78.0.1",
    ),
    own(
        "sets that overlap",
        "`ipam` faults",
        asks("range set 0 overlaps with 1"),
        ranges=[[{"subnet": "10.77.0.0/24"}], [{"subnet": "10.77.0.0/25"}]],
    ),
    own(
        "subnets of a set that overlap",
        "`ipam` faults",
        asks("overlap"),
        ranges=[[{"subnet": "10.77.0.0/24"}, {"subnet": "10.77.0.0/25"}]],
    ),
    own(
        "a set of both families",
        "`ipam` faults",
        asks("mixed address families"),
        ranges=[[{"subnet": "10.77.0.0/24"}, {"subnet": "fd77::/64"}]],
    ),
    own("an empty set", "`ipam` faults", asks("empty range set"), ranges=[[]]),
    own(
        "two of a family, 0.2.0",
        "`ipam` faults",
        asks("does not support more than 1 address per family"),
        plugin={**BRIDGE, "cniVersion": "0.2.0"},
        ranges=[[{"subnet": "10.77.0.0/24"}], OTHER],
    ),
    own("gateway of the other family", "`ipam` faults", asks(), subnet="10.77.0.0/24", gateway="fd77::1"),
]
REQUESTED = [
    own(
        "address in CNI_ARGS",
        "addresses requested",
        asks(env={"CNI_ARGS": "IP=10.77.0.99;IgnoreUnknown=1"}),
        subnet="10.77.0.0/24",
    ),
    own(
        "address in CNI_ARGS, no IgnoreUnknown",
        "`CNI_ARGS`",
        asks(env={"CNI_ARGS": "IP=10.77.0.99"}),
        subnet="10.77.0.0/24",
    ),
    own("address in args.cni", "addresses requested", asks(**with_args("10.77.0.99")), subnet="10.77.0.0/24"),
    own(
        "address in runtimeConfig",
        "addresses requested",
        asks(runtimeConfig={"ips": ["10.77.0.99/24"]}),
        subnet="10.77.0.0/24",
    ),
    own(
        "address of each family",
        "addresses requested",
        asks(**with_args("fd77::99", "10.77.0.99")),
        ranges=DUAL["ranges"],
    ),
    own(
        "one address asked for twice",
        "addresses requested",
        asks(**with_args("10.77.0.99"), runtimeConfig={"ips": ["10.77.0.99"]}),
        subnet="10.77.0.0/24",
    ),
    own(
        "several in CNI_ARGS",
        "addresses requested",
        asks(env={"CNI_ARGS": "IP=10.77.0.99,fd77::99;IgnoreUnknown=1"}),
        rule="P24",
        ranges=DUAL["ranges"],
    ),
    own(
        "different ones in runtimeConfig and args.cni",
        "addresses requested",
        asks(**with_args("10.77.0.98"), runtimeConfig={"ips": ["10.77.0.99"]}),
        subnet="10.77.0.0/24",
    ),
    own(
        "the gateway",
        "addresses requested",
        asks("requested ip 10.77.0.1 is subnet's gateway", **with_args("10.77.0.1")),
        subnet="10.77.0.0/24",
    ),
    own(
        "outside the ranges",
        "addresses requested",
        asks("failed to allocate all requested IPs: 10.99.0.1", **with_args("10.99.0.1")),
        subnet="10.77.0.0/24",
    ),
    own("no address", "addresses requested", asks("nonsense", **with_args("nonsense")), subnet="10.77.0.0/24"),
    own(
        "one that is taken",
        "addresses requested",
        calls(
            with_args("10.77.0.99"),
            {
                **with_args("10.77.0.99"),
                "pod": "b",
                "phrases": ["requested IP address 10.77.0.99 is not available in range set 10.77.0.1-10.77.0.254"],
            },
        ),
        subnet="10.77.0.0/24",
    ),
    own(
        "the next one after a request",
        "addresses requested",
        calls(with_args("10.77.0.99"), ADD_B),
        subnet="10.77.0.0/24",
    ),
]
TURNS = [
    own("released and added again", "reuse of addresses", calls(ADD, DEL, ADD, DEL, ADD), subnet=SMALL),
    own(
        "round the ring",
        "reuse of addresses",
        calls(
            ADD, DEL, ADD, DEL, ADD, ADD_B, {"command": "DEL", "pod": "b"}, ADD_B, {"command": "DEL", "pod": "b"}, ADD_B
        ),
        subnet=SMALL,
    ),
    own(
        "exhausted",
        "exhausted `ipam` ranges",
        calls(
            ADD,
            {"pod": "b", "phrases": ["no IP addresses available in range set: 10.77.0.1-10.77.0.2"]},
            DEL,
            {**DEL, "pod": "b"},
            ADD_B,
        ),
        subnet="10.77.0.0/30",
    ),
    Case(
        "ADD that fails at a route",
        "failed ADD",
        {**BRIDGE, "ipam": {**IPV4, "routes": [{"dst": "10.5.0.0/16", "gw": "10.99.0.1"}]}},
        failed,
        rule="B53",
    ),
    own("ADD that fails at the address", "failed ADD", failed, rule="B53", subnet="10.77.0.1/24"),
]
IPAM_CASES = [*RANGES, *FAULTS, *REQUESTED, *TURNS]

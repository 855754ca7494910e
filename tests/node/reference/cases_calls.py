"""The contract itself: versions, environment, stdin, and each command on what is not as it should be."""

from __future__ import annotations

import json
from typing import Any

from tests.node.reference.acts_calls import (
    broken,
    checked,
    deleted,
    form,
    own_netns,
    previous,
    printed,
    refused,
    twice,
)
from tests.node.reference.acts_links import firewalled, groups, other_address, other_mac
from tests.node.reference.case import Act, Case
from tests.node.reference.cases_keys import BRIDGE, IPV4, PTP

SHORT = {**BRIDGE, "ipam": IPV4}
OLD = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0")  # those that the reference has


def case(name: str, key: str, act: Act, rule: str = "", **changes: object) -> Case:
    """Return a case of the bridge with IPv4."""
    return Case(name, key, {**SHORT, **changes}, act, rule=rule)


def remembered(change: str) -> Any:  # noqa: ANN401
    """Return a function that makes a change to prevResult."""

    def prev(result: dict[str, Any]) -> None:
        (own,) = (each for each in result["interfaces"] if each.get("sandbox"))
        match change:
            case "mac":
                own["mac"] = "02:00:00:00:77:09"
            case "sandbox":
                own["sandbox"] = "/var/run/netns/another"
            case "address":
                result["ips"][0]["address"] = result["ips"][0]["address"].replace("10.77.0.2", "10.77.0.3")

    return prev


VERSIONS = [
    *(Case(f"cniVersion {version}", "`cniVersion`", {**PTP, "cniVersion": version}, form) for version in OLD),
    *(
        Case(f"cniVersion {each}, bridge", "`cniVersion`", {**BRIDGE, "cniVersion": each}, form)
        for each in ("0.2.0", "0.4.0")
    ),
    Case(
        "cniVersion absent",
        "`cniVersion`",
        {key: value for key, value in PTP.items() if key != "cniVersion"},
        form,
        "P20",
    ),
    Case("cniVersion 1.1.0", "`cniVersion`", {**SHORT, "cniVersion": "1.1.0"}, refused(), own_ipam=True),
    case("cniVersion unknown", "`cniVersion`", refused("9.9.9", "1.0.0"), rule="P17", cniVersion="9.9.9"),
    case("VERSION", "`cniVersion`", printed("VERSION", {}, '{"cniVersion":"1.0.0"}'), rule="P01"),
    case("no CNI_COMMAND", "environment", printed("", {}), rule="P04"),
]
ENVIRONMENT = [
    case(
        "all missing",
        "environment",
        refused(
            "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing",
            env=dict.fromkeys(("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"), ""),
        ),
        rule="P06",
    ),
    case(
        "CNI_CONTAINERID", "environment", refused("invalid characters in containerID", env={"CNI_CONTAINERID": "a/b"})
    ),
    case("CNI_IFNAME too long", "environment", refused("interface name is too long", ifname="sixteen-letters-")),
    case(
        "CNI_IFNAME with a slash",
        "environment",
        refused("interface name contains / or : or whitespace characters", ifname="a/b"),
    ),
    case("CNI_COMMAND unknown", "environment", refused("unknown CNI_COMMAND: ADDD", command="ADDD")),
    case("CNI_COMMAND in lower case", "environment", refused("unknown CNI_COMMAND: add", command="add")),
    case("CNI_ARGS without =", "`CNI_ARGS`", refused("invalid pair", "foo", env={"CNI_ARGS": "foo"}), rule="P24"),
    case("CNI_ARGS with two =", "`CNI_ARGS`", refused("invalid pair", env={"CNI_ARGS": "IgnoreUnknown=1;A=b=c"})),
    case("CNI_ARGS ends with ;", "`CNI_ARGS`", refused("invalid pair", env={"CNI_ARGS": "IgnoreUnknown=1;"})),
    case("CNI_ARGS unknown", "`CNI_ARGS`", refused("unknown args", "FOO", env={"CNI_ARGS": "FOO=bar"})),
    case("CNI_ARGS unknown, IgnoreUnknown", "`CNI_ARGS`", refused(env={"CNI_ARGS": "FOO=bar;IgnoreUnknown=True"})),
    case("CNI_ARGS of Kubernetes", "`CNI_ARGS`", refused(env={"CNI_ARGS": "K8S_POD_NAME=a;IgnoreUnknown=1"})),
    case("CNI_NETNS dangling", "`CNI_NETNS`", refused("/run/netns/nobody", env={"CNI_NETNS": "/run/netns/nobody"})),
    case("CNI_NETNS no namespace", "`CNI_NETNS`", refused(env={"CNI_NETNS": "/etc/hostname"})),
    case("CNI_NETNS of the node, ADD", "`CNI_NETNS`", own_netns("ADD"), rule="P26"),
    case("CNI_NETNS of the node, DEL", "`CNI_NETNS`", own_netns("DEL"), rule="P26"),
]
STDIN = [
    case("no JSON", "stdin", refused(stdin="nonsense")),
    case("nothing", "stdin", refused(stdin="")),
    case("a JSON list", "stdin", refused(stdin="[]")),
    case("no name", "stdin", refused("missing network name", stdin=json.dumps({**SHORT, "name": ""}))),
    case("bad name", "stdin", refused("invalid characters found in network name", name="a/b"), rule="P16"),
    case(
        "keys in another case",
        "stdin",
        refused(stdin=json.dumps({"CNIVERSION": "1.0.0", "NAME": "net", "Type": "bridge", "Bridge": "cni0"})),
        rule="P23",
    ),
    case("unknown keys", "stdin", refused(capabilities={"mac": True}, unheardOf=[1]), rule="P22"),
    *(
        case(f"{key} of a wrong type", "wrong JSON types", refused(key), rule="B51", **{key: value})
        for key, value in {
            "isGateway": "true",
            "isDefaultGateway": "true",
            "ipMasq": "true",
            "hairpinMode": 1,
            "mtu": "1400",
            "vlan": "100",
            "bridge": 7,
            "ipam": "host-local",
            "dns": {"nameservers": "10.0.0.53"},
            "runtimeConfig": {"mac": 7},
            "args": {"cni": {"mac": 7}},
        }.items()
    ),
    case("prevResult", "`prevResult`", previous),
    case("prevResult that is none", "`prevResult`", refused(prevResult={"cniVersion": "1.0.0", "ips": "nonsense"})),
]
ADD = [
    case("ADD twice", "ADD twice", twice, rule="B37"),
    case("other MAC address", "`macspoofchk`", other_mac),
    case("other MAC address, macspoofchk", "`macspoofchk`", other_mac, macspoofchk=True),
    case("other address", "`macspoofchk`", other_address),
    case("broadcast and multicast", "layer 2", groups),
    case("FORWARD drops all", "the node's firewall", firewalled),
    Case("FORWARD drops all, ptp", "the node's firewall", PTP, firewalled),
]
CHECK = [
    case("right after ADD", "CHECK", checked()),
    Case("right after ADD, ptp", "CHECK", PTP, checked()),
    case("without prevResult", "CHECK", refused("Required prevResult missing", command="CHECK")),
    case("interface down", "CHECK", checked("ip link set eth0 down")),
    case("address gone", "CHECK", checked("ip address flush dev eth0")),
    case("default route gone", "CHECK", checked("ip route delete default"), rule="B40"),
    case("neighbours gone", "CHECK", checked("ip neigh flush dev eth0 nud all")),
    case("another address more", "CHECK", checked("ip address add 10.77.0.99/32 dev eth0"), rule="X03"),
    case("MAC address changed", "CHECK", checked("ip link set eth0 address 02:00:00:00:77:09")),
    case(
        "MAC address changed and recorded",
        "CHECK",
        checked("ip link set eth0 address 02:00:00:00:77:09", prev=remembered("mac")),
        rule="B41",
    ),
    case("another address recorded", "CHECK", checked(prev=remembered("address")), rule="H23"),
    case("another namespace recorded", "CHECK", checked(prev=remembered("sandbox"))),
    case("interface deleted", "broken links", broken("ip link delete eth0")),
    case("host's end set down", "broken links", broken("ip link set HOST down", in_node=True)),
    case(
        "version 0.3.1",
        "CHECK",
        refused("config version does not allow CHECK", command="CHECK", cniVersion="0.3.1"),
        rule="P18",
    ),
]
DEL = [
    case("of nothing", "DEL", refused(command="DEL"), rule="B35"),
    case("namespace empty", "DEL", deleted(env={"CNI_NETNS": ""}), rule="B52"),
    case("namespace dangling", "DEL", deleted(env={"CNI_NETNS": "/run/netns/nobody"}), rule="B36"),
    case("namespace no namespace", "DEL", deleted(env={"CNI_NETNS": "/etc/hostname"})),
    case("interface gone already", "DEL", deleted("ip link delete eth0")),
    case(
        "prevResult foreign",
        "DEL",
        deleted(prevResult={"cniVersion": "1.0.0", "ips": [{"address": "10.99.0.1/24"}]}),
        rule="X04",
    ),
    Case("namespace empty, ptp", "DEL", PTP, deleted(env={"CNI_NETNS": ""}), rule="T08"),
]
CALLS = [*VERSIONS, *ENVIRONMENT, *STDIN, *ADD, *CHECK, *DEL]

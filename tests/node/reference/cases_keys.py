"""The keys of bridge and ptp, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.node.reference.acts import life
from tests.node.reference.acts_calls import calls, limited, mac, refused, refused_by_name, second_interface, shape
from tests.node.reference.case import Case

SUBNETS = [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]]
DEFAULTS = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
DUAL = {"type": "host-local", "ranges": SUBNETS}
IPV4 = {"type": "host-local", "subnet": "10.77.0.0/24"}
CONFIG = {"cniVersion": "1.0.0", "name": "net"}
BRIDGE = {**CONFIG, "type": "bridge", "bridge": "cni0", "isDefaultGateway": True, "ipMasq": True, "ipam": DUAL}
LAYER_2 = {**CONFIG, "type": "bridge", "bridge": "cni0"}
PTP = {**CONFIG, "type": "ptp", "ipMasq": True, "ipam": {**DUAL, "routes": DEFAULTS}}
MAC = "02:00:00:00:77:01"


def routed(*routes: Mapping[str, object]) -> dict[str, Any]:
    """Return an IPAM configuration with these routes."""
    return {**IPV4, "routes": list(routes)}


GATEWAYS = [
    Case("isGateway", "`isGateway`", {**LAYER_2, "isGateway": True, "ipMasq": True, "ipam": DUAL}, life),
    Case("isGateway, no ipMasq", "`isGateway`", {**LAYER_2, "isGateway": True, "ipam": routed(DEFAULTS[0])}, life),
    Case("neither isGateway nor isDefaultGateway", "`isGateway`", {**LAYER_2, "ipam": DUAL}, life),
    Case("isDefaultGateway", "`isDefaultGateway`", BRIDGE, life),
    Case(
        "isDefaultGateway, default route of IPAM without gw",
        "`isDefaultGateway`",
        {**BRIDGE, "ipam": routed({"dst": "0.0.0.0/0"})},
        life,
        rule="B50",
    ),
    Case(
        "isDefaultGateway, default route of IPAM with gw",
        "`isDefaultGateway`",
        {**BRIDGE, "ipam": routed({"dst": "0.0.0.0/0", "gw": "10.77.0.1"})},
        life,
    ),
    Case("a route of IPAM", "`ipam.routes`", {**BRIDGE, "ipam": routed({"dst": "10.5.0.0/16"})}, life),
    Case(
        "a route of IPAM by another pod",
        "`ipam.routes`",
        {**BRIDGE, "ipam": routed({"dst": "10.5.0.0/16", "gw": "10.77.0.9"})},
        refused(),
    ),
]
MASQUERADE = [
    Case("ipMasq absent", "`ipMasq`", {key: value for key, value in BRIDGE.items() if key != "ipMasq"}, life),
    Case("ipMasq false", "`ipMasq`", {**BRIDGE, "ipMasq": False}, life),
    Case("ipMasq false, ptp", "`ipMasq`", {**PTP, "ipMasq": False}, life),
    Case("ipMasqBackend nftables", "`ipMasqBackend`", {**BRIDGE, "ipMasqBackend": "nftables"}, life),
    Case("ipMasqBackend unknown", "`ipMasqBackend`", {**BRIDGE, "ipMasqBackend": "foo"}, refused()),
]
WITHOUT_A_BRIDGE = [
    Case("bridge of another name", "`bridge`", {**BRIDGE, "bridge": "br-other"}, life),
    Case("bridge that is no bridge", "`bridge`", {**BRIDGE, "bridge": "uplink"}, refused("not a bridge")),
    Case("hairpinMode", "`hairpinMode`", {**BRIDGE, "hairpinMode": True}, life),
    Case("promiscMode", "`promiscMode`", {**BRIDGE, "promiscMode": True}, life),
    Case(
        "hairpinMode and promiscMode",
        "`promiscMode`",
        {**BRIDGE, "hairpinMode": True, "promiscMode": True},
        refused("cannot set hairpin mode and promiscuous mode at the same time"),
    ),
    Case("macspoofchk", "`macspoofchk`", {**BRIDGE, "macspoofchk": True}, life),
    Case("enabledad", "`enabledad`", {**BRIDGE, "enabledad": True}, life),
    Case(
        "two networks on a bridge",
        "`forceAddress`",
        BRIDGE,
        calls({}, {"pod": "b", "name": "other", "ipam": {**IPV4, "subnet": "10.78.0.0/24"}}),
    ),
    Case(
        "two networks on a bridge, forceAddress",
        "`forceAddress`",
        {**BRIDGE, "forceAddress": True},
        calls({}, {"pod": "b", "name": "other", "ipam": {**IPV4, "subnet": "10.78.0.0/24"}}),
    ),
    Case("vlan 0", "`vlan`", {**BRIDGE, "vlan": 0}, life),
    Case("vlan 100", "`vlan`", {**LAYER_2, "vlan": 100, "ipam": DUAL}, refused_by_name("vlan")),
    Case("vlan 4095", "`vlan`", {**BRIDGE, "vlan": 4095}, refused("invalid VLAN ID 4095 (must be between 0 and 4094)")),
    Case(
        "vlanTrunk",
        "`vlanTrunk`, `portIsolation`, `disableContainerInterface`",
        {**BRIDGE, "vlanTrunk": [{"id": 101}]},
        refused_by_name("vlanTrunk"),
    ),
    Case(
        "portIsolation",
        "`vlanTrunk`, `portIsolation`, `disableContainerInterface`",
        {**BRIDGE, "portIsolation": True},
        refused_by_name("portIsolation"),
    ),
    Case(
        "disableContainerInterface",
        "`vlanTrunk`, `portIsolation`, `disableContainerInterface`",
        {**LAYER_2, "disableContainerInterface": True},
        refused_by_name("disableContainerInterface"),
    ),
    Case("mtu 1400", "`mtu`", {**BRIDGE, "mtu": 1400}, life),
    Case("mtu 1400, ptp", "`mtu`", {**PTP, "mtu": 1400}, life),
]
IPAM = [
    Case("ipam absent", "no `ipam`", LAYER_2, life),
    Case("ipam null", "no `ipam`", {**LAYER_2, "ipam": None}, life),
    Case("ipam {}", "no `ipam`", {**LAYER_2, "ipam": {}}, life),
    Case("ipam absent, isGateway", "no `ipam`", {**LAYER_2, "isGateway": True}, life),
    Case("ipam absent, ptp", "no `ipam`", {**CONFIG, "type": "ptp"}, refused()),
    Case("ipam without type", "`ipam.type`", {**BRIDGE, "ipam": {"subnet": "10.77.0.0/24"}}, refused()),
    Case("ipam.type that does not exist", "`ipam.type`", {**BRIDGE, "ipam": {"type": "nobody"}}, refused("nobody")),
    Case("ipam.type with a path", "`ipam.type`", {**BRIDGE, "ipam": {"type": "../host-local"}}, refused("host-local")),
    Case(
        "static",
        "`ipam.type`",
        {
            **BRIDGE,
            "ipam": {"type": "static", "addresses": [{"address": "10.77.0.9/24", "gateway": "10.77.0.1"}]},
        },
        calls({}, {"command": "DEL"}),
    ),
    Case(
        "static, gateway outside the subnet",
        "`ipam.type`",
        {
            **PTP,
            "ipam": {
                "type": "static",
                "addresses": [{"address": "10.77.0.9/32", "gateway": "10.77.0.1"}],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        calls({}, {"command": "DEL"}),
    ),
]
REQUESTS = [
    Case("MAC of CNI_ARGS", "MAC requested", BRIDGE, mac(MAC, env={"CNI_ARGS": f"IgnoreUnknown=1;MAC={MAC}"})),
    Case("MAC of args.cni", "MAC requested", BRIDGE, mac(MAC, args={"cni": {"mac": MAC}})),
    Case("MAC of runtimeConfig", "MAC requested", BRIDGE, mac(MAC, runtimeConfig={"mac": MAC})),
    Case(
        "MAC of all three",
        "MAC requested",
        BRIDGE,
        mac(
            MAC,
            env={"CNI_ARGS": "IgnoreUnknown=1;MAC=02:00:00:00:77:02"},
            args={"cni": {"mac": "02:00:00:00:77:03"}},
            runtimeConfig={"mac": MAC},
        ),
    ),
    Case(
        "MAC of args.cni over CNI_ARGS",
        "MAC requested",
        BRIDGE,
        mac(MAC, env={"CNI_ARGS": "IgnoreUnknown=1;MAC=02:00:00:00:77:02"}, args={"cni": {"mac": MAC}}),
    ),
    Case(
        "MAC of another pod",
        "MAC requested",
        BRIDGE,
        calls({"runtimeConfig": {"mac": MAC}}, {"pod": "b", "runtimeConfig": {"mac": MAC}}),
    ),
    Case("MAC that is none", "MAC requested", BRIDGE, mac("nonsense", runtimeConfig={"mac": "nonsense"})),
    Case("dns", "`dns`", {**BRIDGE, "dns": {"nameservers": ["10.0.0.53"], "search": ["example.org"]}}, calls({})),
    Case("dns, an empty list", "`dns`", {**BRIDGE, "dns": {"nameservers": []}}, calls({})),
    Case("dns, ptp", "`dns`", {**PTP, "dns": {"nameservers": ["10.0.0.53"], "domain": "example.org"}}, calls({})),
    Case(
        "runtimeConfig.dns",
        "`runtimeConfig.dns`",
        BRIDGE,
        calls({"runtimeConfig": {"dns": {"servers": ["10.0.0.53"]}}}),
    ),
    Case(
        "runtimeConfig.portMappings",
        "`runtimeConfig.portMappings`",
        BRIDGE,
        calls({"runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]}}),
    ),
    Case(
        "runtimeConfig.bandwidth",
        "`runtimeConfig.bandwidth`",
        BRIDGE,
        limited,
    ),
]
TEXTBOOK = {
    "cniVersion": "0.4.0",
    "name": "awesomenet",
    "type": "bridge",
    "bridge": "cni0",
    "isGateway": True,
    "ipMasq": True,
    "ipam": {"type": "host-local", "subnet": "10.77.0.0/24", "routes": [{"dst": "0.0.0.0/0"}]},
}
KEYS = [
    Case("the textbook's configuration", "the pod's link", TEXTBOOK, life),
    Case("bridge", "the pod's link", BRIDGE, shape),
    Case("ptp", "the pod's link", PTP, shape, rule="T09"),
    Case("ptp, two pods", "`ptp`", PTP, life),
    Case("ptp without default route", "`ptp`", {**PTP, "ipam": DUAL}, life),
    Case("two interfaces", "two interfaces of a pod", BRIDGE, second_interface, rule="B38"),
    Case("two interfaces, ptp", "two interfaces of a pod", PTP, second_interface),
    *GATEWAYS,
    *MASQUERADE,
    *WITHOUT_A_BRIDGE,
    *IPAM,
    *REQUESTS,
]

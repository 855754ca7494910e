"""What is done with a configuration, and what is written down of it.

Three things differ wherever podlane stands in for a plugin, so they are left out here, and looked at once, by `shape`:
the lengths of prefixes, the next hops of routes, and the routes to the pod's own subnets in the result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cni.result import Result, parse_result
from tests.node.machine import Netns, Outcome
from tests.node.reference.asking import all_asked
from tests.node.reference.case import Scene, Seen
from tests.node.reference.sides import NODE, WORLD

GATEWAYS = {4: "10.77.0.1", 6: "fd77::1"}
"""Of the subnets that all cases use, as IPAM has it."""
_SUBNETS = ("10.77.", "10.78.", "fd77:")


def told(name: str, outcome: Outcome, phrases: Sequence[str] = ()) -> Seen:
    """Return what came of a call: whether it was served, and if not, with which code and which of these phrases."""
    if outcome.exit_code == 0:
        return {name: "served"}
    try:
        error = json.loads(outcome.stdout)
    except ValueError:
        return {name: f"printed {outcome.stdout!r}"}
    text = f"{error['msg']} {error.get('details', '')}"
    seen: Seen = {name: "refused", f"{name}: code": error["code"]}
    return seen | ({f"{name}: says": [each for each in phrases if each in text]} if phrases else {})


def life(scene: Scene) -> Seen:
    """Two pods: ADD, CHECK, who reaches whom, DEL twice."""
    outcome = scene.call("ADD")
    seen = told("ADD", outcome)
    if outcome.exit_code:
        return seen
    prev = outcome.json()
    seen |= told("CHECK", scene.call("CHECK", prevResult=prev))
    results = {"a": parse(outcome), "b": parse(scene.call("ADD", "b"))}
    seen |= in_result(prev, results["a"]) | in_pod(scene, results["a"])
    seen |= reach(scene, results)
    for name in ("DEL", "DEL again"):
        seen |= told(name, scene.call("DEL", prevResult=prev))
    return seen | left(scene)


def parse(outcome: Outcome) -> Result:
    """Return the result that ADD printed."""
    return parse_result(outcome.json(), "")


def in_result(printed: Mapping[str, Any], result: Result) -> Seen:
    """Return what the result tells a runtime of the pod."""
    own = [number for number, each in enumerate(result.interfaces) if each.sandbox]
    return {
        "result: version": printed.get("cniVersion"),
        "result: addresses": [str(ip.address.ip) for ip in result.ips],
        "result: addresses of the pod's interface": all(ip.interface in (*own, None) for ip in result.ips),
        "result: routes": sorted(str(each.dst) for each in result.routes if not str(each.dst).startswith(_SUBNETS)),
        "result: dns": printed.get("dns") or {},
    }


def in_pod(scene: Scene, result: Result, ifname: str = "eth0") -> Seen:
    """Return what there is in the pod: addresses, destinations of routes, MTU."""
    (link,) = ip(scene, "address", "show", "dev", ifname)
    addresses = [each["local"] for each in link["addr_info"] if each["scope"] == "global"]
    routes = {each["dst"] for family in ("-4", "-6") for each in ip(scene, family, "route")}
    return {
        "pod: addresses": sorted(addresses),
        "pod: routes": sorted(dst for dst in routes if dst.partition("/")[0] not in _no_destinations(result)),
        "pod: mtu": link["mtu"],
        "pod: up": "UP" in link["flags"],
    }


def ip(scene: Scene, *arguments: str) -> list[Mapping[str, Any]]:
    """Return what ip says in the pod."""
    shown: list[Mapping[str, Any]] = json.loads(scene.pod().run("ip", "-j", *arguments).stdout or "[]")
    return [each for each in shown if each]


def _no_destinations(result: Result) -> set[str]:
    """Return what in a pod's routing table is no place to go to: its gateways, itself, and its own link."""
    gateways = {str(ip.gateway) for ip in result.ips if ip.gateway}
    return gateways | {str(ip.address.ip) for ip in result.ips} | set(GATEWAYS.values()) | {"fe80::", "fe80::1"}


def reach(scene: Scene, results: Mapping[str, Result]) -> Seen:
    """Return who reaches whom, of two pods, their gateway, the node and the world; towards the world, as whom."""
    by_name: dict[str, tuple[Netns, str]] = {}
    names = {"": "nobody"}
    for version in sorted({ip.address.version for ip in results["a"].ips}):
        a, b = (_address(results[pod], version) for pod in ("a", "b"))
        names |= {a: "itself", NODE[version]: "the node"}
        by = f"IPv{version}"
        by_name |= {
            f"{by}: pod reaches pod as": (scene.pod(), b),
            f"{by}: pod reaches its gateway as": (scene.pod(), GATEWAYS[version]),
            f"{by}: pod reaches the node as": (scene.pod(), NODE[version]),
            f"{by}: pod reaches the world as": (scene.pod(), WORLD[version]),
            f"{by}: pod reaches itself": (scene.pod(), a),
            f"{by}: world reaches pod": (scene.side.world, a),
            f"{by}: node reaches pod": (scene.side.node, a),
        }
    return {
        name: names.get(answer, answer) if name.endswith(" as") else bool(answer)
        for name, answer in all_asked(by_name).items()
    }


def _address(result: Result, version: int) -> str:
    return next(str(ip.address.ip) for ip in result.ips if ip.address.version == version)


def left(scene: Scene) -> Seen:
    """Return what is left of the first pod after its DEL."""
    rules = scene.side.node.run("sh", "-c", "iptables-save -t nat; ip6tables-save -t nat").stdout
    return {
        "left: interfaces in the pod": [name for name in scene.side.links(scene.pod()) if name != "lo"],
        "left: reserved addresses": scene.side.reserved("container-a"),
        "left: masquerade rules": "container-a" in rules,
    }

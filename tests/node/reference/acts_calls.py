"""What is done with a configuration besides living with it: single calls, errors, CHECK of what was changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests.node.reference.acts import in_result, ip, left, parse, told
from tests.node.reference.asking import asked
from tests.node.reference.case import Act, Scene, Seen

_MENDING_SECONDS = 3.0


def refused(*phrases: str, command: str = "ADD", **call: Any) -> Act:  # noqa: ANN401  # whatever `Scene.call` takes
    """Return an act that calls once, and compares the error: its code, and which of these phrases it has."""

    def act(scene: Scene) -> Seen:
        return told(command, scene.call(command, **call), phrases)

    return act


def calls(*several: Mapping[str, Any]) -> Act:
    """Return an act of several calls, each what `Scene.call` takes, with `phrases` to look for in an error.

    `command` is ADD if it says nothing else. What ADD gives is compared.
    """

    def act(scene: Scene) -> Seen:
        seen: Seen = {}
        for number, each in enumerate(several, start=1):
            rest = {key: value for key, value in each.items() if key not in ("command", "phrases")}
            command = each.get("command", "ADD")
            outcome = scene.call(command, **rest)
            name = f"{command} {number}"
            seen |= told(name, outcome, each.get("phrases", ()))
            if command == "ADD" and outcome.exit_code == 0:
                its = in_result(outcome.json(), parse(outcome))
                seen |= {f"{name}: {what}": its[f"result: {what}"] for what in ("addresses", "routes", "dns")}
        return seen

    return act


def checked(*commands: str, prev: Callable[[dict[str, Any]], object] | None = None) -> Act:
    """Return an act: ADD, then these commands in the pod, then CHECK with prevResult changed so."""

    def act(scene: Scene) -> Seen:
        printed = scene.call("ADD").json()
        for command in commands:
            scene.pod().run(*command.split())
        if prev is not None:
            prev(printed)
        return told("CHECK", scene.call("CHECK", prevResult=printed))

    return act


def broken(command: str, *, in_node: bool = False) -> Act:
    """Return an act: a pod's link is broken by a command in the pod or, with HOST for its name there, in the node."""

    def act(scene: Scene) -> Seen:
        outcome = scene.call("ADD")
        address = str(parse(outcome).ips[0].address.ip)
        host = next(each["name"] for each in outcome.json()["interfaces"] if each["name"].startswith(("veth", "pl")))
        (scene.side.node if in_node else scene.pod()).run(*command.replace("HOST", host).split())
        deadline = time.monotonic() + _MENDING_SECONDS
        while not (reached := bool(asked(scene.side.node, address))) and time.monotonic() < deadline:
            time.sleep(0.05)
        return {"works again": reached}

    return act


def deleted(*commands: str, **call: Any) -> Act:  # noqa: ANN401
    """Return an act: ADD, then these commands in the pod, then DEL called so, and what is left."""

    def act(scene: Scene) -> Seen:
        scene.call("ADD")
        for command in commands:
            scene.pod().run(*command.split())
        return told("DEL", scene.call("DEL", **call)) | left(scene)

    return act


def failed(scene: Scene) -> Seen:
    """ADD that cannot succeed: what it leaves, before and after DEL."""
    seen = told("ADD", scene.call("ADD"))
    seen |= {f"before DEL, {name}": value for name, value in left(scene).items()}
    return seen | told("DEL", scene.call("DEL")) | left(scene)


def mac(wanted: str, **call: Any) -> Act:  # noqa: ANN401
    """Return an act that asks for a MAC address."""

    def act(scene: Scene) -> Seen:
        outcome = scene.call("ADD", **call)
        seen = told("ADD", outcome)
        if outcome.exit_code == 0:
            (link,) = ip(scene, "link", "show", "dev", "eth0")
            own = next(each for each in outcome.json()["interfaces"] if each.get("sandbox"))
            seen |= {"pod: mac": link["address"] == wanted, "result: mac": own["mac"] == wanted}
        return seen

    return act


def form(scene: Scene) -> Seen:
    """Keys of the result, by kind of object: what the versions of the specification differ in."""
    outcome = scene.call("ADD")
    seen = told("ADD", outcome)
    if outcome.exit_code:
        return seen
    printed = outcome.json()
    seen["result: keys"] = sorted(printed)
    for name in ("interfaces", "ips", "routes"):
        seen[f"result: keys of {name}"] = sorted({key for each in printed.get(name, []) for key in each})
    for name in ("ip4", "ip6"):
        seen[f"result: keys of {name}"] = sorted(printed.get(name, {}))
    seen["result: version"] = printed["cniVersion"]
    for command in ("CHECK", "DEL"):
        seen |= told(command, scene.call(command, prevResult=printed))
    return seen


def shape(scene: Scene) -> Seen:
    """All that other acts leave out, word for word."""
    outcome = scene.call("ADD")
    printed, result = outcome.json(), parse(outcome)
    address = str(result.ips[0].address.ip)
    (link,) = ip(scene, "address", "show", "dev", "eth0")
    (default,) = ip(scene, "route", "show", "default")
    other = str(parse(scene.call("ADD", "b")).ips[0].address.ip)
    subnet = ip(scene, "route", "show", "10.77.0.0/24")
    return {
        "result: interfaces": [_role(each) for each in printed["interfaces"]],
        "result: address": printed["ips"][0]["address"],
        "result: gateway": printed["ips"][0]["gateway"],
        "result: routes": sorted(f"{each['dst']} via {each.get('gw')}" for each in printed["routes"]),
        "pod: prefix length": next(each["prefixlen"] for each in link["addr_info"] if each["local"] == address),
        "pod: default route via": default["gateway"],
        "pod: subnet": sorted({f"via {each['gateway']}" if "gateway" in each else "on-link" for each in subnet}),
        "pod: knows the MAC address of its neighbour": bool(ip(scene, "neigh", "show", "nud", "permanent")),
        "pod: hops to another pod": _hops(scene, other),
        "node: new devices": sorted({_kind(name) for name in scene.side.links(scene.side.node)} - _NODES_OWN),
    }


_NODES_OWN = {"lo", "uplink"}
_TTL = 64  # net.ipv4.ip_default_ttl


def _hops(scene: Scene, address: str) -> int:
    """Return how many routers, less the receiver, took one off the time to live."""
    said = scene.pod().run("ping", "-c", "1", "-W", "2", address).stdout
    return _TTL - int(said.partition("ttl=")[2].split()[0])


def _role(interface: Mapping[str, Any]) -> str:
    if interface.get("sandbox"):
        return "pod's end"
    return _kind(interface["name"])


def _kind(name: str) -> str:
    return "bridge" if name == "cni0" else "host's end" if name.startswith(("veth", "pl")) else name


def printed(command: str, env: Mapping[str, str], stdin: str | None = None) -> Act:
    """Return an act that compares exit code and the whole of stdout, less the texts of errors."""

    def act(scene: Scene) -> Seen:
        outcome = scene.call(command, env=env, stdin=stdin)
        try:
            body = json.loads(outcome.stdout or "null")
        except ValueError:
            body = outcome.stdout
        if isinstance(body, dict):
            body = {key: value for key, value in body.items() if key not in ("msg", "details")}
        return {"exit code": outcome.exit_code, "stdout": body, "stderr": bool(outcome.stderr)}

    return act


def second_interface(scene: Scene) -> Seen:
    """One pod, two interfaces of one network."""
    seen: Seen = {}
    for ifname in ("eth0", "net1"):
        seen |= told(f"ADD of {ifname}", scene.call("ADD", ifname=ifname))
    for ifname in ("net1", "eth0"):
        seen |= told(f"DEL of {ifname}", scene.call("DEL", ifname=ifname))
    return seen


def twice(scene: Scene) -> Seen:
    """ADD of what is there: it is refused, and what is there goes on working."""
    first = scene.call("ADD")
    seen = told("ADD again", scene.call("ADD"))
    address = str(parse(first).ips[0].address.ip)
    seen["node reaches pod"] = bool(asked(scene.side.node, address))
    return seen | told("CHECK", scene.call("CHECK", prevResult=first.json()))


def refused_by_name(key: str) -> Act:
    """Return an act: whether ADD says, with code 2, that it does not have a key.

    What the reference does depends on its version and on what the kernel's bridges have.
    """

    def act(scene: Scene) -> Seen:
        outcome = scene.call("ADD")
        error = json.loads(outcome.stdout) if outcome.exit_code else {}
        return {"ADD: refused by name": error.get("code") == 2 and key in error["msg"]}

    return act


def resolv_conf(text: str) -> Act:
    """Return an act that lets IPAM read a file."""

    def act(scene: Scene) -> Seen:
        file = scene.side.directory / "resolv.conf"
        file.write_text(text)
        outcome = scene.call("ADD", ipam={**scene.given["ipam"], "resolvConf": str(file)})
        return told("ADD", outcome) | {"result: dns": outcome.json().get("dns")}

    return act


def own_netns(command: str) -> Act:
    """Return an act that is given the node's own network namespace: what is said, and whether an interface is made."""

    def act(scene: Scene) -> Seen:
        outcome = scene.call(command, env={"CNI_NETNS": str(scene.side.node.path)})
        seen = told(command, outcome, ["plugin's netns and netns from CNI_NETNS should not be the same"])
        return seen | {"interface in the node": "eth0" in scene.side.links(scene.side.node)}

    return act


def previous(scene: Scene) -> Seen:
    """ADD behind another plugin, whose result comes with it."""
    prev = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "lo", "sandbox": str(scene.pod().path)}],
        "ips": [{"interface": 0, "address": "127.0.0.1/8"}],
    }
    outcome = scene.call("ADD", prevResult=prev)
    names = [each["name"] for each in outcome.json()["interfaces"] if each.get("sandbox")]
    return told("ADD", outcome) | {"result: the pod's interfaces": names}


def kept(scene: Scene) -> Seen:
    """Files that ADD leaves in `ipam.dataDir`."""
    return told("ADD", scene.call("ADD")) | {"files in dataDir": any(scene.side.data_dir.glob("*/10.*"))}


def limited(scene: Scene) -> Seen:
    """ADD a pod whose runtime asks for limits both ways, count the token buckets that there are then, and DEL it."""
    rates = {f"{way}{what}": 8_000_000 for way in ("ingress", "egress") for what in ("Rate", "Burst")}
    outcome = scene.call("ADD", runtimeConfig={"bandwidth": rates})
    queues = json.loads(scene.side.node.run("tc", "-j", "qdisc", "show").stdout)
    seen = told("ADD", outcome) | {"node: limited directions": sum(each["kind"] == "tbf" for each in queues)}
    return seen | told("DEL", scene.call("DEL"))

"""Requests as container runtimes make them, and what becomes of them when keys, values and bytes are changed.

A mutation follows from its number alone, so that one which finds a fault can be made again.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cni.wire import Reply, Request
from tests.unit.calls import VERSIONS

NUMBER = int(os.environ.get("PODLANE_MUTATIONS", "20000"))
"""How many mutated requests there are in one process; over the socket and through the launcher there are fewer."""
SECONDS = 300 + NUMBER // 100
"""After which a test of them hangs."""

# An IPAM plugin: each container has an address of its own; where its id is no number, that is not even JSON.
_GIVER = """#!/bin/sh
if [ "$CNI_COMMAND" = ADD ]; then
    echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.79.0.'${CNI_CONTAINERID#c}'/24"}]}'
fi
"""

Document = dict[str, Any]

_KUBERNETES = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-{n};K8S_POD_INFRA_CONTAINER_ID=c{n}"
_POOL = {"type": "podlane", "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]]}
_OWN_IPAM = {
    "type": "podlane",
    "ranges": [[{"subnet": "10.78.0.0/24", "rangeStart": "10.78.0.10", "gateway": "10.78.0.1"}]],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.96.0.0/12", "gw": "10.78.0.1", "mtu": 1400}],
    "exclude": ["10.78.0.32/28"],
    "reserved": ["10.78.0.200/29"],
    "sticky": True,
}
_RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "pl0"}, {"name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/x"}],
    "ips": [{"address": "10.244.0.2/32", "gateway": "169.254.1.1", "interface": 1}],
    "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}],
    "dns": {"nameservers": ["10.96.0.10"]},
}
_CONTAINERD: Document = {
    "type": "podlane",
    "runtimeConfig": {
        "portMappings": [],
        "bandwidth": {"IngressRate": 0, "IngressBurst": 0, "EgressRate": 0, "EgressBurst": 0},
        "dns": {"Servers": ["10.96.0.10"], "Searches": ["default.svc.cluster.local"], "Options": ["ndots:5"]},
        "cgroupPath": "/kubepods/pod1",
        "io.kubernetes.cri.pod-annotations": {"a": "b"},
    },
    "capabilities": {"portMappings": True, "bandwidth": True},
}
_CRI_O: Document = {
    "type": "podlane",
    "ipam": _OWN_IPAM,
    "ipMasq": True,
    "mtu": 1400,
    "runtimeConfig": {"bandwidth": {"ingressRate": 0, "ingressBurst": 34359738359}, "cgroupPath": "kubepods.slice"},
}
_PODMAN: Document = {
    "type": "podlane",
    "bridge": "cni-podman0",
    "isGateway": True,
    "isDefaultGateway": True,
    "hairpinMode": True,
    "ipam": {**_POOL, "routes": [{"dst": "0.0.0.0/0"}]},
    "runtimeConfig": {"mac": "02:11:22:33:44:55", "ips": ["10.77.0.77"], "aliases": {"podlane": ["web"]}},
}
_MULTUS: Document = {
    "type": "podlane",
    "ipam": {"type": "giver", "subnet": "10.79.0.0/24", "resolvConf": "/etc/resolv.conf"},
    "args": {"cni": {"ips": ["10.77.0.9"], "mac": "02:00:00:00:00:09", "labels": [{"key": "a", "value": "b"}]}},
    "deviceID": "0000:00:00.0",
    "prevResult": _RESULT,
}
_CONFIGS: tuple[Document, ...] = (
    _CONTAINERD,
    _CRI_O,
    _PODMAN,
    _MULTUS,
    {"type": "podlane"},
    {"type": "podlane", "ipam": _POOL},
)
_ARGUMENTS = (_KUBERNETES, f"{_KUBERNETES};IP=10.244.0.9,fd00:10:244::9;MAC=02:00:00:00:00:08", "", "IgnoreUnknown=1")
_COMMANDS = ("ADD",) * 4 + ("DEL",) * 4 + ("CHECK", "GC", "STATUS")
_LISTS = ("cni.dev/valid-attachments", "cni.dev/attachments")

_WORDS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, 1e308, 2**31, 2**32, 2**63, 2**64, 10**400, "", " ", "\0", "\ud800", "%", "/"),
    *(
        [],
        {},
        [[]],
        [{}],
        [None],
        {"": None},
        "true",
        "1400",
        "x" * 300,
        "é" * 15,
        "𐀀",
        "..",
        "eth0",
        "a/b",
        "A" * 3000,
    ),
    *(
        "10.244.0.0/24",
        "10.244.0.1",
        "0.0.0.0/0",
        "::/0",
        "::",
        "fe80::1%eth0",
        "::ffff:10.0.0.1",
        "10.0.0.1/33",
        "1.1",
    ),
    *("255.255.255.255", "ff02::1", "127.0.0.1", "10.77.0.0/30", "10.77.0.0/31", "fd77::/127", "fd77::/0", "fe80::/64"),
    *(
        "02:00:00:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "02-00-00-00-00-01",
        "0200.0000.0001",
        "podlane",
        "giver",
        "none",
        "net",
    ),
    *(*VERSIONS, "1.1.1", "2.0.0", "1.1", "v1.1.0", "1.1.0\n", "-1.0.0", "9" * 5000, "/dev/zero", "/proc/self/mem"),
)
_NAMES = (
    *("cniVersion", "name", "type", "mtu", "ipam", "prevResult", "dns", "args", "runtimeConfig", "isDefaultGateway"),
    *("ipMasq", "ipMasqBackend", "vlan", "vlanTrunk", "promiscMode", "macspoofchk", "subnet", "ranges", "rangeStart"),
    *(
        "rangeEnd",
        "gateway",
        "routes",
        "dst",
        "gw",
        "table",
        "scope",
        "mtu",
        "advmss",
        "priority",
        "ips",
        "mac",
        "address",
    ),
    *("interface", "interfaces", "sandbox", "ip4", "ip6", "exclude", "reserved", "sticky", "ipRanges", "portMappings"),
    *("bandwidth", "cni", "resolvConf", "CNIVERSION", "Name", "\u017fubnet", "", *_LISTS),
)
_VARIABLES = (
    *("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH", "CNI_NETNS_OVERRIDE"),
    *("PATH", "LANG", "TRACEPARENT"),
)
_VALUES = (
    *("", "1", "true", "ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION", "add", "/run/netns/none", "/proc/self/ns/net"),
    *(
        "eth0",
        "eth1",
        "lo",
        "..",
        "sixteen-bytes-xx",
        "a b",
        "a:b",
        "é",
        "\udcff",
        "c1",
        "-c1",
        "c" * 300,
        ":::",
        "x" * 9999,
    ),
    *(
        "IP=10.244.0.9",
        "IP=;MAC=",
        "MAC=x",
        "A=b=c",
        ";",
        "IgnoreUnknown=2",
        "IP=10.244.0.1;IP=fd00::1;IgnoreUnknown=1",
    ),
)


class Mutator:
    """Makes requests for containers c0 to c15 with interfaces eth0 and eth1, of networks net0 and net1."""

    def __init__(self, seed: int, *, path: str, netns: str = "/run/netns/x") -> None:
        """`path` is that of CNI_PATH, `netns` of CNI_NETNS, until they are mutated."""
        self._seed = seed
        self._path = path
        self._netns = netns

    def request(self, number: int) -> Request:
        """Return request `number`, without a descriptor: one in three is as a runtime made it."""
        rng = random.Random(self._seed * 1_000_000_007 + number)
        environment, document = self._sound(rng)
        how_often = rng.choice((0, 0, 1, 1, 2, 5))
        for _ in range(how_often):
            if rng.random() < 0.7:
                document = _mutate_document(rng, document)
            else:
                _mutate_environment(rng, environment)
        stdin = _written(rng, document)
        if how_often and rng.random() < 0.15:
            stdin = mutate_bytes(rng, stdin)
        return Request(environment, stdin)

    def _sound(self, rng: random.Random) -> tuple[dict[str, str], Any]:
        number = rng.randrange(16)
        command = rng.choice(_COMMANDS)
        version = rng.choice(
            VERSIONS if command in ("ADD", "DEL") else VERSIONS[4:] if command == "CHECK" else VERSIONS[-1:]
        )
        environment = {
            "PATH": "/usr/bin",
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": f"c{number}",
            "CNI_NETNS": self._netns,
            "CNI_IFNAME": rng.choice(("eth0", "eth0", "eth1")),
            "CNI_ARGS": rng.choice(_ARGUMENTS).format(n=number),
            "CNI_PATH": self._path,
        }
        document: Document = copy.deepcopy(rng.choice(_CONFIGS))
        document |= {"cniVersion": version, "name": rng.choice(("net0", "net0", "net1"))}
        if command == "CHECK":
            document["prevResult"] = copy.deepcopy(_RESULT)
        if command == "GC":
            valid = [{"containerID": f"c{each}", "ifname": "eth0"} for each in range(16) if rng.random() < 0.9]
            document[rng.choice(_LISTS)] = rng.choice((valid, valid, valid, None))
        return environment, document


def install_giver(directory: Path) -> None:
    """Make the IPAM plugin that the requests name."""
    plugin = directory / "giver"
    plugin.write_text(_GIVER)
    plugin.chmod(0o755)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change, remove, repeat or add some bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, size = rng.randrange(len(changed) + 1), rng.choice((1, 2, 4, 30))
        part = changed[place : place + size]
        changed[place : place + rng.choice((0, size))] = rng.choice(
            (b"", bytes(part[::-1]), bytes(part * 2), rng.randbytes(size), b"\0" * size, b"\xff" * size, b"[" * 3000)
        )
    return bytes(changed)


def assert_valid(request: Request, reply: Reply) -> None:
    """Assert that there is one valid answer, and that it is no fault of podlane's own (code 999)."""
    shown = f"{reply!r} to env={dict(request.env)!r} stdin={request.stdin[:3000]!r}"
    assert reply.exit_code in (0, 1), shown
    if reply.exit_code == 0 and request.env.get("CNI_COMMAND") != "ADD":
        assert reply.stdout == b"", shown
        return
    answer = json.loads(reply.stdout)
    assert answer["cniVersion"] in VERSIONS, shown
    if reply.exit_code == 0:
        assert "code" not in answer, shown
        assert answer.keys() & {"ips", "ip4", "ip6"}, shown
    else:
        assert answer.keys() <= {"cniVersion", "code", "msg", "details"}, shown
        assert isinstance(answer["code"], int), shown
        assert answer["code"] != 999, shown
        assert answer["msg"], shown


def command_of(request: Request) -> str:
    """Return a request's command for a statistic, in which all that are none are one."""
    command = request.env.get("CNI_COMMAND", "")
    return command if command in _COMMANDS else "other"


def resident(pid: int | str = "self") -> int:
    """Return a process's resident memory in bytes (proc(5): statm)."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as statm:  # noqa: PTH123  # called often
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _mutate_document(rng: random.Random, document: Any) -> Any:  # noqa: ANN401  # whatever JSON it is by now
    """Change one value somewhere in it, or put it in another one's place; the document itself may go."""
    places = list(_places(document))
    if not places:
        return copy.deepcopy(rng.choice(_WORDS))
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice((str(key).upper(), str(key).lower(), rng.choice(_NAMES)))] = holder.pop(key)
        case 2 if isinstance(holder, dict):
            holder[rng.choice(_NAMES)] = copy.deepcopy(rng.choice(_WORDS))
        case 3:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        case 4:
            most = 40 if len(str(holder[key])) < 1000 else 2  # lest lists of lists become megabytes
            holder[key] = [copy.deepcopy(holder[key])] * min(most, rng.choice((1, 2, 40)))
        case 5 if isinstance(holder[key], str):
            holder[key] = mutate_bytes(rng, holder[key].encode("utf-8", "replace")).decode("utf-8", "surrogateescape")
        case _:
            holder[key] = copy.deepcopy(rng.choice(_WORDS))
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:  # noqa: ANN401
    """Return every value in a document, as what holds it and the key or index there."""
    keys: Any = ()
    if isinstance(document, dict):
        keys = document
    elif isinstance(document, list):
        keys = range(min(len(document), 8))
    return [place for key in keys for place in ((document, key), *_places(document[key]))]


def _mutate_environment(rng: random.Random, environment: dict[str, str]) -> None:
    name = rng.choice(_VARIABLES)
    match rng.randrange(4):
        case 0:
            environment.pop(name, None)
        case 1 if name in environment and name != "CNI_PATH":  # which must not lead to programs that are not ours
            mutated = mutate_bytes(rng, os.fsencode(environment[name]))
            environment[name] = os.fsdecode(mutated.replace(b"\0", b""))
        case _:
            environment[name] = rng.choice(_VALUES)


def _written(rng: random.Random, document: Any) -> bytes:  # noqa: ANN401
    text = json.dumps(document, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.03:
        text = text[:-1] + "," + text[1:]  # every key twice
    return text.encode("utf-8", "surrogatepass")


def environment_of(variables: Mapping[str, str]) -> dict[bytes, bytes]:
    """Return an environment as execve takes it."""
    return {os.fsencode(name): os.fsencode(value) for name, value in variables.items()}

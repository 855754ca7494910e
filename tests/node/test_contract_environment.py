"""The process contract of a plugin: environment, stdin, stdout, exit code (specification 1.1.0, section 2)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from tests.node.contract import NEWEST, VERSIONS, WITH_CHECK, Container, assert_refused, launch, rows
from tests.node.machine import LAUNCHER, Machine

REQUIRED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"),
    "GC": ("CNI_PATH",),
    "STATUS": ("CNI_PATH",),
}
NO_NAMESPACES = ("/nowhere", "/etc/passwd", "/proc/self/ns/uts", "/dev/null", "/")
VARIABLES = {"CNI_CONTAINERID": "c", "CNI_NETNS": "/proc/1/ns/net", "CNI_IFNAME": "eth0", "CNI_PATH": "/opt/cni/bin"}


@pytest.fixture(scope="module")
def node(clean_node: Machine) -> Machine:
    """Share the node among all tests of this module."""
    return clean_node


@pytest.mark.parametrize("version", VERSIONS)
def test_stdout_and_exit_code(it: Container, version: str) -> None:
    """IO1, IO2, IO3, P21: success is status 0, with one JSON document of ADD and nothing of others; failure is 1."""
    added = it.call("ADD", cniVersion=version, bridge="cni0", hairpinMode=True)  # worth a line of the log
    assert added.exit_code == 0
    result = added.json()
    if version in WITH_CHECK:
        it.done("CHECK", cniVersion=version, prevResult=result)
    if version == NEWEST:
        it.done("GC", env={"CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": ""}, cniVersion=version)
        it.done("STATUS", env={"CNI_CONTAINERID": "", "CNI_NETNS": "", "CNI_IFNAME": ""}, cniVersion=version)
    again = it.call("ADD", cniVersion=version)
    assert_refused(again, 100, version=version)
    assert (added.stderr, again.stderr) == ("", "")
    it.done("DEL", cniVersion=version)


def test_errors_are_never_empty_words(node: Machine, it: Container) -> None:
    """IO4: whatever is wrong, stdout is one error object with a message, so that libcni has to guess nothing."""
    wrong: list[dict[str, Any]] = [
        {"stdin": ""},
        {"stdin": "\0\xff"},
        {"stdin": '{"name": "\\ud800", "cniVersion": "1.1.0"}'},
        {"config": {"mtu": '\n"\\'}},
        {"env": {"CNI_ARGS": "a\nb\x1b"}},
        {"container_id": "\x01"},
        {"ifname": "é" * 9},
    ]
    for given in wrong:
        outcome = node.cni("ADD", **{"container_id": "c", "netns": str(it.netns.path), **given})
        assert outcome.exit_code == 1
        assert outcome.json()["msg"]


def test_version_needs_nothing(node: Machine) -> None:
    """IO5, P01, P02, P03: VERSION is answered to libcni's probe, with no other variable, and with stdin left open."""
    dummies = {"CNI_NETNS": "dummy", "CNI_IFNAME": "dummy", "CNI_PATH": "dummy", "CNI_CONTAINERID": ""}
    for version in VERSIONS:
        for variables in (dummies, {}):
            told = launch(node, {"CNI_COMMAND": "VERSION", **variables}, json.dumps({"cniVersion": version}))
            assert (told.returncode, told.stderr) == (0, "")
            assert json.loads(told.stdout)["supportedVersions"] == list(VERSIONS)
    read, write = os.pipe()
    try:
        done = subprocess.run([LAUNCHER], env={"CNI_COMMAND": "VERSION"}, stdin=read, capture_output=True, timeout=10)
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 0


@pytest.mark.parametrize("environment", [{}, {"CNI_COMMAND": ""}, {"CNI_CONTAINERID": "c", "CNI_PATH": "/"}])
def test_called_by_a_person(node: Machine, environment: Mapping[str, str]) -> None:
    """IO6, P04: without CNI_COMMAND it says on stderr what it is and which versions it has, and succeeds."""
    done = launch(node, environment)
    assert (done.returncode, done.stdout) == (0, "")
    assert f"CNI protocol versions supported: {', '.join(VERSIONS)}" in done.stderr


def test_any_environment(it: Container) -> None:
    """IO7: neither a bare environment without PATH and locale, nor one full of a runtime's own variables, matters."""
    config = json.dumps({"cniVersion": NEWEST, "name": "podlane", "type": "podlane"})
    ids = {"CNI_CONTAINERID": it.netns.name, "CNI_NETNS": str(it.netns.path), "CNI_IFNAME": "eth0", "CNI_PATH": "/"}
    full = {
        "TRACEPARENT": "00-1-2-3",
        "BAGGAGE": "a=b",
        "LC_ALL": "tlh_KX",
        "LANG": "",
        "X": "\udcff\udc80",
        "PATH": ":",
    }
    for others in ({}, full, {"Y": "y" * 100_000}):
        assert launch(it.node, {"CNI_COMMAND": "ADD", **ids, **others}, config).returncode == 0
        assert launch(it.node, {"CNI_COMMAND": "DEL", **ids, **others}, config).returncode == 0


@pytest.mark.parametrize("command", REQUIRED)
def test_missing_variables(node: Machine, command: str) -> None:
    """P06 to P11: all variables that a command requires and are absent, or empty, are named together, under code 4."""
    for version in VERSIONS:
        stdin = json.dumps({"cniVersion": version, "name": "podlane", "type": "podlane"})
        for empty in ({}, dict.fromkeys(VARIABLES, "")):
            done = launch(node, {"CNI_COMMAND": command, **empty}, stdin)
            error = json.loads(done.stdout)
            expected = f"required env variables [{','.join(REQUIRED[command])}] missing"
            assert (done.returncode, error["code"], error["msg"]) == (1, 4, expected)
        for name in REQUIRED[command]:
            done = launch(node, {"CNI_COMMAND": command, **VARIABLES, name: ""}, stdin)
            assert json.loads(done.stdout)["msg"] == f"required env variables [{name}] missing"
    assert rows(node) == []


@pytest.mark.parametrize("command", ["GC", "STATUS"])
def test_variables_that_do_not_count(node: Machine, command: str) -> None:
    """1.1: GC and STATUS look at CNI_COMMAND and CNI_PATH only; the others, empty with libcni, may be anything."""
    bad = {"CNI_CONTAINERID": "/", "CNI_IFNAME": "a b", "CNI_ARGS": "x", "CNI_NETNS": "/nowhere"}
    for others in (bad, dict.fromkeys(bad, "")):
        outcome = node.cni(command, env=others)
        assert (outcome.exit_code, outcome.stdout) == (0, "")


@pytest.mark.parametrize("command", ["add", "Add", "LIST", " ADD", "VERSION "])
def test_unknown_command(it: Container, command: str) -> None:
    """1.1: a CNI_COMMAND that is none, also by its case, is code 4, with the word."""
    for version in VERSIONS:
        assert_refused(it.call(command, cniVersion=version), 4, f"unknown CNI_COMMAND: {command}")


@pytest.mark.parametrize("container_id", ["-a", ".a", "_a", "a/b", "a b", "a;b", "a\nb", "ä", "a*"])
def test_bad_container_id(it: Container, container_id: str) -> None:
    """1.1: a container id with other characters than the specification's is code 4, and told in the details."""
    for command in ("ADD", "CHECK", "DEL"):
        outcome = it.call(command, env={"CNI_CONTAINERID": container_id})
        assert_refused(outcome, 4, "invalid characters in containerID")
        assert outcome.json()["details"] == container_id


@pytest.mark.parametrize("ifname", ["a" * 16, "é" * 8, ".", "..", "a/b", "a:b", "a b", "a\tb", "a\nb"])
def test_bad_ifname(it: Container, ifname: str) -> None:
    """1.1: an interface name that the kernel would not take is code 4."""
    for command in ("ADD", "CHECK", "DEL"):
        assert_refused(it.call(command, ifname=ifname), 4, "interface name")


def test_long_names(it: Container) -> None:
    """1.1: neither a container id nor a network's name has a greatest length."""
    for given in ({"env": {"CNI_CONTAINERID": "a" * 255}}, {"name": "n" * 200}):
        outcome = it.call("ADD", ifname="net1", **given)
        it.done("DEL", ifname="net1", **given)
        assert outcome.exit_code == 0, outcome.stdout


def test_longest_ifname(it: Container) -> None:
    """1.1: a name of 15 bytes is the interface's."""
    it.add(ifname="a23456789012345")
    it.netns.run("ip", "link", "show", "a23456789012345")
    it.done("DEL", ifname="a23456789012345")


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({"env": {"CNI_CONTAINERID": "/", "CNI_PATH": ""}, "stdin": "{"}, 4),  # values, before what is missing
        ({"env": {"CNI_PATH": ""}, "stdin": "{"}, 4),  # the environment, before JSON
        ({"command": "FOO", "stdin": "{"}, 6),  # JSON, before the name
        ({"command": "FOO", "stdin": '{"cniVersion": "9.9.9"}'}, 7),  # the name, before the command
        ({"command": "FOO", "stdin": '{"cniVersion": "9.9.9", "name": "a"}'}, 4),  # the command, before the version
        ({"stdin": '{"cniVersion": "9.9.9", "name": "a", "mtu": "x"}'}, 1),  # the version, before other keys
    ],
)
def test_order_of_checks(it: Container, given: dict[str, Any], code: int) -> None:
    """1.1: of several faults that one is told which the reference implementation finds first."""
    command = given.pop("command", "ADD")
    ids: dict[str, Any] = {"container_id": it.netns.name, "netns": str(it.netns.path)}
    assert_refused(it.node.cni(command, **{**ids, **given}), code)


def test_stdin_cannot_be_read(it: Container) -> None:
    """1.2: stdin that cannot be read is code 5."""
    env = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_NETNS": str(it.netns.path), "CNI_IFNAME": "eth0"}
    shell = ["sh", "-c", f"exec {LAUNCHER} <&-"]
    done = launch(it.node, {**env, "CNI_PATH": "/"}, command=["/bin/sh", *shell[1:]])
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 5)


@pytest.mark.parametrize("path", NO_NAMESPACES)
def test_netns_that_is_none(it: Container, path: str) -> None:
    """1.1: for ADD CNI_NETNS must open as a network namespace: else code 8, and nothing is reserved."""
    for version in VERSIONS:
        assert_refused(it.call("ADD", env={"CNI_NETNS": path}, cniVersion=version), 8, version=version)
    assert rows(it.node) == []


@pytest.mark.parametrize("path", NO_NAMESPACES)
def test_netns_that_is_none_at_check(it: Container, path: str) -> None:
    """1.1: for CHECK CNI_NETNS must open as a network namespace: else code 8."""
    result = it.add()
    for version in WITH_CHECK:
        assert_refused(it.call("CHECK", env={"CNI_NETNS": path}, cniVersion=version, prevResult=result), 8)
    it.done("CHECK", prevResult=result)


@pytest.mark.parametrize("command", ["ADD", "DEL"])
def test_own_netns(it: Container, command: str) -> None:
    """P26: the plugin's own namespace is code 8, before anything is done, unless CNI_NETNS_OVERRIDE is 1 or true."""
    own = {"CNI_NETNS": str(it.node.netns.path)}
    for version in VERSIONS:
        outcome = it.call(command, env=own, cniVersion=version)
        assert_refused(outcome, 8, "plugin's netns and netns from CNI_NETNS should not be the same", version=version)
    for value in ("", "0", "yes"):
        assert_refused(it.call(command, env={**own, "CNI_NETNS_OVERRIDE": value}), 8)
    assert rows(it.node) == []
    for value in ("1", "true", "True", "TRUE"):
        assert it.call(command, env={**own, "CNI_NETNS_OVERRIDE": value}, ifname="ovr0").exit_code == 0
        it.done("DEL", env={**own, "CNI_NETNS_OVERRIDE": value}, ifname="ovr0")


def test_own_netns_at_check(it: Container) -> None:
    """P26: CHECK does not refuse the plugin's own namespace; it says that it is not the container's."""
    result = it.add()
    assert_refused(it.call("CHECK", env={"CNI_NETNS": str(it.node.netns.path)}, prevResult=result), 103)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("foo", 'ARGS: invalid pair "foo"'),
        ("IP=10.244.0.9;", 'ARGS: invalid pair ""'),
        ("IgnoreUnknown=1;A=b=c", 'ARGS: invalid pair "A=b=c"'),
        ("A=b;IP=10.244.0.9", 'ARGS: unknown args ["A=b"]'),
        ("ip=10.244.0.9", 'ARGS: unknown args ["ip=10.244.0.9"]'),
        ("A=b;IgnoreUnknown=0", 'ARGS: unknown args ["A=b"]'),
        ("A=b;ignoreunknown=1", "ARGS: unknown args"),
    ],
)
def test_bad_cni_args(it: Container, arguments: str, message: str) -> None:
    """P24: CNI_ARGS that the reference plugins refuse are code 4 in their words, at ADD and CHECK; DEL needs none."""
    result = it.add()
    for command, versions in (("ADD", VERSIONS), ("CHECK", WITH_CHECK)):
        for version in versions:
            given = {"cniVersion": version, "prevResult": result}
            assert_refused(it.call(command, env={"CNI_ARGS": arguments}, **given), 4, message, version=version)
    it.done("DEL", env={"CNI_ARGS": arguments})
    assert rows(it.node) == []


def test_good_cni_args(it: Container) -> None:
    """P24: unknown keys are allowed by IgnoreUnknown, any case of true; of a key that comes twice the last counts."""
    for ignore in ("1", "true", "TRUE"):
        arguments = (
            f"A=b;IP=10.244.0.8;MAC=02:00:00:00:00:08;IgnoreUnknown={ignore};IP=10.244.0.9;MAC=02:00:00:00:00:09"
        )
        result = it.add(env={"CNI_ARGS": arguments})
        assert result["ips"][0]["address"] == "10.244.0.9/32"
        assert result["interfaces"][1]["mac"] == "02:00:00:00:00:09"
        it.done("DEL", env={"CNI_ARGS": arguments})


def test_args_count_more_than_cni_args(it: Container) -> None:
    """1.1: of args.cni and CNI_ARGS args.cni counts."""
    args = {"cni": {"ips": ["10.244.0.19"], "mac": "02:00:00:00:00:19"}}
    result = it.add(env={"CNI_ARGS": "IP=10.244.0.18;MAC=02:00:00:00:00:18"}, args=args)
    assert (result["ips"][0]["address"], result["interfaces"][1]["mac"]) == ("10.244.0.19/32", "02:00:00:00:00:19")


@pytest.mark.parametrize("name", ["", None, "-a", "a/b", "a b", "ä", "../a", ".hidden"])
def test_bad_network_name(it: Container, name: object) -> None:
    """P16: a network without a name, or with characters that no container id may have, is code 7 at any command."""
    for command in REQUIRED:
        for version in VERSIONS if command in ("ADD", "DEL") else [NEWEST]:
            assert_refused(it.call(command, name=name, cniVersion=version), 7, "network name", version=version)


@pytest.mark.parametrize("kind", ["../host-local", "/bin/sh", "a/b"])
def test_ipam_type_is_no_path(it: Container, kind: str) -> None:
    """1.1: an IPAM type with a path separator is code 7, and executed by no command."""
    result = it.add()
    it.done("DEL")
    for command in ("ADD", "CHECK", "STATUS", "GC"):
        outcome = it.call(command, ipam={"type": kind}, prevResult=result)
        assert_refused(outcome, 7, kind)
    assert rows(it.node) == []


def test_first_regular_file_of_path(it: Container) -> None:
    """1.1: a delegate is the first regular file of its name on CNI_PATH, of all that are there, in order."""
    places = [it.node.directory / name for name in ("p1", "p2", "p3")]
    for place in places:
        place.mkdir()
    (places[0] / "where").mkdir()  # no regular file
    for place in places[1:]:
        result = {"cniVersion": "1.0.0", "ips": [{"address": "10.66.0.2/24"}], "dns": {"domain": place.name}}
        (place / "where").write_text(
            f"#!/bin/sh\ncat >/dev/null\n[ $CNI_COMMAND = ADD ] && echo '{json.dumps(result)}'\n:"
        )
        (place / "where").chmod(0o755)
    given: dict[str, Any] = {"ipam": {"type": "where"}, "env": {"CNI_PATH": ":".join(map(str, ["/nowhere", *places]))}}
    assert it.add(**given)["dns"] == {"domain": "p2"}
    it.done("DEL", **given)


@pytest.mark.parametrize("version", VERSIONS)
def test_case_of_keys(it: Container, version: str) -> None:
    """P23: keys match whatever their case."""
    stdin = json.dumps({"CNIVERSION": version, "Name": "podlane", "TYPE": "podlane", "Mtu": 1300, "RUNTIMECONFIG": {}})
    ids: dict[str, Any] = {"container_id": it.netns.name, "netns": str(it.netns.path), "stdin": stdin}
    outcome = it.node.cni("ADD", **ids)
    assert (outcome.exit_code, outcome.json()["cniVersion"]) == (0, version)
    assert " mtu 1300 " in it.netns.run("ip", "link", "show", "eth0").stdout


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_that_nobody_knows(it: Container, version: str) -> None:
    """P22: unknown keys, the capabilities that libcni leaves in and the list's own keys are ignored; null is absent."""
    unknown = {"capabilities": {"portMappings": True}, "disableCheck": True, "plugins": [], "x-y": {"z": 1}}
    absent = dict.fromkeys(("ipam", "prevResult", "dns", "args", "runtimeConfig", "mtu", "ipMasq", "isGateway"))
    given = {"cniVersion": version, **unknown, **absent}
    assert it.add(**given)["cniVersion"] == version
    it.done("DEL", **given)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("isGateway", "true"),
        ("mtu", "1400"),
        ("ipMasq", 1),
        ("ipam", []),
        ("args", "x"),
        ("runtimeConfig", {"ips": "10.0.0.1"}),
        ("dns", {"nameservers": "10.0.0.1"}),
        ("portIsolation", "true"),
    ],
)
def test_wrong_types(it: Container, key: str, value: Any) -> None:  # noqa: ANN401
    """B51: a value of the wrong JSON type is refused at ADD, code 7, with the key; nothing is reserved."""
    for version in VERSIONS:
        assert_refused(it.call("ADD", cniVersion=version, **{key: value}), 7, key, version=version)
    assert rows(it.node) == []

"""The CNI commands as a runtime sees them: what they answer, in each version's form, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from agent.wiring import HOST_MAC
from cni import wire
from tests.node.machine import Machine, Netns, Outcome, machine

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node that all tests of this module share: each leaves it as it found it."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture
def netns() -> Iterator[Netns]:
    """Make a network namespace for a container."""
    it = Netns("verbs")
    yield it
    it.delete()


def traces(node: Machine) -> dict[str, list[str]]:
    """Return what pods have on the node from ADD on; links may come a little later."""
    return {kind: lines for kind, lines in node.traces().items() if kind != "links"}


def add(node: Machine, netns: Netns, **config: object) -> Outcome:
    """ADD a namespace, under its own name."""
    return node.cni("ADD", container_id=netns.name, netns=str(netns.path), config=config)


def delete(node: Machine, netns: Netns, **config: object) -> None:
    """DEL it; there is nothing to print."""
    done = node.cni("DEL", container_id=netns.name, netns=str(netns.path), config=config)
    assert (done.exit_code, done.stdout) == (0, "")


def assert_refused(outcome: Outcome, code: int, *words: str) -> None:
    """Assert that the call failed with this code, and an error object that says all of these words."""
    error = outcome.json()
    assert outcome.exit_code == 1
    assert error["code"] == code, error
    assert error.keys() <= {"cniVersion", "code", "msg", "details"}
    text = error["msg"] + " " + error.get("details", "")
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize("version", VERSIONS)
def test_add_and_delete(node: Machine, netns: Netns, version: str) -> None:
    """ADD answers in the exact form of each version, with what the kernel has; DEL takes all of it away."""
    before = traces(node)
    outcome = add(node, netns, cniVersion=version)
    assert outcome.exit_code == 0, outcome.stdout
    result = outcome.json()
    assert result == expected_result(version, netns, result)
    assert node.netns.run("ip", "-br", "link", "show", result["interfaces"][0]["name"]).stdout.split()[2] == HOST_MAC
    delete(node, netns, cniVersion=version)
    assert traces(node) == before
    assert node.traces()["links"] == []


def expected_result(version: str, netns: Netns, result: Mapping[str, list[dict[str, str]]]) -> dict[str, object]:
    """Return the result of a version, by specification and kernel; only the host end's name is taken from ours."""
    (eth0,) = json.loads(netns.run("ip", "-j", "address", "show", "eth0").stdout)
    addresses = {each["family"]: each["local"] for each in eth0["addr_info"] if each["scope"] == "global"}
    mtu = {"mtu": 1500} if version == "1.1.0" else {}
    old = version < "1.0.0"
    body: dict[str, object] = {
        "cniVersion": version,
        "interfaces": [
            {"name": result["interfaces"][0]["name"], "mac": HOST_MAC, **mtu},
            {"name": "eth0", "mac": eth0["address"], "sandbox": str(netns.path), **mtu},
        ],
        "ips": [
            {"interface": 1, "address": f"{addresses['inet']}/32", "gateway": "169.254.1.1"}
            | ({"version": "4"} if old else {}),
            {"interface": 1, "address": f"{addresses['inet6']}/128", "gateway": "fe80::1"}
            | ({"version": "6"} if old else {}),
        ],
        "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
    }
    return body | ({"dns": {}} if old else {})


def test_version(node: Machine) -> None:
    """VERSION lists the versions, and needs nothing else."""
    outcome = node.cni("VERSION", ifname="", env={"CNI_PATH": ""})
    assert outcome.exit_code == 0
    assert outcome.json()["supportedVersions"] == list(VERSIONS)


@pytest.mark.parametrize("version", VERSIONS)
def test_status(node: Machine, version: str) -> None:
    """STATUS succeeds without a word on a ready node; configurations before 1.1.0 do not have it."""
    outcome = node.cni("STATUS", ifname="", config={"cniVersion": version})
    if version == "1.1.0":
        assert (outcome.exit_code, outcome.stdout) == (0, "")
    else:
        assert_refused(outcome, 1, "does not allow STATUS")


def test_second_add_is_refused(node: Machine, netns: Netns) -> None:
    """A second ADD of a container's interface fails with code 100, and the first one does not notice."""
    first = add(node, netns).json()
    before = traces(node), netns.run("ip", "address").stdout
    assert_refused(add(node, netns), 100, netns.name)
    assert (traces(node), netns.run("ip", "address").stdout) == before
    for each in first["ips"]:
        node.netns.run("ping", "-c", "1", "-W", "2", each["address"].partition("/")[0])
    delete(node, netns)


def test_second_interface(node: Machine, netns: Netns) -> None:
    """The same container may have another interface; each is deleted by itself."""
    before = traces(node)
    add(node, netns)
    with_one = traces(node)
    outcome = node.cni("ADD", container_id=netns.name, netns=str(netns.path), ifname="net1")
    assert outcome.exit_code == 0, outcome.stdout
    node.cni("DEL", container_id=netns.name, netns=str(netns.path), ifname="net1")
    assert traces(node) == with_one
    delete(node, netns)
    assert traces(node) == before


def test_interface_exists_already(node: Machine, netns: Netns) -> None:
    """ADD fails if the name is taken in the namespace: what is there stays, nothing else does, the address is free."""
    netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    before = traces(node), netns.run("ip", "-o", "link").stdout
    outcome = add(node, netns)
    assert_refused(outcome, 102, "eth0", "already")
    assert (traces(node), netns.run("ip", "-o", "link").stdout) == before


def test_delete_is_idempotent(node: Machine, netns: Netns) -> None:
    """DEL succeeds again and again, also for a container that never was."""
    before = traces(node)
    delete(node, netns)
    add(node, netns)
    for _ in range(3):
        delete(node, netns)
    assert traces(node) == before


@pytest.mark.parametrize("path", ["", "/run/netns/plt-there-is-no-such"])
def test_delete_without_namespace(node: Machine, netns: Netns, path: str) -> None:
    """DEL needs no namespace: with CNI_NETNS empty or dangling it still takes everything away."""
    before = traces(node)
    add(node, netns)
    netns.delete()
    outcome = node.cni("DEL", container_id=netns.name, netns=path)
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert traces(node) == before


def test_no_network_namespace(node: Machine, tmp_path: Path) -> None:
    """A path that is nothing, a file, a FIFO, another kind of namespace or the node's own is refused with code 8."""
    before = traces(node)
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    file.touch()
    os.mkfifo(fifo)
    own = str(node.netns.path)
    for path in (str(tmp_path / "nothing"), str(file), str(fifo), str(tmp_path), "/proc/self/ns/uts", own):
        outcome = node.cni("ADD", container_id="nowhere", netns=path)
        assert_refused(outcome, 8, "same" if path == own else path)
    assert traces(node) == before


def test_missing_variables_are_reported_together(node: Machine) -> None:
    """All variables that a command lacks are named at once, with code 4."""
    outcome = node.cni("ADD", ifname="", env={"CNI_PATH": ""})
    assert_refused(outcome, 4, "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing")
    outcome = node.cni("DEL", ifname="")
    assert_refused(outcome, 4, "required env variables [CNI_CONTAINERID,CNI_IFNAME] missing")


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"CNI_COMMAND": "add"}, "add"),
        ({"CNI_COMMAND": "CHECK"}, "CHECK"),
        ({"CNI_CONTAINERID": "a/b"}, "a/b"),
        ({"CNI_CONTAINERID": "-a"}, "-a"),
        ({"CNI_IFNAME": "sixteen-letters-"}, "16 bytes"),
        ({"CNI_IFNAME": ".."}, ".."),
        ({"CNI_IFNAME": "a/b"}, "/"),
        ({"CNI_IFNAME": "a b"}, "white space"),
    ],
)
def test_bad_variables(node: Machine, netns: Netns, variables: Mapping[str, str], word: str) -> None:
    """A variable with a bad value is refused with code 4 and named."""
    outcome = node.cni("ADD", container_id="c", netns=str(netns.path), env=variables)
    assert_refused(outcome, 4, word)


@pytest.mark.parametrize("stdin", ["", "{", "[]", "1", "null", '{"name": "x"} y', "[" * 100000])
def test_bad_json(node: Machine, netns: Netns, stdin: str) -> None:
    """What is not one JSON object is refused with code 6."""
    assert_refused(node.cni("ADD", container_id="c", netns=str(netns.path), stdin=stdin), 6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a/b"),
        ("name", 5),
        ("name", None),
        ("mtu", "1400"),
        ("mtu", True),
        ("mtu", 1400.5),
        ("mtu", -1),
        ("mtu", 65536),
        ("ipam", "host-local"),
        ("cniVersion", 1),
    ],
)
def test_bad_field(node: Machine, netns: Netns, field: str, value: object) -> None:
    """A field with a bad value is refused with code 7, and the message has both."""
    outcome = node.cni("ADD", container_id="c", netns=str(netns.path), config={field: value})
    assert_refused(outcome, 7, field, repr(value))


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "1.2.0", "9.9.9", "", "1.1"])
def test_unsupported_version(node: Machine, netns: Netns, version: str) -> None:
    """A version that podlane does not have is refused with code 1, with what it was and what there is."""
    outcome = node.cni("ADD", container_id="c", netns=str(netns.path), config={"cniVersion": version})
    assert_refused(outcome, 1, f'"{version}"', *VERSIONS)


@pytest.mark.parametrize(("field", "value"), [("ipam", {"type": "host-local"}), ("prevResult", {"ips": []})])
def test_unsupported_field(node: Machine, netns: Netns, field: str, value: object) -> None:
    """What ADD does not serve it refuses by name with code 2, and leaves nothing; DEL does not mind it."""
    before = traces(node)
    assert_refused(add(node, netns, **{field: value}), 2, field)
    assert traces(node) == before
    add(node, netns)
    delete(node, netns, **{field: value})
    assert traces(node) == before


def test_harmless_fields(node: Machine, netns: Netns) -> None:
    """Fields that podlane does not know, and empty ones, are no obstacle."""
    unknown = {"type": "podlane", "capabilities": {"mac": True}, "runtimeConfig": {"mac": "x"}, "bridge": "cni0"}
    assert add(node, netns, ipam={}, prevResult=None, dns={}, **unknown).exit_code == 0
    delete(node, netns)


@pytest.mark.parametrize(
    ("configured", "uplink", "expected"), [(1280, 1500, 1280), (9000, 1500, 9000), (0, 1400, 1400)]
)
def test_mtu(node: Machine, netns: Netns, configured: int, uplink: int, expected: int) -> None:
    """The MTU is the configured one, else the uplink's: in the result, and at both ends."""
    node.netns.run("ip", "link", "set", "uplink", "mtu", str(uplink))
    result = add(node, netns, mtu=configured).json()
    node.netns.run("ip", "link", "set", "uplink", "mtu", "1500")
    assert [each["mtu"] for each in result["interfaces"]] == [expected, expected]
    assert f" mtu {expected} " in netns.run("ip", "link", "show", "eth0").stdout
    assert f" mtu {expected} " in node.netns.run("ip", "link", "show", result["interfaces"][0]["name"]).stdout
    delete(node, netns)


def test_only_root_is_served(node: Machine, netns: Netns) -> None:
    """Another user who can open the socket is hung up on, and what he asks for is not done."""
    add(node, netns)
    before, calls = traces(node), operations(node)
    variables = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": netns.name, "CNI_IFNAME": "eth0", "CNI_PATH": "/"}
    request = wire.encode(wire.Request(variables, b'{"cniVersion": "1.1.0", "name": "podlane"}'))
    node.directory.chmod(0o711)
    (node.directory / "cni.sock").chmod(0o666)
    assert ask(node.directory, request, user=65534) == b""
    assert "refused caller uid=65534" in node.log_tail()
    assert (traces(node), operations(node)) == (before, calls)
    assert ask(node.directory, request, user=0) == bytes(8)  # the very same is served to root: status 0, no output
    assert traces(node)["rows"] == []


def ask(directory: Path, request: bytes, user: int) -> bytes:
    """Send a request as a user, and return the answer; a socket's credentials are those of its process."""
    program = """if True:
        import socket, sys
        with socket.socket(socket.AF_UNIX) as agent:
            agent.connect("cni.sock")
            try:
                agent.sendall(sys.stdin.buffer.read())
                agent.shutdown(socket.SHUT_WR)
                while answer := agent.recv(4096):
                    sys.stdout.buffer.write(answer)
            except (BrokenPipeError, ConnectionResetError):
                pass  # hung up on, before or after it had sent all
    """
    command = ["/usr/bin/python3", "-I", "-S", "-c", program]
    done = subprocess.run(
        command,
        input=request,
        stdout=subprocess.PIPE,
        check=True,
        cwd=directory,
        user=user,
        group=user,
        extra_groups=(),
    )
    return done.stdout


def operations(node: Machine) -> dict[tuple[str, ...], float]:
    """Return the CNI calls counted so far, by command and result."""
    return {key[1]: value for key, value in node.metrics().items() if key[0] == "podlane_cni_operations_total"}

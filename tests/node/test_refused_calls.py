"""Calls that are refused: by what they ask, by how they ask it, and by who does."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cni import wire
from tests.node.machine import Machine, Netns, machine
from tests.node.verbs import VERSIONS, add, assert_refused, delete, traces

PORT = {"hostPort": 8080, "containerPort": 80, "protocol": "dccp"}


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


def test_own_namespace(node: Machine) -> None:
    """The node's own namespace is refused by ADD and DEL with code 8, unless CNI_NETNS_OVERRIDE allows it."""
    before = traces(node)
    own, message = str(node.netns.path), "plugin's netns and netns from CNI_NETNS should not be the same"
    for command in ("ADD", "DEL"):
        assert_refused(node.cni(command, container_id="own", netns=own, ifname="pod0"), 8, message)
    assert traces(node) == before
    override = {"CNI_NETNS_OVERRIDE": "True"}
    for command in ("ADD", "DEL"):
        done = node.cni(command, container_id="own", netns=own, ifname="pod0", env=override)
        assert done.exit_code == 0, done.stdout
    assert traces(node) == before
    assert "pod0" not in node.netns.run("ip", "-o", "link").stdout


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
    for command in ("ADD", "CHECK"):
        outcome = node.cni(command, ifname="", env={"CNI_PATH": ""})
        assert_refused(outcome, 4, "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing")
    outcome = node.cni("DEL", ifname="")
    assert_refused(outcome, 4, "required env variables [CNI_CONTAINERID,CNI_IFNAME] missing")


@pytest.mark.parametrize(
    ("variables", "word"),
    [
        ({"CNI_COMMAND": "add"}, "add"),
        ({"CNI_CONTAINERID": "a/b"}, "a/b"),
        ({"CNI_CONTAINERID": "-a"}, "-a"),
        ({"CNI_IFNAME": "sixteen-letters-"}, "16 bytes"),
        ({"CNI_IFNAME": ".."}, ".."),
        ({"CNI_IFNAME": "a/b"}, "/"),
        ({"CNI_IFNAME": "a b"}, "whitespace"),
        ({"CNI_ARGS": "MAC"}, "MAC"),
        ({"CNI_ARGS": "A=1"}, "unknown args"),
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
        ("mtu", "1400"),
        ("mtu", True),
        ("mtu", 1400.5),
        ("mtu", -1),
        ("mtu", 65536),
        ("ipam", "host-local"),
        ("isDefaultGateway", "true"),
    ],
)
def test_bad_field(node: Machine, netns: Netns, field: str, value: object) -> None:
    """A field with a bad value is refused with code 7, and the message has both."""
    outcome = node.cni("ADD", container_id="c", netns=str(netns.path), config={field: value})
    assert_refused(outcome, 7, field, repr(value))


@pytest.mark.parametrize("name", ["", "a/b", None])
def test_bad_name(node: Machine, netns: Netns, name: object) -> None:
    """A network needs a name, of the characters that a container id may have; else code 7."""
    config = {"name": name}
    assert_refused(node.cni("ADD", container_id="c", netns=str(netns.path), config=config), 7, "network name")


@pytest.mark.parametrize("version", ["1.2.0", "9.9.9", "1.1", "0.3"])
def test_unsupported_version(node: Machine, netns: Netns, version: str) -> None:
    """A version that podlane does not have is refused with code 1, with what it was and what there is."""
    outcome = node.cni("ADD", container_id="c", netns=str(netns.path), config={"cniVersion": version})
    assert_refused(outcome, 1, f'"{version}"', *VERSIONS)


@pytest.mark.parametrize(("field", "value"), [("vlan", 7), ("runtimeConfig", {"portMappings": [PORT]})])
def test_unsupported_field(node: Machine, netns: Netns, field: str, value: object) -> None:
    """What ADD does not serve it refuses by name with code 2, and leaves nothing; DEL does not mind it."""
    before = traces(node)
    assert_refused(add(node, netns, **{field: value}), 2, field)
    assert traces(node) == before
    add(node, netns)
    delete(node, netns, **{field: value})
    assert traces(node) == before


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

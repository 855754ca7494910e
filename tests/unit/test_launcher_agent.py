"""The launcher with its agent: requests, replies and deadlines, over a real socket."""

import fcntl
import os
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from cni import wire
from tests.unit.launchers import (
    NOT_AVAILABLE,
    PLACES,
    REPLY,
    TRY_AGAIN_LATER,
    Behaviour,
    Host,
    Place,
    answering,
    assert_spooled,
    error,
    listening,
    needs_strace,
    silent,
    wait_for_hangup,
)


@pytest.mark.parametrize("away", PLACES)
@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("ADD", TRY_AGAIN_LATER),
        ("CHECK", TRY_AGAIN_LATER),
        ("GC", TRY_AGAIN_LATER),
        ("STATUS", NOT_AVAILABLE),
        ("add", TRY_AGAIN_LATER),
    ],
)
def test_agent_away(host: Host, command: str, code: int, away: Place) -> None:
    """Without an agent every command but DEL fails with its code, and says where the agent should be."""
    path = away(host.socket)
    document = error(host.call(command, PODLANE_SOCKET=path))
    assert document["code"] == code
    assert command in document["msg"]
    assert path[:100] in document["msg"]
    assert "agent" in document["details"]
    assert host.spooled() == []


@pytest.mark.parametrize("exit_code", [0, 1, 7, 255])
@pytest.mark.parametrize("stdout", [b"", b"{}\n", bytes(range(256)) * 4096, bytes(wire.STDOUT_LIMIT)])
def test_reply_is_passed_on(host: Host, exit_code: int, stdout: bytes) -> None:
    """Output and exit code are those of the agent, byte by byte, up to the limit."""

    def behave(connection: socket.socket) -> None:
        wire.receive(connection, 30)
        wire.reply(connection, wire.Reply(exit_code, stdout))

    with listening(host.socket, behave):
        result = host.call("DEL" if exit_code else "ADD")
    assert (result.returncode, result.stderr) == (exit_code, b"")
    assert result.stdout == stdout
    assert host.spooled() == []


@pytest.mark.parametrize("command", ["ADD", "CHECK", "DEL", "GC", "STATUS", "add"])
def test_every_command_goes_to_the_agent(host: Host, command: str) -> None:
    """The agent gets each command as it is written; empty output and success stay what they are."""
    commands = []

    def behave(connection: socket.socket) -> None:
        commands.append(wire.receive(connection, 30).env["CNI_COMMAND"])
        wire.reply(connection, wire.Reply(0, b""))

    with listening(host.socket, behave):
        result = host.call(command)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert commands == [command]


def test_output_that_cannot_be_written_is_a_failure(host: Host) -> None:
    """A result that the runtime cannot have got is not reported as a success."""
    with listening(host.socket, answering(REPLY)), Path("/dev/full").open("wb") as full:
        for command in ("ADD", "VERSION"):
            result = host.run([host.binary], host.environment(command), input=b"{}", stdout=full)
            assert result.returncode == 1


def test_slow_reader_gets_everything(host: Host) -> None:
    """All of the output arrives through a pipe that takes little at a time and never blocks."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with listening(host.socket, answering(struct.pack("=II", 0, 1 << 20) + bytes(1 << 20))):
        process = subprocess.Popen([host.binary], env=host.environment("ADD"), stdin=subprocess.DEVNULL, stdout=writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as output:
            assert output.read() == bytes(1 << 20)
        assert process.wait(30) == 0


def test_request_arrives_whole(host: Host) -> None:
    """The agent receives the environment, stdin up to the limit, and the very network namespace."""
    stdin = b"0123456789abcdef" * (wire.STDIN_LIMIT // 16)
    netns = Path("/proc/self/ns/net")
    requests = []

    def behave(connection: socket.socket) -> None:
        request = wire.receive(connection, 30)
        assert request.netns is not None
        with os.fdopen(request.netns, "rb") as came, netns.open("rb") as expected:
            requests.append((request, os.path.sameopenfile(came.fileno(), expected.fileno())))
        connection.sendall(REPLY)

    with listening(host.socket, behave):
        result = host.call("ADD", stdin, CNI_NETNS=str(netns), CNI_ARGS="A=b;C=d", ODD=b"\xff")
    assert (result.returncode, result.stdout) == (0, REPLY[8:])
    ((request, same_netns),) = requests
    assert request.stdin == stdin
    assert request.netns_errno == 0
    environment = host.environment("ADD", CNI_NETNS=str(netns), CNI_ARGS="A=b;C=d", ODD=b"\xff")
    assert request.env == {key: os.fsdecode(value) for key, value in environment.items()}
    assert same_netns


def test_netns_that_does_not_open(host: Host) -> None:
    """A network namespace that does not open is an errno for the agent, and a FIFO holds up nobody."""
    os.mkfifo(host.directory / "fifo")
    received: list[tuple[bool, int]] = []

    def behave(connection: socket.socket) -> None:
        request = wire.receive(connection, 30)
        received.append((request.netns is not None, request.netns_errno))
        if request.netns is not None:
            os.close(request.netns)
        connection.sendall(REPLY)

    with listening(host.socket, behave):
        for path in ("", "/gone/netns", f"{host.binary}/x", str(host.directory / "fifo")):
            assert host.call("ADD", CNI_NETNS=path).returncode == 0
    assert received == [(False, 0), (False, 2), (False, 20), (True, 0)]


@pytest.mark.parametrize(("command", "code"), [("ADD", TRY_AGAIN_LATER), ("STATUS", NOT_AVAILABLE), ("DEL", None)])
def test_incomplete_replies(host: Host, command: str, code: int | None) -> None:
    """A reply that ends early, at whichever byte, or breaks its own rules, is never passed on."""
    cut = [REPLY[:size] for size in range(len(REPLY))]
    surplus = REPLY + b"x"
    impossible_code = struct.pack("=II", 256, 0)
    impossible_size = struct.pack("=II", 0, wire.STDOUT_LIMIT + 1) + bytes(wire.STDOUT_LIMIT + 1)
    for reply in (*cut, surplus, impossible_code, impossible_size):
        malformed = reply not in cut
        with listening(host.socket, answering(reply)):
            result = host.call(command)
        if code is None:
            assert_spooled(host, result)
        else:
            assert error(result)["code"] == code
            assert ("malformed" in error(result)["msg"]) == malformed


def test_reply_before_the_whole_request(host: Host) -> None:
    """An agent that answers and hangs up without reading everything is heard all the same."""

    def behave(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(REPLY)

    with listening(host.socket, behave):
        result = host.call("ADD", bytes(4 << 20))
    assert (result.returncode, result.stdout) == (0, REPLY[8:])


def unread(connection: socket.socket) -> None:
    """Read nothing of the request."""
    wait_for_hangup(connection)


def stuck(connection: socket.socket) -> None:
    """Begin an answer, and never end it."""
    wire.receive(connection, 30)
    connection.sendall(REPLY[:-1])
    wait_for_hangup(connection)


@pytest.mark.parametrize("behave", [silent, unread, stuck])
def test_deadline(host: Host, behave: Behaviour) -> None:
    """An agent that hangs, at whichever point, is given up at the deadline."""
    with listening(host.socket, behave):
        for command, code in (("ADD", TRY_AGAIN_LATER), ("STATUS", NOT_AVAILABLE)):
            document = error(host.call(command, bytes(4 << 20), PODLANE_TIMEOUT_MS="100"))
            assert document["code"] == code
            assert "the deadline passed" in document["msg"]
        assert_spooled(host, host.call("DEL", bytes(4 << 20), PODLANE_TIMEOUT_MS="100"))


def test_deadline_with_a_full_backlog(host: Host) -> None:
    """An agent that accepts nobody any more is given up at the deadline as well."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(host.socket))
        listener.listen(0)
        first.connect(str(host.socket))
        document = error(host.call("ADD", PODLANE_TIMEOUT_MS="100"))
        assert document["code"] == TRY_AGAIN_LATER
        assert "the deadline passed" in document["msg"]
        assert_spooled(host, host.call("DEL", PODLANE_TIMEOUT_MS="100"))


@needs_strace
@pytest.mark.parametrize("call", ["poll", "read", "connect", "sendmsg", "write"])
def test_interrupted_calls_are_repeated(host: Host, call: str) -> None:
    """A signal that interrupts any system call changes nothing."""
    with listening(host.socket, answering(REPLY)):
        result, trace = host.trace(["-e", f"inject={call}:error=EINTR:when=1"], "ADD")
    assert any(line.startswith(f"{call}(") and "EINTR" in line for line in trace)
    assert (result.returncode, result.stdout) == (0, REPLY[8:])

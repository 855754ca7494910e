"""The launcher, as the container runtime sees it: the real executable against a real socket."""

import fcntl
import json
import os
import re
import resource
import select
import shutil
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni import wire

ROOT = Path(__file__).parents[2]
ATTACHMENT = {"CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}
REPLY = struct.pack("=II", 0, 12) + b'{"ips":"x"}\n'
# Codes of the specification (SPEC.md, section Error).
INVALID_ENVIRONMENT, IO_FAILURE, TRY_AGAIN_LATER, NOT_AVAILABLE = 4, 5, 11, 50

Result = subprocess.CompletedProcess[bytes]
Behaviour = Callable[[socket.socket], object]
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the launcher as the Makefile does, but elsewhere."""
    path = tmp_path_factory.mktemp("launcher") / "podlane"
    subprocess.run(["make", "--silent", path, f"LAUNCHER={path}"], cwd=ROOT, check=True)
    return path


@dataclass(frozen=True)
class Host:
    """A launcher with its own socket and spool directory."""

    binary: Path
    directory: Path

    @property
    def socket(self) -> Path:
        """Where the agent would listen."""
        return self.directory / "cni.sock"

    @property
    def spool(self) -> Path:
        """Where a DEL waits; neither it nor its parent exists at first."""
        return self.directory / "state" / "spool"

    def environment(self, command: str | bytes, **variables: str | bytes) -> dict[str, str | bytes]:
        """Return what the container runtime would set."""
        paths = {"PODLANE_SOCKET": str(self.socket), "PODLANE_SPOOL": str(self.spool)}
        return {"CNI_COMMAND": command, **ATTACHMENT, **paths, **variables}

    def call(self, command: str | bytes, stdin: bytes = b"{}", **variables: str | bytes) -> Result:
        """Run the launcher to its end."""
        return self.run([self.binary], self.environment(command, **variables), input=stdin)

    def trace(self, options: list[str], command: str, **variables: str) -> tuple[Result, list[str]]:
        """Run the launcher under strace; return the lines of the trace too."""
        trace = self.directory / "trace"
        strace = ["strace", "-o", trace, *options, self.binary]
        result = self.run(strace, self.environment(command, **variables), input=b"{}")
        return result, trace.read_text().splitlines()

    def run(
        self,
        arguments: list[Any],
        environment: dict[str, str | bytes],
        **options: Any,  # noqa: ANN401
    ) -> Result:
        """Run a program with exactly this environment."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
        executable = shutil.which(arguments[0])
        return subprocess.run(
            arguments, executable=executable, env=environment, cwd=self.directory, check=False, **options
        )

    def spooled(self) -> list[Path]:
        """Return all that is in the spool directory."""
        return sorted(self.spool.iterdir()) if self.spool.exists() else []


@pytest.fixture
def host(binary: Path, tmp_path: Path) -> Host:
    """Give a launcher whose agent is away."""
    return Host(binary, tmp_path)


@contextmanager
def listening(path: Path, behave: Behaviour) -> Iterator[None]:
    """Listen at path, and treat every connection so in one thread."""

    def serve() -> None:
        with suppress(OSError):  # shutdown() ends accept()
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError, wire.WireError):
                    connection.settimeout(30)
                    behave(connection)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            path.unlink()


def answering(reply: bytes) -> Behaviour:
    """Return an agent that reads the request and answers with exactly these bytes."""

    def behave(connection: socket.socket) -> None:
        request = wire.receive(connection)
        if request.netns is not None:
            os.close(request.netns)
        connection.sendall(reply)

    return behave


def silent(connection: socket.socket) -> None:
    """Take the whole request, and answer only by outliving the launcher."""
    wire.receive(connection)
    wait_for_hangup(connection)


def wait_for_hangup(connection: socket.socket) -> None:
    """Wait until the launcher is gone, not only done with sending."""
    poll = select.poll()
    poll.register(connection, 0)
    poll.poll(30_000)


def error(result: Result) -> dict[str, Any]:
    """Return the one CNI error object that a failed launcher printed."""
    assert result.returncode == 1
    document = json.loads(result.stdout.decode())
    assert set(document) == {"cniVersion", "code", "msg", "details"}
    assert document["cniVersion"] == "1.1.0"
    text = (document["msg"] + document["details"]).lower()
    assert "not found" not in text
    assert "no such file or directory" not in text
    return dict(document)


def spooled_request(host: Host) -> wire.Request:
    """Return the request in the only file of the spool directory."""
    (path,) = host.spooled()
    assert re.fullmatch(r"\d{20}-\d+\.del", path.name)
    return wire.decode(path.read_bytes())


def assert_spooled(host: Host, result: Result) -> None:
    """Check that a DEL has succeeded by being spooled, and empty the spool."""
    assert (result.returncode, result.stdout) == (0, b"")
    assert result.stderr.count(b"\n") == 1
    assert spooled_request(host).env["CNI_COMMAND"] == "DEL"
    host.spooled()[0].unlink()


def test_executable_is_small_and_static(binary: Path) -> None:
    """The executable is below 100 KB and needs no interpreter, so that it runs on any host."""
    image = binary.read_bytes()
    assert len(image) < 100_000
    offset, size, count = (*struct.unpack_from("=Q", image, 32), *struct.unpack_from("=HH", image, 54))
    types = {struct.unpack_from("=I", image, offset + i * size)[0] for i in range(count)}
    assert 1 in types  # PT_LOAD: the headers were read right
    assert not types & {2, 3}  # PT_DYNAMIC, PT_INTERP


@pytest.mark.parametrize("environment", [{}, {"CNI_COMMAND": ""}])
def test_without_command_it_introduces_itself(host: Host, environment: dict[str, str | bytes]) -> None:
    """Called by a person it says what it is and which versions it speaks, on stderr, and succeeds."""
    result = host.run([host.binary], environment, stdin=subprocess.DEVNULL)
    assert (result.returncode, result.stdout) == (0, b"")
    about, versions = result.stderr.decode().splitlines()
    assert about.startswith("podlane")
    assert versions == "CNI protocol versions supported: 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"


@pytest.mark.parametrize("stdin", ["closed", "endless"])
def test_version_needs_neither_agent_nor_stdin(host: Host, stdin: str) -> None:
    """VERSION is answered without an agent, and without a look at stdin."""
    reader, writer = os.pipe()
    close_stdin = (lambda: os.close(0)) if stdin == "closed" else None
    environment: dict[str, str | bytes] = {"CNI_COMMAND": "VERSION", "PODLANE_TIMEOUT_MS": "rubbish"}
    result = host.run([host.binary], environment, stdin=reader, preexec_fn=close_stdin)
    os.close(reader)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")
    versions = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert json.loads(result.stdout) == {"cniVersion": "1.1.0", "supportedVersions": versions}


def no_socket(path: Path) -> str:
    """Leave the path as it is: nothing."""
    return str(path)


def abandoned_socket(path: Path) -> str:
    """Leave the socket of an agent that died."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return str(path)


def no_directory(path: Path) -> str:
    """Leave not even the directory."""
    return str(path / "deeper" / "cni.sock")


def too_long(path: Path) -> str:
    """Give a path that no unix socket can have."""
    return str(path) + "x" * 108


@pytest.mark.parametrize("away", [no_socket, abandoned_socket, no_directory, too_long])
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
def test_agent_away(host: Host, command: str, code: int, away: Callable[[Path], str]) -> None:
    """Without an agent every command but DEL fails with its code, and says where the agent should be."""
    path = away(host.socket)
    document = error(host.call(command, PODLANE_SOCKET=path))
    assert document["code"] == code
    assert command in document["msg"]
    assert path[:100] in document["msg"]
    assert "agent" in document["details"]
    assert host.spooled() == []


@pytest.mark.parametrize("away", [no_socket, abandoned_socket, no_directory, too_long])
def test_del_is_spooled_when_the_agent_is_away(host: Host, away: Callable[[Path], str]) -> None:
    """Without an agent a DEL succeeds, and its request waits in the spool directory."""
    assert_spooled(host, host.call("DEL", PODLANE_SOCKET=away(host.socket)))


def test_spooled_request_is_the_request(host: Host) -> None:
    """The spool file holds environment, stdin and errno as the agent would have received them."""
    stdin = b'{"cniVersion":"1.0.0","name":"n"}\0\xff'
    variables: dict[str, str | bytes] = {
        "CNI_NETNS": "/gone/netns",
        "ODD": b"\xff=\n",
        "EMPTY": "",
        "": "no name",
    }
    host.call("DEL", stdin, **variables)
    environment = {key: os.fsdecode(value) for key, value in host.environment("DEL", **variables).items() if key}
    assert spooled_request(host) == wire.Request(env=environment, stdin=stdin, netns_errno=2)
    assert stat.S_IMODE(host.spooled()[0].stat().st_mode) == 0o600
    assert {stat.S_IMODE(path.stat().st_mode) for path in (host.spool, host.spool.parent)} == {0o700}


def test_every_del_has_its_own_spool_file(host: Host) -> None:
    """A second DEL of the same attachment does not replace the first, and sorts after it."""
    for stdin in (b"first", b"second"):
        host.call("DEL", stdin, PODLANE_SPOOL=f"{host.spool}//")
    assert [wire.decode(path.read_bytes()).stdin for path in host.spooled()] == [b"first", b"second"]


@pytest.mark.parametrize("missing", [["CNI_CONTAINERID"], ["CNI_IFNAME"], ["CNI_CONTAINERID", "CNI_IFNAME"]])
def test_del_of_nothing_is_not_spooled(host: Host, missing: list[str]) -> None:
    """A DEL that names no attachment could never be finished: it fails, and names what is missing."""
    variables: dict[str, str | bytes] = dict.fromkeys(missing, "")
    document = error(host.call("DEL", b"{}", **variables))
    assert document["code"] == INVALID_ENVIRONMENT
    assert document["msg"] == f"required env variables [{','.join(missing)}] missing"
    assert host.spooled() == []


def test_unusable_spool_directory_fails_the_del(host: Host) -> None:
    """A DEL that can be neither done nor kept fails, with both reasons."""
    host.spool.parent.write_text("a file where a directory should be")
    document = error(host.call("DEL"))
    assert document["code"] == IO_FAILURE
    assert str(host.spool) in document["msg"]
    assert "Not a directory" in document["msg"]
    assert "does not exist" in document["details"]


@needs_strace
def test_spool_file_is_durable_before_it_has_its_name(host: Host) -> None:
    """The file is written and synced, then renamed, then its directory is synced; new directories are too."""
    calls = "trace=mkdirat,openat,write,fsync,rename,renameat,renameat2,close"
    result, trace = host.trace(["-y", "-e", calls], "DEL")
    assert_spooled(host, result)
    steps = [
        rf'mkdirat\(\d+<{host.directory}>, "state", 0700\) = 0',
        rf"fsync\(\d+<{host.directory}>\) = 0",
        rf'mkdirat\(\d+<{host.spool.parent}>, "spool", 0700\) = 0',
        rf"fsync\(\d+<{host.spool.parent}>\) = 0",
        rf'openat\(\d+<{host.spool}>, "\.[^"]+\.tmp", .*O_EXCL.*O_CLOEXEC',
        rf"write\(\d+<{host.spool}/\.[^>]+\.tmp>, .*PLN1",
        rf"fsync\(\d+<{host.spool}/\.[^>]+\.tmp>\) = 0",
        r'rename.*\.tmp".*\.del".* = 0',
        rf"fsync\(\d+<{host.spool}>\) = 0",
    ]
    assert first_matches(trace, steps) == steps


def first_matches(lines: list[str], patterns: list[str]) -> list[str]:
    """Return the patterns that match lines in this order, up to the first that does not."""
    rest = iter(lines)
    found = []
    for pattern in patterns:
        if not any(re.match(pattern, line) for line in rest):
            break
        found.append(pattern)
    return found


@pytest.mark.parametrize("closed", [[1], [2], [1, 2]])
@pytest.mark.parametrize("depth", [1, 2])
def test_spool_file_is_no_substitute_for_a_closed_descriptor(host: Host, closed: list[int], depth: int) -> None:
    """A runtime that closes stdout or stderr does not find the launcher's messages in the spool file."""
    spool = host.spool.parents[depth - 1] / "spool"  # the depth decides which number the file gets
    environment = host.environment("DEL", PODLANE_SPOOL=str(spool))

    def close() -> None:
        for descriptor in closed:
            os.close(descriptor)

    assert host.run([host.binary], environment, input=b"{}", preexec_fn=close).returncode == 0
    (path,) = spool.iterdir()
    assert wire.decode(path.read_bytes()).stdin == b"{}"


@needs_strace
@pytest.mark.parametrize("failure", ["write:error=ENOSPC", "fsync:error=EIO:when=3", "renameat:error=EROFS"])
def test_failed_spooling_leaves_nothing(host: Host, failure: str) -> None:
    """When the disk fails, the DEL fails too, and neither a whole nor a partial file stays behind."""
    result, _ = host.trace(["-e", f"inject={failure}"], "DEL")
    if failure.startswith("write"):  # stdout goes through writev, and works
        assert "No space left" in error(result)["msg"]
    assert error(result)["code"] == IO_FAILURE
    assert host.spooled() == []


@needs_strace
@pytest.mark.parametrize("step", ["write", "fsync", "renameat"])
def test_killed_launcher_leaves_no_partial_spool_file(host: Host, step: str) -> None:
    """A launcher that is killed while it spools leaves no file that the agent would take for a DEL."""
    host.spool.mkdir(parents=True)
    result, _ = host.trace(["-e", f"inject={step}:error=EIO:signal=SIGKILL"], "DEL")
    assert result.returncode == -9
    assert [path.suffix for path in host.spooled()] == [".tmp"]


@pytest.mark.parametrize("exit_code", [0, 1, 7, 255])
@pytest.mark.parametrize("stdout", [b"", b"{}\n", bytes(range(256)) * 4096, bytes(wire.STDOUT_LIMIT)])
def test_reply_is_passed_on(host: Host, exit_code: int, stdout: bytes) -> None:
    """Output and exit code are those of the agent, byte by byte, up to the limit."""

    def behave(connection: socket.socket) -> None:
        wire.receive(connection)
        wire.reply(connection, wire.Reply(exit_code, stdout))

    with listening(host.socket, behave):
        result = host.call("DEL" if exit_code else "ADD")
    assert (result.returncode, result.stderr) == (exit_code, b"")
    assert result.stdout == stdout
    assert host.spooled() == []


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
        request = wire.receive(connection)
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
        request = wire.receive(connection)
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
    wire.receive(connection)
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
@pytest.mark.parametrize(
    ("command", "least", "most"), [("STATUS", 0, 2000), ("DEL", 2000, 10_000), ("ADD", 10_000, 60_000)]
)
def test_default_deadlines(host: Host, command: str, least: int, most: int) -> None:
    """Each command has its own deadline: the kubelet waits for STATUS every five seconds."""
    _, trace = host.trace(["-e", "trace=poll"], command)
    timeout = re.search(r", 1, (\d+)\)", trace[0])
    assert timeout
    assert least < int(timeout[1]) <= most


@pytest.mark.parametrize("text", ["0", "-1", "1s", "1.5", "rubbish", "86400001", "99999999999999999999"])
def test_impossible_deadline_is_refused(host: Host, text: str) -> None:
    """A deadline that is no number of milliseconds is named, not replaced in silence."""
    document = error(host.call("DEL", PODLANE_TIMEOUT_MS=text))
    assert document["code"] == INVALID_ENVIRONMENT
    assert f"not '{text}'" in document["msg"]


@pytest.mark.parametrize("command", ["ADD", "DEL", "STATUS"])
def test_stdin_that_cannot_be_read(host: Host, command: str) -> None:
    """A configuration that never ends, is too long, or is not there, fails whatever the command is."""
    environment = host.environment(command, PODLANE_TIMEOUT_MS="100")
    reader, writer = os.pipe()
    os.write(writer, b"{")
    endless = host.run([host.binary], environment, stdin=reader)
    os.close(reader)
    os.close(writer)
    closed = host.run([host.binary], environment, preexec_fn=lambda: os.close(0))
    too_long = host.call(command, bytes(wire.STDIN_LIMIT + 1))
    for result, reason in (
        (endless, "after 1 bytes: the deadline"),
        (closed, "Bad file descriptor"),
        (too_long, "stdin is larger than 16777216 bytes"),
    ):
        assert error(result)["code"] == IO_FAILURE
        assert reason in error(result)["msg"]
    assert host.spooled() == []


def test_environment_that_is_too_large(host: Host) -> None:
    """More environment than the wire allows is an error, not a cut environment."""

    def allow_large_environment() -> None:
        resource.setrlimit(resource.RLIMIT_STACK, (64 << 20, resource.getrlimit(resource.RLIMIT_STACK)[1]))

    environment = host.environment("ADD") | {f"V{i}": "x" * 100_000 for i in range(42)}
    result = host.run([host.binary], environment, input=b"{}", preexec_fn=allow_large_environment)
    assert error(result)["code"] == INVALID_ENVIRONMENT
    assert "larger than 4194304 bytes" in error(result)["msg"]


@needs_strace
@pytest.mark.parametrize("call", ["poll", "read", "connect", "sendmsg", "write"])
def test_interrupted_calls_are_repeated(host: Host, call: str) -> None:
    """A signal that interrupts any system call changes nothing."""
    with listening(host.socket, answering(REPLY)):
        result, trace = host.trace(["-e", f"inject={call}:error=EINTR:when=1"], "ADD")
    assert any(line.startswith(f"{call}(") and "EINTR" in line for line in trace)
    assert (result.returncode, result.stdout) == (0, REPLY[8:])


hostile = st.binary(min_size=1, max_size=1500).map(lambda text: text.replace(b"\0", b"\n"))


@settings(max_examples=150, deadline=None)
@given(command=hostile, path=hostile, timeout=hostile)
def test_hostile_environment(
    binary: Path, tmp_path_factory: pytest.TempPathFactory, command: bytes, path: bytes, timeout: bytes
) -> None:
    """Whatever bytes the environment holds, the error is one valid JSON document."""
    host = Host(binary, tmp_path_factory.getbasetemp())
    spool = b"/dev/null/" + path
    for result in (
        host.call(b"x" + command, PODLANE_SOCKET=spool),
        host.call("ADD", PODLANE_TIMEOUT_MS=b"x" + timeout),
        host.call("DEL", PODLANE_SPOOL=spool),
    ):
        error_document(result)


def error_document(result: Result) -> None:
    """Check the form of an error that repeats what it was given, whatever words that are."""
    assert result.returncode == 1
    assert isinstance(json.loads(result.stdout.decode())["msg"], str)


@pytest.mark.parametrize("text", ['quote"', "back\\slash", "new\nline", "\x01\x1f\x7f", "größe", "\U0001f600"])
def test_text_survives_in_messages(host: Host, text: str) -> None:
    """What can be said in JSON is repeated as it was."""
    assert text in error(host.call(text))["msg"]


@pytest.mark.parametrize("text", [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80"])
def test_invalid_utf8_in_messages(host: Host, text: bytes) -> None:
    """Bytes that are no UTF-8 become replacement characters, and the rest stays."""
    assert re.search("<\ufffd+>", error(host.call(b"<" + text + b">"))["msg"])

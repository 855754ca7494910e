"""The launcher by itself: what it says without an agent, and what it makes of a bad environment."""

import json
import os
import re
import resource
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cni import wire
from cni.versions import VERSIONS
from tests.unit.launchers import (
    INVALID_ENVIRONMENT,
    IO_FAILURE,
    Host,
    Result,
    error,
    needs_strace,
)


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
    """P04: called by a person it says what it is and which versions it speaks, on stderr, and succeeds."""
    result = host.run([host.binary], environment, stdin=subprocess.DEVNULL)
    assert (result.returncode, result.stdout) == (0, b"")
    about, versions = result.stderr.decode().splitlines()
    assert about.startswith("podlane")
    assert versions == f"CNI protocol versions supported: {', '.join(VERSIONS)}"


@pytest.mark.parametrize("stdin", ["closed", "endless"])
def test_version_needs_neither_agent_nor_stdin(host: Host, stdin: str) -> None:
    """P01 to P03: VERSION is answered without an agent, and without a look at stdin."""
    reader, writer = os.pipe()
    close_stdin = (lambda: os.close(0)) if stdin == "closed" else None
    environment: dict[str, str | bytes] = {"CNI_COMMAND": "VERSION", "PODLANE_TIMEOUT_MS": "rubbish"}
    result = host.run([host.binary], environment, stdin=reader, preexec_fn=close_stdin)
    os.close(reader)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, b"")
    assert json.loads(result.stdout) == {"cniVersion": "1.1.0", "supportedVersions": list(VERSIONS)}


def test_version_as_libcni_asks(host: Host) -> None:
    """P01: the probe of libcni, whose variables are dummies, gets the seven versions and nothing else."""
    dummies = dict.fromkeys(("CNI_NETNS", "CNI_IFNAME", "CNI_PATH"), "dummy")
    result = host.call("VERSION", b'{"cniVersion":"1.1.0"}', CNI_CONTAINERID="", **dummies)
    versions = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    assert json.loads(result.stdout) == {"cniVersion": "1.1.0", "supportedVersions": versions}
    assert result.stderr == b""


@needs_strace
@pytest.mark.parametrize(
    ("command", "least", "most"),
    [
        ("STATUS", 0, 2000),
        ("DEL", 2000, 10_000),
        ("CHECK", 10_000, 20_000),
        ("GC", 20_000, 25_000),
        ("ADD", 25_000, 60_000),
    ],
)
def test_default_deadlines(host: Host, command: str, least: int, most: int) -> None:
    """Each command has its own deadline: the kubelet asks for STATUS every five seconds, CRI-O gives GC thirty."""
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


@pytest.mark.parametrize("command", ["ADD", "CHECK", "DEL", "GC", "STATUS"])
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

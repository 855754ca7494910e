"""The wire between launcher and agent, over real sockets and with real descriptors."""

import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni import wire

REQUEST = wire.Request(env={"CNI_COMMAND": "ADD", "EMPTY": ""}, stdin=b'{"name": "n"}')


def decoded(data: bytes) -> str:
    """Return the bytes as the wire module decodes those of an environment."""
    return data.decode("utf-8", "surrogateescape")


def header(magic: bytes = b"PLN1", env: int = 0, stdin: int = 0, errno: int = 0) -> bytes:
    """Return the header of a request, written independently of the module under test."""
    return magic + env.to_bytes(4, sys.byteorder) + stdin.to_bytes(4, sys.byteorder) + struct.pack("=i", errno)


def open_descriptors() -> set[str]:
    """Return this process's descriptors, each with what it refers to, without the one that lists them."""
    found = {path.name: str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    return {f"{number} {target}" for number, target in found.items() if "/proc/" not in target}


names = st.binary(min_size=1, max_size=20).filter(lambda name: not {0, ord("=")} & set(name)).map(decoded)
values = st.binary(max_size=60).filter(lambda value: 0 not in value).map(decoded)
requests = st.builds(
    wire.Request,
    env=st.dictionaries(names, values, max_size=8),
    stdin=st.binary(max_size=200),
    netns_errno=st.integers(0, 4095),
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give the launcher's and the agent's end of a connection."""
    launcher, agent = socket.socketpair()
    with launcher, agent:
        launcher.settimeout(10)
        agent.settimeout(10)
        yield launcher, agent


Pair = tuple[socket.socket, socket.socket]


@given(requests)
def test_decode_undoes_encode(request_: wire.Request) -> None:
    """What was encoded is decoded to the same request, whatever bytes its environment holds."""
    assert wire.decode(wire.encode(request_)) == request_


@given(requests, st.data())
def test_mutated_bytes_are_refused_or_decoded(request_: wire.Request, data: st.DataObject) -> None:
    """Damaged bytes lead to a WireError or to a request that encodes again, never to another exception."""
    damaged = bytearray(wire.encode(request_))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(damaged)))
        end = data.draw(st.integers(start, min(start + 8, len(damaged))))
        damaged[start:end] = data.draw(st.binary(max_size=8))
    try:
        result = wire.decode(bytes(damaged))
    except wire.WireError:
        return
    assert wire.decode(wire.encode(result)) == result


def test_layout_is_the_documented_one() -> None:
    """The bytes are magic, sizes, errno, environment and stdin, in the order that the docstring gives."""
    env = b"CNI_COMMAND=ADD\0EMPTY=\0"
    assert wire.encode(REQUEST) == header(env=len(env), stdin=13) + env + b'{"name": "n"}'


def test_first_of_two_equal_names_counts() -> None:
    """A name that comes twice has its first value, as getenv in the launcher gives it."""
    assert wire.decode(header(env=8) + b"A=1\0A=2\0").env == {"A": "1"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header: 0 bytes, needed are 16"),
        (b"PLN1", "header: 4 bytes, needed are 16"),
        (header(magic=b"PLN2"), "magic: b'PLN2', allowed is b'PLN1'"),
        (header(env=wire.ENV_LIMIT + 1), "env_size: 4194305 bytes, allowed are 4194304"),
        (header(stdin=wire.STDIN_LIMIT + 1), "stdin_size: 16777217 bytes, allowed are 16777216"),
        (header(errno=-1), "netns_errno: -1, allowed are 0 to 4095"),
        (header(errno=4096), "netns_errno: 4096, allowed are 0 to 4095"),
        (header(env=3) + b"A=1", "env: its last variable b'A=1' does not end with a zero byte"),
        (header(env=2) + b"A\0", "env: b'A', allowed is NAME=value"),
        (header(env=3) + b"=A\0", "env: b'=A', allowed is NAME=value"),
    ],
)
def test_malformed_requests_are_named(data: bytes, message: str, pair: Pair) -> None:
    """A malformed request, from a file or a connection, is refused by the name of its field."""
    with pytest.raises(wire.WireError) as refused:
        wire.decode(data)
    assert str(refused.value) == message
    launcher, agent = pair
    launcher.sendall(data)
    launcher.shutdown(socket.SHUT_WR)
    with pytest.raises(wire.WireError, match=message.split(":")[0]):
        wire.receive(agent, 30)


@pytest.mark.parametrize("surplus", [b"", b"12"])
def test_body_of_a_file_has_the_announced_size(surplus: bytes) -> None:
    """A spool file that is shorter or longer than its header says is refused."""
    with pytest.raises(wire.WireError, match=f"body: {len(surplus)} bytes, announced are 0 of env and 1 of stdin"):
        wire.decode(header(stdin=1) + surplus)


@pytest.mark.parametrize(
    ("env", "stdin", "errno", "message"),
    [
        ({"": "x"}, b"", 0, "env: ''"),
        ({"A=B": "x"}, b"", 0, "env: 'A=B'"),
        ({"A": "x\0"}, b"", 0, "env: 'A'"),
        ({"A": "\ud800"}, b"", 0, "env: 'A' is not a decoded byte string"),
        ({"A": "x" * wire.ENV_LIMIT}, b"", 0, "env: 4194307 bytes"),
        ({}, bytes(wire.STDIN_LIMIT + 1), 0, "stdin: 16777217 bytes"),
        ({}, b"", 4096, "netns_errno: 4096"),
    ],
)
def test_encode_refuses_what_the_format_cannot_hold(
    env: dict[str, str], stdin: bytes, errno: int, message: str
) -> None:
    """A request that no decoder would give back is not encoded."""
    with pytest.raises(wire.WireError, match=message):
        wire.encode(wire.Request(env=env, stdin=stdin, netns_errno=errno))


def test_request_arrives_byte_by_byte(pair: Pair) -> None:
    """A request is whole however its bytes are cut on the way."""
    launcher, agent = pair

    def dribble() -> None:
        for byte in wire.encode(REQUEST):
            launcher.send(bytes([byte]))

    sender = threading.Thread(target=dribble)
    sender.start()
    received = wire.receive(agent, 30)
    sender.join()
    assert received == REQUEST


@pytest.mark.parametrize("size", range(len(wire.encode(REQUEST))))
def test_cut_request_is_refused_and_its_descriptor_closed(size: int, pair: Pair) -> None:
    """A connection that ends early is a WireError at every byte, and the descriptor that came is closed."""
    launcher, agent = pair
    with Path("/proc/self/ns/net").open("rb") as netns:
        if size:
            socket.send_fds(launcher, [wire.encode(REQUEST)[:size]], [netns.fileno()])
        launcher.shutdown(socket.SHUT_WR)
        before = open_descriptors()
        with pytest.raises(wire.WireError, match="the connection ended"):
            wire.receive(agent, 30)
        assert open_descriptors() == before


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_one_descriptor_is_taken_and_the_others_closed(count: int, pair: Pair) -> None:
    """Of the descriptors that come the first is taken, close-on-exec, and no other stays open."""
    launcher, agent = pair
    with Path("/proc/self/ns/net").open("rb") as netns, Path("/dev/null").open("rb") as other:
        descriptors = [netns.fileno()] + [other.fileno()] * (count - 1)
        socket.send_fds(launcher, [wire.encode(REQUEST)[:20]], descriptors)
        socket.send_fds(launcher, [wire.encode(REQUEST)[20:]], [other.fileno()] * 2)
        before = open_descriptors()
        received = wire.receive(agent, 30)
        assert received.netns is not None
        try:
            assert os.path.sameopenfile(received.netns, netns.fileno())
            assert not os.get_inheritable(received.netns)
            assert len(open_descriptors() - before) == 1
        finally:
            os.close(received.netns)


@pytest.mark.parametrize(
    ("env", "errno", "with_descriptor", "message"),
    [
        ({"CNI_NETNS": "/n"}, 2, True, "netns_errno: 2 beside an open descriptor"),
        ({"CNI_NETNS": "/n"}, 0, False, "netns: no descriptor came for CNI_NETNS='/n'"),
    ],
)
def test_descriptor_and_errno_exclude_each_other(
    env: dict[str, str], errno: int, with_descriptor: bool, message: str, pair: Pair
) -> None:
    """A network namespace comes with a descriptor or with the errno of opening it, never both."""
    launcher, agent = pair
    data = wire.encode(wire.Request(env=env, stdin=b"", netns_errno=errno))
    with Path("/proc/self/ns/net").open("rb") as netns:
        socket.send_fds(launcher, [data], [netns.fileno()] if with_descriptor else [])
        before = open_descriptors()
        with pytest.raises(wire.WireError, match=message):
            wire.receive(agent, 30)
        assert open_descriptors() == before


def test_silent_launcher_times_out(pair: Pair) -> None:
    """A launcher that stops in the middle is a WireError once its time is over."""
    launcher, agent = pair
    for part, field in ((b"", "header"), (wire.encode(REQUEST)[:20], "env")):
        launcher.sendall(part)
        with pytest.raises(wire.WireError, match=field) as refused:
            wire.receive(agent, 0.05)
        assert isinstance(refused.value.__cause__, TimeoutError)


def test_slow_launcher_times_out(pair: Pair) -> None:
    """The time is that of the whole request: a launcher that sends now and then a byte does not get more of it."""
    launcher, agent = pair
    stop = threading.Event()

    def drip() -> None:
        launcher.sendall(header(stdin=wire.STDIN_LIMIT))
        while not stop.wait(0.01):
            launcher.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        with pytest.raises(wire.WireError, match="stdin: cannot receive the last") as refused:
            wire.receive(agent, 0.2)
        assert isinstance(refused.value.__cause__, TimeoutError)
    finally:
        stop.set()
        thread.join(30)


def test_reply_bytes(pair: Pair) -> None:
    """A reply is exit code, size and output."""
    launcher, agent = pair
    wire.reply(agent, wire.Reply(exit_code=1, stdout=b"abc"))
    assert launcher.recv(100) == struct.pack("=II", 1, 3) + b"abc"


def test_reply_to_a_launcher_that_is_gone(pair: Pair) -> None:
    """A launcher that went away is a WireError, not a broken pipe."""
    launcher, agent = pair
    launcher.close()
    with pytest.raises(wire.WireError, match="cannot send 3 bytes of stdout"):
        wire.reply(agent, wire.Reply(exit_code=0, stdout=b"abc"))


@pytest.mark.parametrize("exit_code", [-1, 256])
def test_reply_refuses_impossible_exit_codes(exit_code: int, pair: Pair) -> None:
    """An exit code that no process can have is not sent."""
    with pytest.raises(wire.WireError, match="allowed are 0 to 255"):
        wire.reply(pair[1], wire.Reply(exit_code=exit_code, stdout=b""))


def test_reply_refuses_too_much_output(pair: Pair) -> None:
    """Output that the launcher would not take is not sent."""
    with pytest.raises(wire.WireError, match="stdout: 16777217 bytes"):
        wire.reply(pair[1], wire.Reply(exit_code=0, stdout=bytes(wire.STDOUT_LIMIT + 1)))

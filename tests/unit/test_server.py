"""The agent's socket: real connections, from those who may and those who may not."""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from agent.server import Server, observed
from cni import wire
from tests.support import open_descriptors

NOBODY = 65534
REQUEST = wire.Request({"CNI_COMMAND": "ADD", "N": "1"}, b'{"name": "n"}')
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the agent serves root only")


def echo(request: wire.Request) -> wire.Reply:
    """Answer with what was asked."""
    return wire.Reply(0, request.env["N"].encode() + request.stdin)


@contextmanager
def serving(path: Path, handle: Callable[[wire.Request], wire.Reply] = echo) -> Iterator[Server]:
    """Run a server."""
    server = Server(path, handle)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def exchange(path: Path | str, data: bytes) -> bytes:
    """Send these bytes as a launcher would, and return all that comes back until the server hangs up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        answer = b""
        with suppress(ConnectionResetError, BrokenPipeError):  # if the server has not read everything
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while received := connection.recv(65536):
                answer += received
        return answer


def ask(path: Path, number: int = 1) -> bytes:
    """Send a good request, and return the stdout of the reply."""
    request = wire.Request({"CNI_COMMAND": "ADD", "N": str(number)}, REQUEST.stdin)
    answer = exchange(path, wire.encode(request))
    exit_code, size = struct.unpack_from("=II", answer)
    assert (exit_code, size) == (0, len(answer) - 8)
    return answer[8:]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where the socket goes; its directory does not exist yet."""
    return tmp_path / "run" / "cni.sock"


def test_socket_is_for_root_only(path: Path) -> None:
    """Nobody else can open the socket or see into its directory, whatever the umask is."""
    previous = os.umask(0)
    try:
        with serving(path):
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.parent.stat().st_mode & 0o777 == 0o700
            assert os.umask(0) == 0  # and the umask is as it was
    finally:
        os.umask(previous)


def call_as_nobody(directory: Path, results: multiprocessing.SimpleQueue[bytes | str]) -> None:
    """Call the server in the given directory from a process without rights."""
    os.chdir(directory)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    try:
        results.put(exchange("cni.sock", wire.encode(REQUEST)))
    except OSError as error:
        results.put(type(error).__name__)


def test_other_users_are_refused(path: Path) -> None:
    """A caller who is not root is not served, not even if somebody has opened the socket to all."""
    served: list[wire.Request] = []

    def handle(request: wire.Request) -> wire.Reply:
        served.append(request)
        return echo(request)

    fork = multiprocessing.get_context("fork")
    with serving(path, handle):
        path.parent.chmod(0o711)
        for mode, expected in ((0o600, "PermissionError"), (0o666, b"")):
            path.chmod(mode)
            results = fork.SimpleQueue()
            process = fork.Process(target=call_as_nobody, args=(path.parent, results))
            process.start()
            assert results.get() == expected
            process.join(30)
        assert served == []
        assert ask(path) == b'1{"name": "n"}'
        assert len(served) == 1


def test_stale_socket_is_replaced(path: Path) -> None:
    """The socket of an agent that was killed is not in the way, and a server that stops leaves none."""
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serving(path):
        assert ask(path)
    assert list(path.parent.iterdir()) == []


def test_stop_after_the_directory_is_gone(path: Path) -> None:
    """A socket that somebody has removed does not keep the agent from stopping."""
    with serving(path):
        path.unlink()
        path.parent.rmdir()


def test_successor_keeps_its_socket(path: Path) -> None:
    """An agent that stops late does not take away the socket of the one that has replaced it."""
    old = Server(path, lambda _: wire.Reply(0, b"old"))
    old.start()
    with serving(path, lambda _: wire.Reply(0, b"new")):
        old.stop()
        assert exchange(path, wire.encode(REQUEST)).endswith(b"new")


def test_many_callers(path: Path) -> None:
    """A hundred callers at once are all served, at least twelve and at most sixteen at a time."""
    together = threading.Barrier(12)  # breaks, and so fails the calls, if fewer are served at a time
    counted = threading.Lock()
    running, most = 0, 0

    def handle(request: wire.Request) -> wire.Reply:
        nonlocal running, most
        with counted:
            running += 1
            most = max(most, running)
        together.wait(30)
        with counted:
            running -= 1
        return echo(request)

    with serving(path, handle), ThreadPoolExecutor(108) as pool:
        answers = list(pool.map(lambda number: ask(path, number), range(108)))
    assert answers == [str(number).encode() + REQUEST.stdin for number in range(108)]
    assert 12 <= most <= 16


def test_garbage_is_refused(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever does not speak the protocol is hung up on and named in the log; the next caller is served."""
    good = wire.encode(REQUEST)
    garbage = [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        good[:10],
        good[:-1],
        struct.pack("=4sIIi", b"PLN1", 0xFFFFFFFF, 0xFFFFFFFF, -1),
        good.replace(b"CNI_COMMAND=ADD", b"=NI_COMMAND=ADD"),
    ]
    served: list[wire.Request] = []

    def handle(request: wire.Request) -> wire.Reply:
        served.append(request)
        return echo(request)

    with serving(path, handle):
        for number, data in enumerate(garbage):
            assert exchange(path, data) == b""
            assert len(served) == number
            assert ask(path)
    messages = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == len(garbage)
    assert all(message.startswith("launcher gave up or spoke nonsense error=") for message in messages)


def test_caller_that_goes_early(path: Path) -> None:
    """A launcher that was killed while it was served does no harm: its call is done, the next one served."""
    begun, gone, done = threading.Event(), threading.Event(), threading.Event()

    def handle(request: wire.Request) -> wire.Reply:
        begun.set()
        assert gone.wait(30)
        done.set()
        return wire.Reply(0, request.env["N"].encode() * 1_000_000)

    with serving(path, handle):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(path))
            connection.sendall(wire.encode(REQUEST))
            assert begun.wait(30)
        gone.set()
        assert done.wait(30)
        assert len(ask(path)) == 1_000_000


def test_caller_that_goes_before_its_turn(path: Path) -> None:
    """Of launchers that were killed in line the DELs are done, and no ADD: the DEL may have come before it."""
    release, at_work = threading.Event(), threading.Semaphore(0)
    served: list[str] = []

    def slow(request: wire.Request) -> wire.Reply:
        served.append(request.env["N"])
        at_work.release()
        assert release.wait(30)
        return echo(request)

    with serving(path, slow), ThreadPoolExecutor(17) as pool:
        first = [pool.submit(ask, path) for _ in range(16)]
        for _ in first:
            assert at_work.acquire(timeout=30)
        for command in ("ADD", "DEL"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                connection.sendall(wire.encode(wire.Request({"CNI_COMMAND": command, "N": command}, b"")))
        last = pool.submit(ask, path, 2)
        release.set()
        assert [each.result() for each in (*first, last)] == [b"1" + REQUEST.stdin] * 16 + [b"2" + REQUEST.stdin]
        assert at_work.acquire(timeout=30)
        assert at_work.acquire(timeout=30)
    assert sorted(served) == ["1"] * 16 + ["2", "DEL"]


def test_flood_of_connections(path: Path) -> None:
    """However many connections are open, few of them cost a thread; when they end, the next caller is served."""
    before = threading.active_count()
    with serving(path), ThreadPoolExecutor(1) as pool:
        idle = [socket.socket(socket.AF_UNIX) for _ in range(600)]
        for connection in idle:
            connection.connect(str(path))
        waiting = pool.submit(ask, path)
        deadline = time.monotonic() + 30
        while threading.active_count() - before < 512 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert 500 < threading.active_count() - before < 520
        assert not waiting.done()
        for connection in idle:
            connection.close()
        assert waiting.result() == b"1" + REQUEST.stdin


def test_flood_of_descriptors(path: Path) -> None:
    """An agent without a descriptor left waits for one, and does not burn the processor; then it goes on."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(path), ThreadPoolExecutor(1) as pool:
        with socket.socket(socket.AF_UNIX) as connection:
            resource.setrlimit(resource.RLIMIT_NOFILE, (connection.fileno() + 1, limits[1]))
            try:
                connection.connect(str(path))
                connection.sendall(wire.encode(wire.Request({"CNI_COMMAND": "ADD", "N": "3"}, b"")))
                spent = time.process_time()
                time.sleep(0.5)
                assert time.process_time() - spent < 0.25
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            connection.settimeout(30)
            assert connection.recv(100).endswith(b"3")
        assert pool.submit(ask, path).result() == b"1" + REQUEST.stdin


def test_bug_in_the_handler(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """An exception costs its own caller the answer, and nobody else."""

    def handle(request: wire.Request) -> wire.Reply:
        if request.env["N"] == "1":
            raise ZeroDivisionError
        return echo(request)

    with serving(path, handle):
        assert exchange(path, wire.encode(REQUEST)) == b""
        assert ask(path, 2)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_descriptors_are_closed(path: Path) -> None:
    """The network namespace that comes with a call is open while it is handled, and closed after it."""
    kinds: list[bool] = []

    def handle(request: wire.Request) -> wire.Reply:
        assert request.netns is not None
        kinds.append(os.path.sameopenfile(request.netns, own.fileno()))
        return wire.Reply(0, b"")

    with Path("/proc/self/ns/net").open("rb") as own, serving(path, handle):
        before = open_descriptors()
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(str(path))
                socket.send_fds(connection, [wire.encode(REQUEST)], [own.fileno()])
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100) == struct.pack("=II", 0, 0)
                assert connection.recv(100) == b""
        deadline = time.monotonic() + 30
        while open_descriptors() != before:  # the server closes its end a moment after it has hung up
            assert time.monotonic() < deadline
    assert kinds == [True] * 20


def test_observer() -> None:
    """Each call is told with its command, exit code and duration; the reply is the handler's."""
    calls: list[tuple[str, int, float]] = []
    handle = observed(lambda request: wire.Reply(len(request.env), b"x"), lambda *call: calls.append(call))
    assert handle(REQUEST) == wire.Reply(2, b"x")
    assert handle(wire.Request({}, b"")) == wire.Reply(0, b"x")
    assert [(command, code) for command, code, _ in calls] == [("ADD", 2), ("", 0)]
    assert all(0 <= seconds < 30 for _, _, seconds in calls)


def test_status_waits_for_nobody(path: Path) -> None:
    """STATUS is answered while as many ADDs as are served at a time are at work."""
    release, at_work = threading.Event(), threading.Semaphore(0)

    def slow(request: wire.Request) -> wire.Reply:
        if request.env["CNI_COMMAND"] == "ADD":
            at_work.release()
            release.wait(30)
        return echo(request)

    with serving(path, slow):
        threads = [threading.Thread(target=ask, args=(path,)) for _ in range(40)]
        for thread in threads:
            thread.start()
        for _ in range(16):
            assert at_work.acquire(timeout=10)
        try:
            request = wire.Request({"CNI_COMMAND": "STATUS", "N": "1"}, b"")
            assert exchange(path, wire.encode(request)).endswith(b"1")
        finally:
            release.set()
            for thread in threads:
                thread.join(30)


class Slow:
    """A handler that begins, and ends when it may."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def handle(self, request: wire.Request) -> wire.Reply:
        """Wait, and answer."""
        self.begun.set()
        assert self.may_end.wait(30)
        return echo(request)


def test_calls_in_hand_are_finished(path: Path) -> None:
    """A server that stops hears no new caller, and ends after those that it has begun to serve have their answer."""
    slow = Slow()
    server = Server(path, slow.handle)
    server.start()
    with ThreadPoolExecutor() as pool:
        call = pool.submit(ask, path)
        assert slow.begun.wait(30)
        end = pool.submit(server.stop)
        while path.exists():
            time.sleep(0.001)
        assert not end.done()
        slow.may_end.set()
        assert call.result(30) == b"1" + REQUEST.stdin
        end.result(30)


def test_calls_that_take_too_long_get_no_answer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a call says after the server has given up on it is not said: what it relied on may be gone."""
    monkeypatch.setattr("agent.server._STOP_SECONDS", 0.01)
    slow = Slow()
    server = Server(path, slow.handle)
    server.start()
    with ThreadPoolExecutor() as pool:
        call = pool.submit(exchange, path, wire.encode(REQUEST))
        assert slow.begun.wait(30)
        server.stop()
        slow.may_end.set()
        assert call.result(30) == b""

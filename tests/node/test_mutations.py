"""Requests that no runtime makes, to a real agent: over its socket with odd descriptors, and by the launcher.

`make soak` sets PODLANE_MUTATIONS, of which these tests have a twentieth and a hundredth; tests/unit has the rest.
"""

from __future__ import annotations

import array
import json
import os
import random
import socket
import sqlite3
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from cni import wire
from cni.wire import ENV_LIMIT, STDIN_LIMIT, Reply, Request
from tests.mutations import (
    NUMBER,
    SECONDS,
    Mutator,
    assert_valid,
    command_of,
    environment_of,
    install_giver,
    mutate_bytes,
    resident,
)
from tests.node.machine import LAUNCHER, Machine, Netns, machine
from tests.unit.calls import config, environment

WORKERS = 4
OVER_THE_SOCKET, BY_LAUNCHER = NUMBER // 20, NUMBER // 100
GROWTH = 8 << 20  # bytes by which the agent may grow once all of its code has run
HEADER = struct.Struct("=4sIIi")
REPLY = struct.Struct("=II")
SIZES = (0, 1, 15, 4096, ENV_LIMIT, ENV_LIMIT + 1, STDIN_LIMIT, STDIN_LIMIT + 1, 2**31, 2**32 - 1)
NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node for all tests of this module, with an IPAM plugin."""
    with machine(tmp_path_factory.mktemp("node")) as it:
        it.add_uplink()
        it.start_agent()
        install_giver(it.directory / "bin")
        yield it


class Caller:
    """Sends mutated requests to the agent, one after the other, for containers in a namespace of its own."""

    def __init__(self, node: Machine, number: int, netns: Netns, odd: Sequence[int]) -> None:
        """`odd` are open files that are no pod's network namespace."""
        self.answers: Counter[str] = Counter()
        self._socket = str(node.directory / "cni.sock")
        self._mutator = Mutator(number, path=str(node.directory / "bin"), netns=str(netns.path))
        self._netns = os.open(netns.path, os.O_RDONLY)
        self._odd = odd

    def close(self) -> None:
        """Close what it holds."""
        os.close(self._netns)

    def work(self, numbers: range) -> None:
        """Send the requests of these numbers."""
        for number in numbers:
            rng = random.Random(number)
            request = self._mutator.request(number)
            if rng.random() < 0.4:
                self._send_oddly(rng, request)
            else:
                self._follow(rng, request, self.call(request, [self._netns]))

    def call(self, request: Request, descriptors: Sequence[int]) -> Reply | None:
        """Send a whole request; return the answer, None if it is refused without one."""
        reply = self.exchange(wire.encode(request), descriptors)
        if reply is not None:
            assert_valid(request, reply)
        self.answers["refused" if reply is None else f"{command_of(request)} {reply.exit_code}"] += 1
        return reply

    def exchange(self, frame: bytes, descriptors: Sequence[int]) -> Reply | None:
        """Send these bytes and descriptors; return the answer, which is a whole one or none at all."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(self._socket)
            with suppress(BrokenPipeError, ConnectionResetError):
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
                sent = connection.sendmsg([frame], [rights] if descriptors else []) if frame else 0
                connection.sendall(frame[sent:])
                connection.shutdown(socket.SHUT_WR)
            data = b""
            with suppress(ConnectionResetError):  # it has hung up with some of ours unread
                while part := connection.recv(1 << 16):
                    data += part
        if not data:
            return None
        exit_code, size = REPLY.unpack_from(data)
        assert len(data) == REPLY.size + size
        return Reply(exit_code, data[REPLY.size :])

    def _follow(self, rng: random.Random, request: Request, reply: Reply | None) -> None:
        """After an ADD that succeeded, sometimes CHECK and DEL."""
        if reply is None or reply.exit_code != 0 or request.env["CNI_COMMAND"] != "ADD":
            return
        with suppress(ValueError):  # keys twice, or bytes that are no UTF-8: the agent takes them, we cannot edit them
            document = json.loads(request.stdin) | {"cniVersion": "1.0.0", "prevResult": json.loads(reply.stdout)}
            if rng.random() < 0.3:
                check = {**request.env, "CNI_COMMAND": "CHECK"}
                self.call(Request(check, json.dumps(document).encode()), [self._netns])
        if rng.random() < 0.7:
            self.call(Request({**request.env, "CNI_COMMAND": "DEL"}, request.stdin), [self._netns])

    def _send_oddly(self, rng: random.Random, request: Request) -> None:
        frame, descriptors = wire.encode(request), [self._netns]
        match rng.randrange(6):
            case 0:
                frame = frame[: rng.randrange(len(frame))]
            case 1:
                frame = mutate_bytes(rng, frame)
            case 2:
                magic, env_size, stdin_size, code = HEADER.unpack_from(frame)
                env_size, stdin_size = (rng.choice((size, *SIZES)) for size in (env_size, stdin_size))
                code = rng.choice((code, 2, -1, 4095, 4096, -(2**31)))
                frame = HEADER.pack(magic, env_size, stdin_size, code) + frame[HEADER.size :]
            case 3:
                descriptors = rng.choice(([], [self._netns] * 2, [self._netns] * 200, [*self._odd, self._netns]))
            case _:
                descriptors = [rng.choice(self._odd)]
        reply = self.exchange(frame, descriptors)
        if reply is not None:
            assert_valid(request if json.loads(reply.stdout or b"{}").get("code") else _any(reply), reply)
        self.answers["refused" if reply is None else f"odd {reply.exit_code}"] += 1


def _any(reply: Reply) -> Request:
    """Return a request whose command fits an answer, since nobody knows what the agent has read."""
    return Request({"CNI_COMMAND": "ADD" if reply.stdout else "DEL"}, b"")


def odd_descriptors(node: Machine, directory: Path, stack: ExitStack) -> list[int]:
    """Open files of all kinds that are no pod's network namespace."""
    fifo = directory / "fifo"
    os.mkfifo(fifo)
    places = ["/dev/null", "/dev/zero", "/dev/full", "/proc/self/mem", str(directory), str(LAUNCHER)]
    places += [f"/proc/self/ns/{kind}" for kind in NAMESPACES] + [str(node.netns.path)]
    opened = [os.open(place, os.O_RDONLY) for place in places]
    opened += [os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), os.open(node.netns.path, os.O_PATH), os.memfd_create("odd")]
    opened += [os.pidfd_open(os.getpid()), os.eventfd(0), *os.pipe()]
    for each in socket.socketpair():
        opened.append(each.detach())
    for descriptor in opened:
        stack.callback(os.close, descriptor)
    return opened


def held(node: Machine) -> list[str]:
    """Return what the agent's descriptors are, the sockets of its connections aside: those come and go."""
    assert node.agent is not None
    links = []
    for path in Path(f"/proc/{node.agent.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            links.append(str(path.readlink()))
    return sorted(link for link in links if not link.startswith(("socket:", "pipe:", "/proc/", "anon_inode:[event")))


def counted(node: Machine) -> int:
    """Return how many descriptors the agent holds."""
    assert node.agent is not None
    return len(list(Path(f"/proc/{node.agent.pid}/fd").iterdir()))


def assert_closed(node: Machine, files: Sequence[str], number: int) -> None:
    """Assert that the agent's descriptors are again what they were, as soon as its threads have ended."""
    with suppress(AssertionError):
        node.wait_for(lambda: counted(node) <= number, "the agent to close what it was sent", seconds=5)
    assert held(node) == files
    assert counted(node) <= number


def delete_rows(node: Machine, caller: Caller) -> None:
    """DEL every attachment that the agent knows, by a plain call."""
    with closing(sqlite3.connect(f"file:{node.directory}/state/ipam.db?mode=ro", uri=True)) as db:
        rows = db.execute("SELECT network, container_id, ifname FROM attachment").fetchall()
    for network, container_id, ifname in rows:
        path = str(node.directory / "bin")
        env = environment("DEL", CNI_CONTAINERID=container_id, CNI_IFNAME=ifname, CNI_PATH=path, CNI_NETNS=None)
        assert caller.call(Request(env, config(name=network)), []) == Reply(0, b"")


@pytest.mark.timeout(SECONDS)
def test_over_the_socket(node: Machine, tmp_path: Path) -> None:
    """Mutated requests have a valid answer or none, and leave nothing: no row, device, descriptor or memory."""
    assert node.agent is not None
    agent, files, number = node.agent.pid, held(node), counted(node)
    with ExitStack() as stack:
        odd = odd_descriptors(node, tmp_path, stack)
        callers = [Caller(node, each, node.add_netns(f"mutant{each}"), odd) for each in range(WORKERS)]
        for caller in callers:
            stack.callback(caller.close)
        workers = stack.enter_context(ThreadPoolExecutor(WORKERS))
        share = OVER_THE_SOCKET // WORKERS
        list(workers.map(lambda caller: caller.work(range(share // 4)), callers))
        warm = resident(agent)
        list(workers.map(lambda caller: caller.work(range(share // 4, share)), callers))
        grown = resident(agent) - warm
        delete_rows(node, callers[0])
        answers = sum((caller.answers for caller in callers), Counter[str]())
    print(dict(answers), f"{grown=}")
    assert node.agent.poll() is None
    assert not any(node.traces().values())
    assert_closed(node, files, number)
    assert node.get("/readyz")[0] == 200
    assert grown < GROWTH
    assert min(answers[kind] for kind in ("refused", "odd 1", "ADD 0", "ADD 1", "DEL 0", "CHECK 0")) > 0, answers


@pytest.mark.parametrize("size", [ENV_LIMIT - 4096, ENV_LIMIT])
def test_huge_environment(node: Machine, size: int) -> None:
    """An environment as large as the wire allows is taken; one byte more is refused, and none of it stays in memory."""
    assert node.agent is not None
    netns = node.add_netns("huge")
    caller = Caller(node, 0, netns, [])
    env = environment("DEL", CNI_PATH=str(node.directory / "bin"), CNI_NETNS=None)
    used = len(wire.encode(Request(env, b""))) - HEADER.size
    whole = Request({**env, "X": "x" * (size - used - 3)}, config())
    before = resident(node.agent.pid)
    for _ in range(8):
        assert caller.call(whole, []) == Reply(0, b"")
    larger = HEADER.pack(wire.MAGIC, ENV_LIMIT + 1, 0, 0)
    assert caller.exchange(larger, []) is None
    assert resident(node.agent.pid) - before < 4 * ENV_LIMIT
    caller.close()


PLACES = (
    "/dev/zero",
    "/dev/full",
    "/proc/self/ns/mnt",
    "/proc/self/ns/net",
    "/",
    "/run/netns/none",
    "{fifo}",
    "{socket}",
)


@pytest.mark.timeout(SECONDS)
def test_by_launcher(node: Machine, tmp_path: Path) -> None:
    """The launcher prints one valid JSON document whatever its environment, stdin and stdout, and spools no DEL."""
    netns, fifo = node.add_netns("launched"), tmp_path / "fifo"
    os.mkfifo(fifo)
    socket_path = node.directory / "cni.sock"
    mutator = Mutator(WORKERS, path=str(node.directory / "bin"), netns=str(netns.path))
    fixed = {"PODLANE_SOCKET": str(socket_path), "PODLANE_SPOOL": str(node.directory / "spool")}
    for number in range(BY_LAUNCHER):
        rng = random.Random(number)
        request = mutator.request(number)
        env = dict(request.env)
        if rng.random() < 0.1:
            env["CNI_NETNS"] = rng.choice(PLACES).format(fifo=fifo, socket=socket_path)
        launch(rng, Request(env, request.stdin), fixed)
    caller = Caller(node, 0, netns, [])
    delete_rows(node, caller)
    caller.close()
    assert not any(node.traces().values())


def launch(rng: random.Random, request: Request, fixed: dict[str, str]) -> None:
    """Run the launcher as a runtime does, or with a stdin or stdout that none would give it; judge what it prints."""
    variables = {**environment_of(request.env), **environment_of(fixed)}
    if rng.random() < 0.05:
        with open("/dev/full", "wb") as full:  # noqa: PTH123
            assert subprocess.run([LAUNCHER], env=variables, input=request.stdin, stdout=full).returncode in (0, 1)
        return
    options: dict[str, object] = {"input": request.stdin}
    if rng.random() < 0.05:
        options = {"stdin": os.open(rng.choice(("/", "/dev/null", "/dev/zero")), os.O_RDONLY)}
    done = subprocess.run([LAUNCHER], env=variables, capture_output=True, timeout=90, **options)  # type: ignore[call-overload]
    if "stdin" in options:
        os.close(options["stdin"])  # type: ignore[arg-type]
    command = request.env.get("CNI_COMMAND", "")
    reply = Reply(done.returncode, done.stdout)
    if command == "VERSION":
        assert json.loads(reply.stdout)["supportedVersions"]
    elif command or reply.exit_code:
        assert_valid(request, reply)
    else:
        assert reply.stdout == b""

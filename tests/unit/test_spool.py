"""The spool directory: real files, as the launcher leaves them."""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.spool import Spool
from cni import wire

OK = wire.Reply(0, b"")
FAILED = wire.Reply(1, b'{"code": 102, "msg": "no"}')


class Agent:
    """Serves DELs, records their container ids, and fails for those that a test names."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.failing: set[str] = set()

    def handle(self, request: wire.Request) -> wire.Reply:
        """Serve one DEL."""
        container = request.env["CNI_CONTAINERID"]
        self.seen.append(container)
        return FAILED if container in self.failing else OK


@pytest.fixture
def agent() -> Agent:
    """Give an agent."""
    return Agent()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Give an empty spool directory."""
    path = tmp_path / "spool"
    path.mkdir()
    return path


def leave(directory: Path, name: str, container: str) -> Path:
    """Leave a DEL as the launcher does."""
    path = directory / f"{name}.del"
    env = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": container, "CNI_IFNAME": "eth0", "ODD": "\udcff"}
    path.write_bytes(wire.encode(wire.Request(env, b'{"name": "n"}')))
    return path


def contents(directory: Path) -> list[str]:
    """Return what is in the directory."""
    return sorted(path.name for path in directory.iterdir())


def test_oldest_first(agent: Agent, directory: Path) -> None:
    """DELs are done in the order of their time stamps, and removed."""
    for name, container in (("00000000000000000003-1", "c"), ("00000000000000000001-9", "a"), ("2", "d")):
        leave(directory, name, container)
    Spool(directory, agent.handle).drain()
    assert agent.seen == ["a", "c", "d"]
    assert contents(directory) == []


def test_request_arrives_whole(directory: Path) -> None:
    """The handler gets what the launcher was given, without a network namespace."""
    leave(directory, "1", "a")
    received: list[wire.Request] = []

    def handle(request: wire.Request) -> wire.Reply:
        received.append(request)
        return OK

    Spool(directory, handle).drain()
    env = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "a", "CNI_IFNAME": "eth0", "ODD": "\udcff"}
    assert received == [wire.Request(env, b'{"name": "n"}', None)]


def test_no_directory(agent: Agent, tmp_path: Path) -> None:
    """Where no launcher has ever left anything there is nothing to do, and nothing is made."""
    Spool(tmp_path / "spool", agent.handle).drain()
    assert contents(tmp_path) == []


def test_failed_del_stays(agent: Agent, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A DEL that fails is tried again each time until it is done, logged once, and holds up no other."""
    spool = Spool(directory, agent.handle)
    first = leave(directory, "1", "a")
    leave(directory, "2", "b")
    agent.failing = {"a"}
    for _ in range(3):
        spool.drain()
    assert agent.seen == ["a", "b", "a", "a"]
    assert contents(directory) == ["1.del"]
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == [f"spooled DEL failed, and waits file={first} error={FAILED.stdout.decode()!r}"]
    agent.failing = set()
    spool.drain()
    assert contents(directory) == []


@pytest.mark.parametrize("content", [b"", b"PLN1", b"rubbish" * 100])
def test_unreadable_file_is_set_aside(
    agent: Agent, directory: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is no request is kept for people, named once, and not tried again."""
    (directory / "1.del").write_bytes(content)
    leave(directory, "2", "b")
    spool = Spool(directory, agent.handle)
    spool.drain()
    spool.drain()
    assert agent.seen == ["b"]
    assert contents(directory) == ["1.bad"]
    assert (directory / "1.bad").read_bytes() == content
    (error,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert str(directory / "1.del") in error


def test_unfinished_file_is_left_alone(agent: Agent, directory: Path) -> None:
    """What a launcher is still writing, or died over, is not a DEL."""
    leave(directory, "1", "a").rename(directory / ".1.del.tmp")
    Spool(directory, agent.handle).drain()
    assert agent.seen == []
    assert contents(directory) == [".1.del.tmp"]


def test_file_that_cannot_be_read(agent: Agent, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that the disk does not give is logged once, and holds up no other."""
    (directory / "1.del").mkdir()
    leave(directory, "2", "b")
    spool = Spool(directory, agent.handle)
    spool.drain()
    spool.drain()
    assert agent.seen == ["b"]
    assert contents(directory) == ["1.del"]
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1


def test_threads(agent: Agent, directory: Path) -> None:
    """Drained by several threads at once, every DEL is done once, and nobody minds that another was faster."""
    names = {f"{number:03}" for number in range(60)}
    for name in names:
        leave(directory, name, name)
    spool = Spool(directory, agent.handle)
    with ThreadPoolExecutor(4) as pool:
        for drained in [pool.submit(spool.drain) for _ in range(4)]:
            drained.result(30)
    assert sorted(agent.seen) == sorted(names)
    assert contents(directory) == []


def add(container: str, ifname: str = "eth0") -> wire.Request:
    """Return an ADD."""
    return wire.Request({"CNI_COMMAND": "ADD", "CNI_CONTAINERID": container, "CNI_IFNAME": ifname}, b"")


def test_add_waits_for_what_is_spooled_for_it(agent: Agent, directory: Path) -> None:
    """A DEL of the same container and interface is done before an ADD; others stay, and other calls do not look."""
    for name, container in (("1", "a"), ("2", "b")):
        leave(directory, name, container)
    spool = Spool(directory, agent.handle)
    for command in ("STATUS", "DEL"):
        spool.serve(wire.Request({"CNI_COMMAND": command, "CNI_CONTAINERID": "a", "CNI_IFNAME": "eth0"}, b""))
    spool.serve(add("a", "eth1"))
    assert (agent.seen, contents(directory)) == (["a", "a", "a"], ["1.del", "2.del"])
    agent.seen.clear()
    spool.serve(add("a"))
    assert (agent.seen, contents(directory)) == (["a", "a"], ["2.del"])


def test_add_during_its_del(directory: Path) -> None:
    """An ADD whose spooled DEL another thread is at waits for it, and the DEL is not done again after the ADD."""
    begun, may_end, seen = threading.Event(), threading.Event(), []

    def handle(request: wire.Request) -> wire.Reply:
        if request.env["CNI_COMMAND"] == "DEL":
            begun.set()
            assert may_end.wait(30)
        seen.append(request.env["CNI_COMMAND"])
        return OK

    leave(directory, "1", "a")
    spool = Spool(directory, handle)
    with ThreadPoolExecutor() as pool:
        drained = pool.submit(spool.drain)
        assert begun.wait(30)
        served = pool.submit(spool.serve, add("a"))
        pool.submit(spool.serve, add("b")).result(30)  # which waits for nobody
        may_end.set()
        drained.result(30)
        served.result(30)
    assert seen == ["ADD", "DEL", "ADD"]


def test_old_files_are_removed(agent: Agent, directory: Path) -> None:
    """What was set aside goes after a week, what a launcher left half done after an hour; a DEL that waits never."""
    ages = {"1.bad": 8 * 86400, "2.bad": 6 * 86400, ".3.del.tmp": 7200, ".4.del.tmp": 60, "5.del": 30 * 86400}
    agent.failing = {"a"}
    for name, age in ages.items():
        leave(directory, "new", "a").rename(directory / name)
        os.utime(directory / name, (time.time() - age,) * 2)
    Spool(directory, agent.handle).drain()
    assert contents(directory) == [".4.del.tmp", "2.bad", "5.del"]


def test_round_is_bounded(agent: Agent, directory: Path) -> None:
    """When a round's time is over no further DEL is begun; in the next one, what failed comes last."""
    for name in ("a", "b", "c"):
        leave(directory, name, name)
    agent.failing = {"a"}
    now = itertools.count(step=6)  # seconds that pass with every look
    spool = Spool(directory, agent.handle, lambda: next(now))
    spool.drain()
    assert agent.seen == ["a"]
    spool.drain()
    assert agent.seen == ["a", "b"]
    spool.drain()
    assert agent.seen == ["a", "b", "c"]
    spool.drain()
    assert agent.seen == ["a", "b", "c", "a"]

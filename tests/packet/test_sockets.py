"""Programs at calls on sockets, in a cgroup of the test's own: attached, found again, replaced and detached."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import cgroup
from agent.datapath.loader import Datapath, load
from agent.datapath.object import Object
from agent.datapath.sockets import CALLS, SocketHooks

pytestmark = pytest.mark.root


@pytest.fixture
def folder() -> Iterator[Path]:
    """Make a cgroup in which no process is."""
    top = cgroup.find()
    assert top is not None
    it = top / f"plt-{uuid.uuid4().hex[:8]}"
    it.mkdir()
    yield it
    if it.exists():
        it.rmdir()


def wanted(folder: Path) -> dict[str, int]:
    """Return what runs when all programs run there."""
    return dict.fromkeys(CALLS, cgroup.number(folder))


def test_attached_and_detached(datapath: Datapath, pins: Path, folder: Path) -> None:
    """All programs are accepted, are found by another agent, and go."""
    hooks = SocketHooks(datapath, pins, folder)
    assert hooks.read() == {}
    assert hooks.upsert(wanted(folder)) == {}
    assert SocketHooks(datapath, pins, None).read() == wanted(folder)
    assert hooks.delete([*CALLS, "connect4"]) == {}
    assert hooks.read() == {}


def test_another_version_is_replaced(datapath: Datapath, datapath_object: Object, pins: Path, folder: Path) -> None:
    """Programs of another datapath are told from today's, and replaced where they are."""
    hooks = SocketHooks(datapath, pins, folder)
    hooks.upsert(wanted(folder))
    with load(datapath_object, pins.parent / "later", {}) as later:
        new = SocketHooks(later, pins, folder)
        assert new.read() == dict.fromkeys(CALLS, 0)
        assert new.upsert(wanted(folder)) == {}
        assert new.read() == wanted(folder)
        assert hooks.read() == dict.fromkeys(CALLS, 0)


def test_the_cgroup_is_another(datapath: Datapath, pins: Path, folder: Path) -> None:
    """What ran in a cgroup that is gone, or not the one that is meant, runs where it should."""
    SocketHooks(datapath, pins, folder).upsert(wanted(folder))
    other = folder.with_name(f"{folder.name}-2")
    other.mkdir()
    try:
        hooks = SocketHooks(datapath, pins, other)
        assert hooks.upsert({"connect4": cgroup.number(other)}) == {}
        folder.rmdir()
        found = hooks.read()
        assert [call for call in CALLS if found[call] == cgroup.number(other)] == ["connect4"]
        assert hooks.upsert(wanted(other)) == {}
        assert hooks.read() == wanted(other)
    finally:
        other.rmdir()


def test_no_cgroup(datapath: Datapath, pins: Path) -> None:
    """A failure names the call and the cgroup."""
    failed = SocketHooks(datapath, pins, Path("/nowhere")).upsert({"connect6": 7})
    assert "connect6 at the sockets of /nowhere" in str(failed["connect6"])

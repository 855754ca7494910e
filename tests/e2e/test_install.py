"""What a starting agent puts where a container runtime looks, and when."""

from __future__ import annotations

import ctypes
import json
import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.machine import LAUNCHER, START_SECONDS, Machine, Netns, machine

pytestmark = pytest.mark.root

# sys/inotify.h
_MODIFY, _CLOSE_WRITE, _MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x2, 0x8, 0x40, 0x80, 0x100, 0x200
_EVENT = struct.Struct("=iIII")  # struct inotify_event: watch, mask, cookie, length of the name

_LAUNCHER, _CONFLIST = "podlane", "10-podlane.conflist"


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Machine]:
    """Make a node with an uplink and no agent yet."""
    with machine(tmp_path) as node:
        node.add_uplink()
        yield node


class Watch:
    """Sees all that happens to the files of some directories, in order (inotify(7))."""

    def __init__(self, *directories: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_CLOEXEC)
        mask = _MODIFY | _CLOSE_WRITE | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE
        for directory in directories:
            assert libc.inotify_add_watch(self._descriptor, bytes(directory), mask) > 0

    def events_to(self, last: str) -> list[tuple[int, str]]:
        """Wait until something has moved to this name; return all events so far as (mask, name)."""
        events: list[tuple[int, str]] = []
        while (_MOVED_TO, last) not in events:
            assert select.select([self._descriptor], [], [], START_SECONDS)[0], f"no {last} after {events}"
            data = os.read(self._descriptor, 1 << 16)
            while data:
                _, mask, _, length = _EVENT.unpack_from(data)
                name, data = data[_EVENT.size : _EVENT.size + length], data[_EVENT.size + length :]
                events.append((mask, name.rstrip(b"\0").decode()))
        return events

    def close(self) -> None:
        """Stop watching."""
        os.close(self._descriptor)


@pytest.fixture
def watch(node: Machine) -> Iterator[Watch]:
    """Watch the directories of configurations and plugins."""
    watch = Watch(node.directory / "conf", node.directory / "bin")
    yield watch
    watch.close()


def test_conflist_comes_last_and_whole(node: Machine, watch: Watch) -> None:
    """2.2: launcher, then conflist appear by one rename each, within their directory, from names that no runtime loads.

    From that moment on a pod can be added.
    """
    node.start_agent(wait=False)
    events = watch.events_to(_CONFLIST)
    pod = Netns("early")
    try:
        outcome = node.cni("ADD", container_id=pod.name, netns=str(pod.path))
        assert outcome.exit_code == 0, outcome
    finally:
        pod.delete()
    assert [event for event in events if event[1] in (_LAUNCHER, _CONFLIST)] == [
        (_MOVED_TO, _LAUNCHER),
        (_MOVED_TO, _CONFLIST),
    ]
    drafts = [name for mask, name in events if mask == _MOVED_FROM]
    assert len(drafts) == 2
    assert [name for name in drafts if name.endswith((".conf", ".conflist", ".json"))] == []


def test_files_are_as_the_runtime_needs_them(node: Machine) -> None:
    """2.1: the launcher is whole and executable; the conflist is of a version that any libcni reads, and names more."""
    node.start_agent()
    assert [path.name for path in (node.directory / "bin").iterdir()] == [_LAUNCHER]
    assert [path.name for path in (node.directory / "conf").iterdir()] == [_CONFLIST]
    launcher, conflist = node.directory / "bin" / _LAUNCHER, node.directory / "conf" / _CONFLIST
    assert launcher.read_bytes() == LAUNCHER.read_bytes()
    assert (launcher.stat().st_mode & 0o777, conflist.stat().st_mode & 0o777) == (0o755, 0o644)
    content = json.loads(conflist.read_text())
    assert [plugin["type"] for plugin in content["plugins"]] == [_LAUNCHER]
    assert (content["cniVersion"], content["cniVersions"]) == ("1.0.0", ["0.3.1", "0.4.0", "1.0.0", "1.1.0"])
    assert "disableCheck" not in content


def test_restart_does_not_touch_them(node: Machine, watch: Watch) -> None:
    """2.2: an agent leaves its files alone when it stops, and when it finds them in place at its start.

    Without them a runtime could not even delete pods, and it reloads them for nothing.
    """
    node.start_agent()
    node.stop_agent()
    watch.events_to(_CONFLIST)
    node.start_agent()
    witness = node.directory / "witness"
    witness.touch()
    witness.rename(node.directory / "conf" / witness.name)
    assert watch.events_to(witness.name) == [(_MOVED_TO, witness.name)]

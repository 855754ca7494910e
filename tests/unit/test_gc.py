"""The periodic self-GC: what counts as gone, for how long, and what happens when a release fails."""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from agent.gc import Reason, SelfGc, netns_at, reason_to_release
from agent.store import Netns, Phase, Pod, Store
from cni.call import Attachment
from cni.errors import CniError, Code
from tests.unit.stores import attachment, open_store

GRACE = 60.0


class Releaser:
    """Implements `agent.gc.Releaser` over a store, as the node does; it refuses when told to."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.refusal = ""
        self.tried: list[Attachment] = []
        self.turns: list[Attachment] = []
        self.at_work: list[Attachment] = []
        self.seconds = 0.0  # that a release takes
        self.now = 1000.0

    @contextmanager
    def turn(self, attachment: Attachment) -> Iterator[None]:
        """Take note."""
        self.turns.append(attachment)
        yield

    def is_at_work(self, attachment: Attachment) -> bool:
        """Say what the test has set."""
        return attachment in self.at_work

    def release(self, attachment: Attachment) -> None:
        """Release, or refuse."""
        self.tried.append(attachment)
        self.now += self.seconds
        self.store.begin_release(attachment)
        if self.refusal:
            raise CniError(Code.INTERNAL, self.refusal)
        self.store.remove(attachment)


class Scene:
    """A self-GC with a clock of its own, over a real store."""

    def __init__(self, directory: Path) -> None:
        self.store = open_store(directory / "ipam.db")
        self.node = Releaser(self.store)
        self.counted: list[Reason] = []
        self.gc = SelfGc(
            store=self.store,
            node=self.node,
            grace_seconds=GRACE,
            released=self.counted.append,
            clock=lambda: self.node.now,
        )

    def add(self, name: str, path: str, phase: Phase = Phase.ACTIVE) -> Attachment:
        """Make a pod whose device there is not."""
        it = attachment(name)
        netns = Netns(path, "4:1")
        self.store.reserve(it, device=f"pl-{name}", mac="02:00:00:00:00:01", mtu=1500, netns=netns)
        if phase is not Phase.RESERVED:
            self.store.activate(it)
        if phase is Phase.RELEASING:
            self.store.begin_release(it)
        return it

    def round(self, after: float = 0.0) -> list[Attachment]:
        """Let time pass, collect, and return what is left."""
        self.node.now += after
        self.gc.collect()
        return [pod.attachment for pod in self.store.pods()]


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Yield a scene without pods."""
    it = Scene(tmp_path)
    yield it
    it.store.close()


POD = Pod(attachment("x"), "pl-x", "", 1500, Netns("/run/netns/x", "4:1"), (), Phase.ACTIVE, "boot")


@pytest.mark.parametrize(
    ("phase", "device_exists", "there", "reason"),
    [
        (Phase.ACTIVE, False, "", Reason.NETNS_MISSING),
        (Phase.ACTIVE, False, "4:2", Reason.NETNS_REPLACED),
        (Phase.ACTIVE, False, "4:1", None),  # the loop makes the device again
        (Phase.ACTIVE, False, None, None),
        (Phase.ACTIVE, True, "", None),  # the agent cannot see the runtime's paths
        (Phase.ACTIVE, True, "4:2", None),
        (Phase.RESERVED, False, "", Reason.DELETE_FAILED),
        (Phase.RESERVED, True, "4:1", Reason.DELETE_FAILED),
        (Phase.IMPORTED, False, "", None),
        (Phase.RELEASING, True, "4:1", Reason.DELETE_FAILED),
        (Phase.RELEASING, False, None, Reason.DELETE_FAILED),
    ],
)
def test_reason(phase: Phase, device_exists: bool, there: str | None, reason: Reason | None) -> None:
    """A pod counts as gone only if device and namespace say so, both; a DEL that failed is to be finished."""
    assert reason_to_release(replace(POD, phase=phase), device_exists, there) is reason


def test_what_is_at_a_path(tmp_path: Path) -> None:
    """Nothing, a plain file, a FIFO and another kind of namespace are no network namespace."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    paths = [tmp_path / "nothing", tmp_path / "file", tmp_path / "file" / "below", tmp_path / "fifo", tmp_path]
    assert [netns_at(Netns(str(path), "4:1")) for path in (*paths, "/proc/self/ns/uts", "")] == [""] * 7


def test_a_path_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    """An error other than that there is nothing leaves the question open."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert netns_at(Netns(str(tmp_path / "loop"), "4:1")) is None


def test_grace_period(scene: Scene) -> None:
    """A pod that is gone is released when it has been so for the grace period, and counted by reason."""
    it = scene.add("a", "/there/is/no/such")
    assert scene.round() == [it]
    assert scene.round(GRACE - 1) == [it]
    assert scene.round(1) == []
    assert scene.round(GRACE) == []
    assert (scene.counted, scene.node.turns) == ([Reason.NETNS_MISSING], [it])


def test_each_pod_has_its_own_grace_period(scene: Scene) -> None:
    """A pod that goes later is released later."""
    scene.add("a", "/there/is/no/such")
    scene.round()
    second = scene.add("b", "/there/is/no/such")
    assert scene.round(GRACE) == [second]
    assert scene.round(GRACE) == []


def test_a_pod_that_comes_back_begins_anew(scene: Scene, tmp_path: Path) -> None:
    """A namespace that is there again, if nobody can tell which, ends the grace period."""
    path = tmp_path / "netns"
    it = scene.add("a", str(path))
    scene.round()
    path.symlink_to(path)  # unreadable
    assert scene.round(GRACE) == [it]
    path.unlink()
    assert scene.round() == [it]
    assert scene.round(GRACE - 1) == [it]
    assert scene.round(1) == []


def test_deleted_meanwhile(scene: Scene) -> None:
    """What a DEL has released in between is not released again, and a new attachment of that name is left alone."""
    it = scene.add("a", "/there/is/no/such")
    scene.round()
    scene.store.remove(it)
    assert scene.round(GRACE) == []
    assert scene.node.tried == []


def test_decided_again_within_its_turn(scene: Scene, tmp_path: Path) -> None:
    """A call that has its turn just before may have replaced the attachment: it is looked at again."""
    it = scene.add("a", "/there/is/no/such")
    scene.round()
    turn = scene.node.turn

    @contextmanager
    def busy(attachment: Attachment) -> Iterator[None]:
        with turn(attachment):
            scene.store.remove(it)
            (tmp_path / "loop").symlink_to(tmp_path / "loop")
            scene.add("a", str(tmp_path / "loop"))  # of which nobody can tell that it is gone
            yield

    scene.node.turn = busy  # type: ignore[method-assign]
    assert scene.round(GRACE) == [it]
    assert (scene.node.tried, scene.counted) == ([], [])


def test_failed_release_is_tried_again_and_told_once(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """A release that fails is tried after every grace period; the same reason is logged once, another one again."""
    it = scene.add("a", "/there/is/no/such")
    scene.node.refusal = "dhcp is away"
    scene.round()
    with caplog.at_level(logging.INFO):
        for refusal in ("dhcp is away", "dhcp is away", "disk full", "disk full"):
            scene.node.refusal = refusal
            assert scene.round(GRACE) == [it]
            assert scene.round(1) == [it]
        assert len(scene.node.tried) == 4
        assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
        scene.node.refusal = ""
        assert scene.round(GRACE) == []
    assert scene.counted == [Reason.DELETE_FAILED]  # what has begun to go is to be finished


def test_unfinished_delete_is_finished(scene: Scene) -> None:
    """An attachment that a DEL could not release is released later, whatever there is of it."""
    it = scene.add("a", "/proc/self/ns/net", phase=Phase.RELEASING)
    assert scene.round() == [it]
    assert scene.round(GRACE) == []
    assert scene.counted == [Reason.DELETE_FAILED]


def test_add_that_nobody_finishes(scene: Scene) -> None:
    """An ADD that ended without an undo is undone after the grace period; one that is still at work is left alone."""
    it = scene.add("a", "/proc/self/ns/net", phase=Phase.RESERVED)
    scene.node.at_work = [it]
    assert scene.round() == [it]
    assert scene.round(GRACE) == [it]
    scene.node.at_work = []
    assert scene.round() == [it]
    assert scene.round(GRACE) == []
    assert (scene.node.tried, scene.counted) == ([it], [Reason.DELETE_FAILED])


def test_one_that_fails_does_not_keep_the_others(scene: Scene) -> None:
    """Every gone pod has its try in a round."""
    scene.add("a", "/there/is/no/such")
    scene.add("b", "/there/is/no/such")
    scene.node.refusal = "dhcp is away"
    scene.round()
    scene.round(GRACE)
    assert len(scene.node.tried) == 2


def test_a_round_ends(scene: Scene) -> None:
    """A release that takes long ends the round; the next one begins with the pods that had no turn."""
    for name in "abc":
        scene.add(name, "/there/is/no/such")
    scene.node.refusal = "dhcp is away"
    scene.node.seconds = 30.0
    scene.round()
    scene.round(GRACE)
    scene.round()
    assert scene.node.tried == [attachment("a"), attachment("b")]
    scene.node.refusal, scene.node.seconds = "", 0.0
    assert scene.round() == [attachment("a"), attachment("b")]
    assert scene.round(GRACE) == []


def test_store_in_trouble(scene: Scene, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A store that cannot be read ends the round, and is told once."""
    with sqlite3.connect(tmp_path / "ipam.db") as db:
        db.execute("DROP TABLE address")
    scene.gc.collect()
    scene.gc.collect()
    assert len(caplog.records) == 1

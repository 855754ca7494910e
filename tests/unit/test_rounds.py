"""A loop that hangs is missed, and one that only waits, or fails, is not."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest

from agent.rounds import Rounds
from agent.state import KernelError
from tests.unit.memory import World

PATIENCE = 0.1  # seconds
MISSED = "the loop has not come round for more than 0.1 s"


def test_a_pass_that_does_not_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Who asks is told as long as it lasts; the log has where the loop stands, once."""
    world = World(tmp_path, patience_seconds=PATIENCE)
    is_held, may_go = threading.Event(), threading.Event()

    def stand_still() -> None:
        is_held.set()
        may_go.wait()

    with world.running(), caplog.at_level(logging.INFO):
        world.table("routes").before_read = stand_still
        try:
            world.wait_until(is_held.is_set)
            world.wait_until(lambda: world.loop.hung() == MISSED)
            assert world.loop.hung() == MISSED
        finally:
            may_go.set()
        world.wait_until(lambda: not world.loop.hung())
    told = [record.message for record in caplog.records if record.name == "agent.rounds"]
    assert [each.split(" where")[0] for each in told[:2]] == [
        "the loop does not come round",
        "the loop comes round again",
    ]
    assert "< stand_still (" in told[0]


def fail() -> NoReturn:
    """Fail as a kernel may for as long as it likes."""
    raise KernelError("list: ENOBUFS")


def test_passes_that_fail(tmp_path: Path) -> None:
    """A loop none of whose passes succeeds comes round."""
    world = World(tmp_path, patience_seconds=PATIENCE)
    with world.running():
        world.table("routes").before_read = fail
        world.wait_until(lambda: "ENOBUFS" in world.loop.trouble())
        time.sleep(2 * PATIENCE)
        world.wait_until(lambda: not world.loop.hung())
        assert "ENOBUFS" in world.loop.trouble()


def test_nothing_to_do(tmp_path: Path) -> None:
    """A loop that waits for an hour comes round meanwhile."""
    world = World(tmp_path, resync_seconds=3600, patience_seconds=PATIENCE)
    world.to_settle = 1
    with world.running():
        world.wait_until(lambda: ("settle", "hooks") in world.journal)
        time.sleep(2 * PATIENCE)
        world.wait_until(lambda: not world.loop.hung())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_has_ended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A thread that is gone is missed as one that hangs."""
    world = World(tmp_path, patience_seconds=PATIENCE)

    def end() -> NoReturn:
        raise SystemExit

    with world.running():
        world.table("routes").before_read = end
        world.wait_until(lambda: world.loop.hung() == MISSED)
    assert "where='it has ended'" in caplog.text


def test_not_begun() -> None:
    """Nobody is missed who has not come round for the first time."""
    assert Rounds(0).missed() == ""


def test_a_node_that_was_suspended() -> None:
    """The clock is one that stands still while the system does."""
    assert time.get_clock_info("monotonic").implementation == "clock_gettime(CLOCK_MONOTONIC)"

"""What holds for all tests: which layer needs root, and that no layer is skipped unnoticed."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT_LAYERS = {"packet", "node", "e2e"}
REAL_DEVICES = {"node", "e2e"}
NO_SECOND_TRY = 6
"""Exit status when a test has failed that needs no real devices: that is no accident (see the Makefile)."""


class LayerCounter:
    """Counts, by layer, the tests that ran and those that were skipped; knows if one failed by no accident."""

    def __init__(self) -> None:
        self._ran: dict[str, int] = defaultdict(int)
        self._skipped: dict[str, int] = defaultdict(int)
        self._no_accident = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count one test: it is skipped in its set-up or its call, and has run if its call was not skipped."""
        layer = _layer(TESTS.parent / report.fspath)
        self._no_accident |= report.failed and layer not in REAL_DEVICES
        if report.skipped:
            self._skipped[layer] += 1
        elif report.when == "call":
            self._ran[layer] += 1

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a CI run in which a layer has tests, and none of them ran; tell what may be tried again."""
        if self._no_accident:
            session.exitstatus = NO_SECOND_TRY
        lost = sorted(layer for layer in self._skipped if not self._ran[layer])
        if lost and os.environ.get("CI"):
            print(f"\nevery test was skipped in: {', '.join(lost)}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Return a directory with a short name, for the names of unix sockets are limited to 107 bytes (unix(7))."""
    with tempfile.TemporaryDirectory(prefix="plt-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def pytest_configure(config: pytest.Config) -> None:
    """Count where the results come together."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(LayerCounter())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs root for anybody else."""
    if os.geteuid() == 0:
        return
    for item in items:
        if _layer(item.path) in ROOT_LAYERS or item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root: it makes namespaces and loads BPF programs"))


def _layer(path: Path) -> str:
    return path.relative_to(TESTS).parts[0]

"""Fixtures of the node tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.machine import Machine, machine


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Machine]:
    """Yield a node with an uplink and a ready agent."""
    with machine(tmp_path) as it:
        it.add_uplink()
        it.start_agent()
        yield it

"""The same configuration given to a reference plugin and to podlane: what can be observed is the same, or is known."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.node.reference.asking import Listeners
from tests.node.reference.case import Case, compare
from tests.node.reference.sides import PLUGINS, Podlane, Reference
from tests.node.reference.table import CASES, known

Sides = tuple[Reference, Podlane]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    """Make the two nodes that all cases share."""
    if not (PLUGINS / "bridge").exists():
        pytest.skip("the reference plugins (containernetworking-plugins) are absent")
    directory = tmp_path_factory.mktemp("sides")
    with ExitStack() as stack:
        listeners = stack.enter_context(Listeners())
        yield Reference(directory / "r", stack, listeners), Podlane(directory / "p", stack, listeners)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.rule} {case.name}".strip())
def test_differs_as_known(sides: Sides, case: Case) -> None:
    """What one plugin does otherwise than the other is what is known of this case, no more and no less."""
    with ThreadPoolExecutor() as pool:
        reference, podlane = pool.map(case.observe, sides)
    assert compare(reference, podlane) == {what: pair for (name, what), pair in known().items() if name == case.name}

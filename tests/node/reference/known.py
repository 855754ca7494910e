"""How known differences are written down: which observations of which cases show them."""

from __future__ import annotations

from collections.abc import Iterable

from tests.node.reference.case import Pair

DEFECT = "a defect of the reference"

Where = dict[tuple[str, str], Pair]


def where(observation: str, reference: object, podlane: object, *cases: str) -> Where:
    """Return one difference that several cases show."""
    return dict.fromkeys(((case, observation) for case in cases), (reference, podlane))


def served(observation: str, *cases: str) -> Where:
    """Return that podlane serves a call, and the reference does not."""
    return where(observation, "refused", "served", *cases)


def refused(observation: str, *cases: str) -> Where:
    """Return that podlane refuses a call, and the reference serves it."""
    return where(observation, "served", "refused", *cases)


def codes(code: int, observation: str, cases: Iterable[str]) -> Where:
    """Return that podlane's error has a code of its own, and the reference's has not."""
    return where(f"{observation}: code", 999, code, *cases)

"""The README's table: what the comparisons say, for whoever thinks of changing the plugin."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from tests.node.reference.case import Case, Difference
from tests.node.reference.cases_calls import CALLS
from tests.node.reference.cases_ipam import IPAM_CASES
from tests.node.reference.cases_keys import KEYS
from tests.node.reference.differences_calls import CALLS_DIFFER
from tests.node.reference.differences_keys import KEYS_DIFFER

CASES: tuple[Case, ...] = (*KEYS, *IPAM_CASES, *CALLS)
DIFFERENCES: tuple[Difference, ...] = (*KEYS_DIFFER, *CALLS_DIFFER)
"""The comparison fails for a difference that is not here, and for one here that is not there."""
README = Path(__file__).resolve().parents[3] / "README.md"
BEGIN = "<!-- written by: python -m tests.node.reference -->"
END = "<!-- until here -->"
_WIDTH = 120  # of the README's lines
_COLUMNS = ("key, or what happens", "`bridge`, `ptp`", "podlane", "why")


def known() -> dict[tuple[str, str], object]:
    """Return all known differences by case and observation. Raises ValueError if one is there twice."""
    merged: dict[tuple[str, str], object] = {}
    for each in DIFFERENCES:
        if twice := merged.keys() & each.seen.keys():
            raise ValueError(f"known twice: {twice}")
        merged |= each.seen
    return merged


def rendered(cases: Sequence[Case] = CASES, differences: Sequence[Difference] = DIFFERENCES) -> str:
    """Return what stands between the markers."""
    keys = list(dict.fromkeys(each.key for each in cases))
    differing = {each.key for each in differences}
    same = ", ".join(key for key in keys if key not in differing)
    head = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    rows = [f"| {each.key} | {each.reference} | {each.podlane} | {each.why} |" for each in differences]
    text = (
        f"{len(cases)} configurations and calls, with `ipam.type` unchanged or podlane's own in place of host-local,"
        f" were given to both. Only what the table says differs, so nothing in: {same}."
    )
    return "\n".join([*textwrap.wrap(text, _WIDTH, break_on_hyphens=False, break_long_words=False), "", *head, *rows])


def replaced(readme: str) -> str:
    """Return a README with the table in its place. Raises ValueError if the markers are not there."""
    before, begin, rest = readme.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"\n{END}")
    if not begin or not end:
        raise ValueError(f"{BEGIN} and {END} are not in the README")
    return f"{before}{begin}{rendered()}{end}{after}"

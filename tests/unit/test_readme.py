"""The README says what the comparison with the reference plugins says."""

from __future__ import annotations

from collections import Counter

from tests.node.reference.table import CASES, README, known, replaced


def test_table_is_up_to_date() -> None:
    """The table of the README is the one of the comparisons; `python -m tests.node.reference` writes it."""
    text = README.read_text()
    assert text == replaced(text)


def test_cases_have_names_of_their_own() -> None:
    """No two cases have one name, since the known differences go by it."""
    assert [name for name, count in Counter(each.name for each in CASES).items() if count > 1] == []


def test_differences_are_of_cases() -> None:
    """Every known difference is of a case that is played, so that it cannot outlive it."""
    assert {name for name, _ in known()} <= {each.name for each in CASES}

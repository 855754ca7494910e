"""The difference of two tables."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.diff import diff

tables = st.dictionaries(st.integers(0, 9), st.integers(0, 2))


def test_example() -> None:
    """What is missing or different is created or replaced, what is too much goes, what is right stays."""
    delta = diff({"new": 1, "changed": 1, "right": 1}, {"changed": 2, "right": 1, "stale": 1})
    assert delta.upsert == {"new": 1, "changed": 1}
    assert delta.delete == {"stale"}
    assert len(delta) == 3


@given(tables, tables)
def test_applied_it_turns_actual_into_desired(desired: dict[int, int], actual: dict[int, int]) -> None:
    """Upserts and deletes, in either order, lead from the actual table to the desired one."""
    delta = diff(desired, actual)
    assert {key: value for key, value in {**actual, **delta.upsert}.items() if key not in delta.delete} == desired
    assert {key: value for key, value in actual.items() if key not in delta.delete} | dict(delta.upsert) == desired


@given(tables, tables)
def test_it_is_minimal(desired: dict[int, int], actual: dict[int, int]) -> None:
    """Nothing is done that need not be, and there is nothing to do exactly between equal tables."""
    delta = diff(desired, actual)
    assert all(actual.get(key) != value for key, value in delta.upsert.items())
    assert delta.delete <= actual.keys() - desired.keys()
    assert (len(delta) == 0) == (desired == actual)


@given(tables, tables)
def test_it_changes_nothing(desired: dict[int, int], actual: dict[int, int]) -> None:
    """Both tables are only read, and a later change of them does not change the delta."""
    before = dict(desired), dict(actual)
    delta = diff(desired, actual)
    assert (desired, actual) == before
    expected = dict(delta.upsert), set(delta.delete)
    desired.clear()
    actual.clear()
    assert (dict(delta.upsert), set(delta.delete)) == expected

"""Programs attached in two stages: which table has which hook when, and what happens on the way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.hooks import StagedHooks
from agent.state import Attached, Hook, KernelError
from tests.unit.memory import MemoryTable

A, B = Hook("pla", "ingress"), Hook("plb", "ingress")
ON_A, ON_B = Attached(1, "from_pod"), Attached(2, "from_pod")


class Kernel:
    """A quick and a lasting table, and the hooks that use them."""

    def __init__(self, *, first: str = "quick", final: str = "lasting") -> None:
        self.journal: list[tuple[str, str]] = []
        self.quick = MemoryTable[Hook, Attached]("quick", self.journal)
        self.lasting = MemoryTable[Hook, Attached]("lasting", self.journal)
        tables = {"quick": self.quick, "lasting": self.lasting}
        other = next(name for name in tables if name != final)
        self.hooks = StagedHooks(first=tables[first], final=tables[final], other=tables[other], patient=["patient"])


def test_new_hook_is_quick_then_lasting() -> None:
    """A new hook goes to the quick table, and by settling to the lasting one: there first, and then from here."""
    kernel = Kernel()
    kernel.hooks.read()
    assert kernel.hooks.upsert({A: ON_A}) == {}
    assert (kernel.quick.objects, kernel.lasting.objects) == ({A: ON_A}, {})
    kernel.journal.clear()
    assert kernel.hooks.settle() is False
    assert (kernel.quick.objects, kernel.lasting.objects) == ({}, {A: ON_A})
    assert kernel.journal == [("upsert", "lasting"), ("delete", "quick")]
    assert kernel.hooks.settle() is False


def test_patient_program_is_lasting_at_once() -> None:
    """A program that nobody waits for goes straight to the lasting table, and there is nothing to settle."""
    kernel = Kernel()
    patient = Attached(1, "patient")
    assert kernel.hooks.upsert({A: patient}) == {}
    assert (kernel.quick.objects, kernel.lasting.objects) == ({}, {A: patient})
    assert kernel.hooks.settle() is False


def test_settling_is_one_hook_at_a_time() -> None:
    """Each call moves one hook, and says whether there are more."""
    kernel = Kernel()
    kernel.hooks.upsert({A: ON_A, B: ON_B})
    assert [kernel.hooks.settle() for _ in range(2)] == [True, False]
    assert kernel.lasting.objects == {A: ON_A, B: ON_B}


def test_replacement_stays_where_the_hook_is() -> None:
    """Another program for a hook replaces the first one in its own table."""
    kernel = Kernel()
    kernel.hooks.upsert({A: ON_A})
    kernel.hooks.settle()
    kernel.hooks.upsert({B: ON_B})
    newer = {A: Attached(1, "newer"), B: Attached(2, "newer")}
    assert kernel.hooks.upsert(newer) == {}
    assert (kernel.quick.objects, kernel.lasting.objects) == ({B: newer[B]}, {A: newer[A]})


@pytest.mark.parametrize("final", ["quick", "lasting"])
def test_change_of_configuration_moves_all(final: str) -> None:
    """What an earlier agent attached the other way is found, and moves."""
    kernel = Kernel(first=final, final=final)
    table, other = (kernel.quick, kernel.lasting) if final == "quick" else (kernel.lasting, kernel.quick)
    other.objects[A] = ON_A
    assert kernel.hooks.read() == {A: ON_A}
    assert kernel.hooks.settle() is False
    assert (table.objects, other.objects) == ({A: ON_A}, {})


def test_crash_between_the_two_steps_is_finished() -> None:
    """A hook that a killed agent left in both tables ends up in the lasting one."""
    kernel = Kernel()
    kernel.quick.objects[A] = kernel.lasting.objects[A] = ON_A
    assert kernel.hooks.read() == {A: ON_A}
    assert kernel.hooks.settle() is False
    assert (kernel.quick.objects, kernel.lasting.objects) == ({}, {A: ON_A})


def test_failures_are_told_and_change_nothing() -> None:
    """What the lasting table refuses stays in the quick one, in force, and can be tried again."""
    kernel = Kernel()
    kernel.hooks.upsert({A: ON_A})
    kernel.lasting.refused[A] = "busy"
    with pytest.raises(KernelError, match="busy"):
        kernel.hooks.settle()
    assert (kernel.quick.objects, kernel.lasting.objects) == ({A: ON_A}, {})
    del kernel.lasting.refused[A]
    assert kernel.hooks.settle() is False
    assert kernel.lasting.objects == {A: ON_A}


def test_what_cannot_leave_its_first_table_is_known_in_both() -> None:
    """A hook that has come to the lasting table, and cannot go from the quick one, goes from both with its device."""
    kernel = Kernel()
    kernel.hooks.upsert({A: ON_A})
    kernel.quick.refused[A] = "no such device"
    with pytest.raises(KernelError, match="no such device"):
        kernel.hooks.settle()
    kernel.quick.refused.clear()
    assert kernel.hooks.delete([A]) == {}
    assert (kernel.quick.objects, kernel.lasting.objects) == ({}, {})


@given(st.lists(st.sampled_from(["upsert A", "upsert B", "delete A", "delete B", "settle", "read"]), max_size=30))
def test_no_hook_is_lost_or_left(steps: list[str]) -> None:
    """Whatever the order of events, the two tables together hold exactly the hooks that should be there."""
    kernel = Kernel()
    expected: dict[Hook, Attached] = {}
    for step in steps:
        verb, _, name = step.partition(" ")
        hook, attached = (A, ON_A) if name == "A" else (B, ON_B)
        if verb == "upsert":
            expected[hook] = attached
            assert kernel.hooks.upsert({hook: attached}) == {}
        elif verb == "delete":
            expected.pop(hook, None)
            assert kernel.hooks.delete([hook]) == {}
        elif verb == "settle":
            kernel.hooks.settle()
        else:
            assert kernel.hooks.read() == expected
        assert kernel.quick.objects | kernel.lasting.objects == expected
        assert not kernel.quick.objects.keys() & kernel.lasting.objects.keys()

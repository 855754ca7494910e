"""What to change: the difference between two states of the kernel. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


_ABSENT: Any = object()


@dataclass(frozen=True, slots=True)
class Delta(Generic[K, V]):
    """The changes that turn one table into another."""

    upsert: Mapping[K, V]
    delete: frozenset[K]

    def __len__(self) -> int:
        return len(self.upsert) + len(self.delete)


def diff(desired: Mapping[K, V], actual: Mapping[K, V]) -> Delta[K, V]:
    """Return what must be created or replaced, and what must go, so that `actual` becomes `desired`."""
    if desired == actual:  # as a rule, and found out faster than the differences
        return Delta({}, frozenset())
    upsert, known = {}, 0
    for key, value in desired.items():
        present = actual.get(key, _ABSENT)
        known += present is not _ABSENT
        if present is not value and present != value:
            upsert[key] = value
    return Delta(upsert, frozenset(actual.keys() - desired.keys()) if known < len(actual) else frozenset())

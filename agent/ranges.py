"""Which address comes next: pure arithmetic on ranges.

The addresses of all ranges of one family form a ring. The next one given is the first free one after the last one
given, so an address is not reused before all others had their turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network

from agent.state import Address

Used = Callable[[Address, Address], Iterable[Address]]
"""Given the first and last address of an interval: those in use within it, in ascending order."""


@dataclass(frozen=True, slots=True)
class Range:
    """A run of addresses of one subnet, both ends included. Raises ValueError if they do not fit together."""

    subnet: IPv4Network | IPv6Network
    first: Address
    last: Address

    def __post_init__(self) -> None:
        for name, address in (("first", self.first), ("last", self.last)):
            if address not in self.subnet:
                raise ValueError(f"{name} address {address} is not in subnet {self.subnet}")
        if int(self.first) > int(self.last):
            raise ValueError(f"first address {self.first} is above last address {self.last}")

    @classmethod
    def of(cls, subnet: IPv4Network | IPv6Network) -> Range:
        """Return a subnet's usable addresses.

        These are all where there are only one or two, else all but the network and broadcast address of IPv4 (RFC 919)
        or the subnet-router anycast address of IPv6 (RFC 4291 section 2.6.1).
        """
        first, last = subnet[0], subnet[-1]
        if subnet.num_addresses > 2:
            first = subnet[1]
            if subnet.version == 4:
                last = subnet[-2]
        return cls(subnet=subnet, first=first, last=last)

    @property
    def size(self) -> int:
        """The number of addresses."""
        return int(self.last) - int(self.first) + 1

    def __contains__(self, address: Address) -> bool:
        return address.version == self.first.version and int(self.first) <= int(address) <= int(self.last)

    def __str__(self) -> str:
        return f"{self.subnet} ({self.first} to {self.last})"


def next_free(ranges: Sequence[Range], last_given: Address | None, used: Used) -> Address | None:
    """Return the first free address after the last one given, or None if all are in use.

    `ranges` are of one family and not empty. A last address outside all of them (the configuration has changed) counts
    as none: the search then starts at the first range.
    """
    for first, last in _ring(ranges, last_given):
        free = _first_gap(first, last, used(first, last))
        if free is not None:
            return free
    return None


def _ring(ranges: Sequence[Range], last_given: Address | None) -> Iterator[tuple[Address, Address]]:
    """Yield intervals that cover the ranges once, beginning after the last address given."""
    start = next((i for i, each in enumerate(ranges) if last_given is not None and last_given in each), None)
    if start is None or last_given is None:
        yield from ((each.first, each.last) for each in ranges)
        return
    current = ranges[start]
    if last_given != current.last:
        yield last_given + 1, current.last
    yield from ((each.first, each.last) for each in (*ranges[start + 1 :], *ranges[:start]))
    yield current.first, last_given


def _first_gap(first: Address, last: Address, used: Iterable[Address]) -> Address | None:
    candidate = first
    for address in used:
        if address != candidate:
            return candidate
        if address == last:
            return None
        candidate = candidate + 1
    return candidate

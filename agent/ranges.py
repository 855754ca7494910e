"""Which address comes next: pure arithmetic on ranges.

The addresses of a pool form a ring. The next one given is the first free one after the last one given, so an address
is not reused before all others had their turn.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv6Address
from typing import Protocol

from agent.state import Address, Network


class Addresses(Protocol):
    """Addresses in ascending order."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Address: ...


Used = Callable[[Address, Address], Addresses]
"""Given the first and last address of an interval: those in use within it."""

Span = tuple[Address, Address]
"""First and last address of an interval, both included."""


def fits_no_pod(address: Address) -> bool:
    """Say whether an address is of a kind that no pod can have.

    Nobody routes to those; and an IPv6 address that carries one of IPv4 would pass for it in the datapath's maps.
    """
    special = address.is_unspecified or address.is_loopback or address.is_multicast or address.is_link_local
    return special or (isinstance(address, IPv6Address) and address.ipv4_mapped is not None)


def is_within(network: Network, others: Iterable[Network]) -> bool:
    """Say whether all of a network is in one of the others."""
    return any(each.prefixlen <= network.prefixlen and network.network_address in each for each in others)


class RangeExhausted(Exception):
    """A pool has no free address; the message names its ranges."""


class AddressNotInRange(Exception):
    """A requested address cannot be given, whoever has it; the message says which, and what is allowed."""


@dataclass(frozen=True, slots=True)
class Range:
    """A run of addresses of one subnet, both ends included. Raises ValueError if they do not fit together."""

    subnet: Network
    first: Address
    last: Address

    def __post_init__(self) -> None:
        for name, address in (("first", self.first), ("last", self.last)):
            if address not in self.subnet:
                raise ValueError(f"{name} address {address} is not in subnet {self.subnet}")
        if int(self.first) > int(self.last):
            raise ValueError(f"first address {self.first} is above last address {self.last}")

    @classmethod
    def of(cls, subnet: Network) -> Range:
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

    def overlaps(self, other: Range) -> bool:
        """Say whether an address is in both."""
        return other.first in self or self.first in other

    def __str__(self) -> str:
        return f"{self.subnet} ({self.first} to {self.last})"


@dataclass(frozen=True)
class Pool:
    """Ranges of one family, of which an attachment gets one address: what host-local calls a range set.

    `name` keeps its place in the ring over restarts. `excluded` addresses, and the `gateways`, are never given;
    `reserved` ones only to those who ask for them by name.
    """

    name: str
    ranges: tuple[Range, ...]
    excluded: tuple[Network, ...] = ()
    reserved: tuple[Network, ...] = ()
    gateways: frozenset[Address] = frozenset()

    @property
    def family(self) -> int:
        """4 or 6."""
        return self.ranges[0].first.version

    def __contains__(self, address: Address) -> bool:
        return any(address in each for each in self.ranges)

    def __str__(self) -> str:
        """Return what host-local prints for a range set."""
        return ",".join(f"{each.first}-{each.last}" for each in self.ranges)

    @cached_property
    def withheld(self) -> list[Span]:
        """All that is not given without being asked for, in ascending order; intervals may overlap."""
        spans = [(each[0], each[-1]) for each in (*self.excluded, *self.reserved) if each.version == self.family]
        spans += [(each, each) for each in self.gateways if each.version == self.family]
        return sorted(spans, key=lambda span: int(span[0]))

    def gives(self, address: Address) -> bool:
        """Say whether the address may be given to somebody who does not ask for it."""
        return address in self and not any(int(first) <= int(address) <= int(last) for first, last in self.withheld)

    def check_request(self, address: Address) -> None:
        """Check that those who ask for this address of the pool may have it. Raises AddressNotInRange."""
        if address in self.gateways:
            raise AddressNotInRange(f"requested ip {address} is subnet's gateway")
        excluded = next((each for each in self.excluded if address in each), None)
        if excluded is not None:
            raise AddressNotInRange(f"requested IP address {address} is excluded (exclude: {excluded})")


def exhaustion(pool: Pool) -> str:
    """Say that a pool has no free address."""
    subnets = ", ".join(str(each.subnet) for each in pool.ranges)
    return f"no IP addresses available in range set: {pool} (all that may be given of {subnets} are in use)"


def match_requests(pools: Sequence[Pool], requested: Iterable[Address]) -> list[Address | None]:
    """Return which of the requested addresses each pool is to give, if any.

    As in host-local, a pool takes the first request that is in its ranges, and no second one. Raises AddressNotInRange
    for a request that no pool takes, or that its pool does not give.
    """
    pending = list(dict.fromkeys(requested))
    matches: list[Address | None] = []
    for index, pool in enumerate(pools):
        match = next((each for each in pending if each in pool), None)
        if match is not None:
            pending.remove(match)
            try:
                pool.check_request(match)
            except AddressNotInRange as error:
                raise AddressNotInRange(f"failed to allocate for range {index}: {error}") from error
        matches.append(match)
    if pending:
        allowed = "; ".join(map(str, pools)) or "none"
        raise AddressNotInRange(
            f"failed to allocate all requested IPs: {' '.join(map(str, pending))}"
            f" (allowed is one of each range set: {allowed})"
        )
    return matches


def next_free(
    ranges: Sequence[Range], last_given: Address | None, used: Used, withheld: Sequence[Span] = ()
) -> Address | None:
    """Return the first free address after the last one given, or None if all are in use.

    `ranges` are of one family and not empty; what is `withheld`, in ascending order, is passed over. A last address
    outside all ranges (the configuration has changed) counts as none: the search then starts at the first range.
    """
    for first, last in _ring(ranges, last_given):
        for low, high in _outside(first, last, withheld):
            free = _first_gap(low, high, used(low, high))
            if free is not None:
                return free
    return None


def _ring(ranges: Sequence[Range], last_given: Address | None) -> Iterator[Span]:
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


def _outside(first: Address, last: Address, withheld: Sequence[Span]) -> Iterator[Span]:
    """Yield what is left of an interval without what is withheld, in ascending order."""
    for low, high in withheld:
        if int(high) < int(first):
            continue
        if int(low) > int(last):
            break
        if int(low) > int(first):
            yield first, low - 1
        if int(high) >= int(last):
            return
        first = high + 1
    yield first, last


def _first_gap(first: Address, last: Address, used: Addresses) -> Address | None:
    """Return the first address of an interval that is not in use: before it, the n-th in use is the n-th of all."""
    gap = bisect_left(range(len(used)), True, key=lambda index: int(used[index]) != int(first) + index)
    return first + gap if int(first) + gap <= int(last) else None

"""Which address comes next: examples of every kind of subnet, and the ring of addresses against a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from agent.ranges import AddressNotInRange, Pool, Range, Used, match_requests, next_free
from agent.state import Address

Network = IPv4Network | IPv6Network
FAMILIES = {4: (32, ip_address("10.0.0.0")), 6: (128, ip_address("fd00::"))}


def usable(subnet: str) -> Range:
    """Return the subnet's usable addresses."""
    return Range.of(ip_network(subnet))


def between(subnet: str, first: str, last: str) -> Range:
    """Return a part of a subnet."""
    return Range(subnet=ip_network(subnet), first=ip_address(first), last=ip_address(last))


def in_use(addresses: Collection[Address]) -> Used:
    """Return what the store answers when these addresses are given."""
    return lambda first, last: sorted(
        each for each in addresses if each.version == first.version and int(first) <= int(each) <= int(last)
    )


def pool_of(
    ranges: Sequence[Range], exclude: Sequence[str] = (), reserved: Sequence[str] = (), gateway: str = ""
) -> Pool:
    """Return a pool of ranges."""
    return Pool(
        name="pool",
        ranges=tuple(ranges),
        excluded=tuple(ip_network(each) for each in exclude),
        reserved=tuple(ip_network(each) for each in reserved),
        gateways=frozenset({ip_address(gateway)} if gateway else ()),
    )


def members(ranges: Iterable[Range]) -> list[Address]:
    """Return all addresses of the ranges, in order."""
    return [each.first + offset for each in ranges for offset in range(each.size)]


@pytest.mark.parametrize(
    ("subnet", "first", "last", "size"),
    [
        ("10.0.0.0/24", "10.0.0.1", "10.0.0.254", 254),
        ("10.0.0.0/30", "10.0.0.1", "10.0.0.2", 2),
        ("10.0.0.0/31", "10.0.0.0", "10.0.0.1", 2),
        ("10.0.0.7/32", "10.0.0.7", "10.0.0.7", 1),
        ("0.0.0.0/0", "0.0.0.1", "255.255.255.254", 2**32 - 2),
        ("fd00::/64", "fd00::1", "fd00::ffff:ffff:ffff:ffff", 2**64 - 1),
        ("fd00::/126", "fd00::1", "fd00::3", 3),
        ("fd00::/127", "fd00::", "fd00::1", 2),
        ("fd00::7/128", "fd00::7", "fd00::7", 1),
    ],
)
def test_usable_addresses(subnet: str, first: str, last: str, size: int) -> None:
    """A subnet's special addresses are left out, but where a subnet has no others."""
    it = usable(subnet)
    assert (it.first, it.last, it.size) == (ip_address(first), ip_address(last), size)
    assert str(it) == f"{subnet} ({first} to {last})"


@pytest.mark.parametrize(
    ("subnet", "first", "last", "message"),
    [
        ("10.0.0.0/24", "10.0.1.0", "10.0.0.9", "first address 10.0.1.0 is not in subnet 10.0.0.0/24"),
        ("10.0.0.0/24", "10.0.0.9", "10.0.1.0", "last address 10.0.1.0 is not in subnet 10.0.0.0/24"),
        ("10.0.0.0/24", "fd00::1", "10.0.0.9", "first address fd00::1 is not in subnet 10.0.0.0/24"),
        ("10.0.0.0/24", "10.0.0.9", "10.0.0.8", "first address 10.0.0.9 is above last address 10.0.0.8"),
    ],
)
def test_impossible_ranges(subnet: str, first: str, last: str, message: str) -> None:
    """Ends that do not fit the subnet or each other are refused by name."""
    with pytest.raises(ValueError) as caught:
        between(subnet, first, last)
    assert str(caught.value) == message


def test_membership() -> None:
    """Both ends belong to a range, what is around it does not, nor does the other family's address of that number."""
    it = between("10.0.0.0/24", "10.0.0.5", "10.0.0.7")
    assert [last for last in range(10) if ip_address(f"10.0.0.{last}") in it] == [5, 6, 7]
    assert ip_address(int(it.first)) in it
    assert ip_address("::10.0.0.6") not in it


@pytest.mark.parametrize(
    ("last_given", "taken", "expected"),
    [
        (None, [], "10.0.0.5"),
        (None, ["10.0.0.5"], "10.0.0.6"),
        ("10.0.0.5", [], "10.0.0.6"),
        ("10.0.0.6", [], "10.0.1.1"),  # on to the second range
        ("10.0.1.2", [], "10.0.0.5"),  # and round
        ("10.0.1.1", ["10.0.1.2", "10.0.0.5"], "10.0.0.6"),
        ("10.0.0.5", ["10.0.0.6", "10.0.1.1", "10.0.1.2"], "10.0.0.5"),  # the last one given comes last
        ("10.0.0.4", [], "10.0.0.5"),  # of a range that is no longer configured: from the start
        ("192.0.2.1", ["10.0.0.5"], "10.0.0.6"),
        ("fd00::5", [], "10.0.0.5"),
        ("10.0.0.5", ["10.0.0.5", "10.0.0.6", "10.0.1.1", "10.0.1.2"], None),
    ],
)
def test_next_of_two_ranges(last_given: str | None, taken: list[str], expected: str | None) -> None:
    """The search goes once round all ranges, from behind the last address given."""
    ranges = [between("10.0.0.0/24", "10.0.0.5", "10.0.0.6"), between("10.0.1.0/24", "10.0.1.1", "10.0.1.2")]
    found = next_free(
        ranges, ip_address(last_given) if last_given else None, in_use([ip_address(each) for each in taken])
    )
    assert found == (ip_address(expected) if expected else None)


@pytest.mark.parametrize(
    "subnet", ["0.0.0.0/32", "255.255.255.255/32", "255.255.255.254/31", "::/127", f"{'ffff:' * 7}ffff/128"]
)
def test_ends_of_the_address_space(subnet: str) -> None:
    """The search neither counts beyond the last address there is, nor below the first."""
    it = usable(subnet)
    given: list[Address] = []
    while (address := next_free([it], given[-1] if given else None, in_use(given))) is not None:
        given.append(address)
    assert given == members([it])


def test_large_range_is_not_searched_through() -> None:
    """A /64 is asked only for what is used behind the last address given, not walked."""
    it = usable("fd00::/64")
    asked: list[tuple[Address, Address]] = []

    def used(first: Address, last: Address) -> list[Address]:
        asked.append((first, last))
        return []

    assert next_free([it], ip_address("fd00::ffff:ffff:ffff:fffe"), used) == it.last
    assert next_free([it], it.last, used) == it.first
    assert asked == [(it.last, it.last), (it.first, it.last)]


def test_large_exclusions_are_not_searched_through() -> None:
    """What is withheld is passed over as a whole, wherever it begins and ends, and only what is left is asked about."""
    it = pool_of(
        [between("fd00::/64", "fd00::5", "fd00::ffff")], exclude=["fd00::/125", "fd00::10/124", "fd00::18/126"]
    )
    asked: list[tuple[Address, Address]] = []

    def used(first: Address, last: Address) -> list[Address]:
        asked.append((first, last))
        return [first + offset for offset in range(8)] if first == ip_address("fd00::8") else []

    assert next_free(it.ranges, None, used, it.withheld) == ip_address("fd00::20")
    assert [(str(first), str(last)) for first, last in asked] == [("fd00::8", "fd00::f"), ("fd00::20", "fd00::ffff")]


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ([], [None, None]),
        (["fd00::9"], [None, "fd00::9"]),
        (["fd00::9", "10.0.0.3"], ["10.0.0.3", "fd00::9"]),
        (["10.0.0.3", "10.0.0.3"], ["10.0.0.3", None]),
        (["10.0.0.3", "10.0.0.4"], "failed to allocate all requested IPs: 10.0.0.4 "),
        (["::ffff:10.0.0.3"], "failed to allocate all requested IPs: ::ffff:"),
        (["10.0.0.1"], "failed to allocate for range 0: requested ip 10.0.0.1 is subnet's gateway"),
        (["fd00::3"], "failed to allocate for range 1: requested IP address fd00::3 is excluded"),
    ],
)
def test_requests(requested: list[str], expected: list[str | None] | str) -> None:
    """Each pool takes the first request that is in it, and every request must be taken, once, by one that gives it."""
    pools = [
        pool_of([usable("10.0.0.0/29")], gateway="10.0.0.1", reserved=["10.0.0.3"]),
        pool_of([usable("fd00::/64")], exclude=["fd00::/126"]),
    ]
    addresses = [ip_address(each) for each in requested]
    if isinstance(expected, str):
        with pytest.raises(AddressNotInRange) as caught:
            match_requests(pools, addresses)
        assert str(caught.value).startswith(expected)
    else:
        assert [each and str(each) for each in match_requests(pools, addresses)] == expected
    assert match_requests((), ()) == []


@st.composite
def ring(draw: st.DrawFn) -> list[Range]:
    """Draw one to three ranges of one family, apart from each other, of one to sixteen addresses each."""
    width, base = FAMILIES[draw(st.sampled_from(sorted(FAMILIES)))]
    ranges = []
    for index in draw(st.permutations(range(draw(st.integers(1, 3))))):
        whole = usable(f"{base + 256 * index}/{draw(st.integers(width - 4, width))}")
        first = whole.first + draw(st.integers(0, whole.size - 1))
        last = first + draw(st.integers(0, int(whole.last) - int(first)))
        ranges.append(draw(st.sampled_from([whole, Range(whole.subnet, first, last)])))
    return ranges


@given(ring(), st.data())
def test_finds_one_if_and_only_if_one_exists(ranges: list[Range], data: st.DataObject) -> None:
    """Whatever is in use and was given last, a free address of the ranges is found exactly if there is one."""
    everything = members(ranges)
    taken = data.draw(st.sets(st.sampled_from(everything)) | st.just(set(everything)))
    last_given = data.draw(st.none() | st.sampled_from([*everything, ranges[0].subnet[0] - 1, ip_address("::1")]))
    found = next_free(ranges, last_given, in_use(taken))
    free = set(everything) - taken
    assert (found in free) if free else found is None


@given(ring(), st.data())
def test_exclusions(ranges: list[Range], data: st.DataObject) -> None:
    """The next one is the first behind the last given, of a plain list without what is used or withheld in any form."""
    everything = members(ranges)
    some = st.sampled_from(everything)
    width = everything[0].max_prefixlen
    prefixes = st.builds(
        lambda address, length: str(ip_network(f"{address}/{length}", strict=False)),
        some,
        st.sampled_from([width, width, width - 1, width - 2]),
    )
    exclude, reserved = data.draw(st.lists(prefixes, max_size=3)), data.draw(st.lists(prefixes, max_size=2))
    it = pool_of(ranges, exclude, reserved, data.draw(st.just("") | some.map(str)))
    withheld = {each for text in (*exclude, *reserved) for each in ip_network(text)} | it.gateways
    taken = data.draw(st.sets(some))
    last = data.draw(st.none() | some)
    start = everything.index(last) + 1 if last else 0
    turned = everything[start:] + everything[:start]
    expected = next((each for each in turned if each not in taken and each not in withheld), None)
    assert next_free(it.ranges, last, in_use(taken), it.withheld) == expected
    assert {each for each in everything if it.gives(each)} == set(everything) - withheld


class Ring(RuleBasedStateMachine):
    """Gives and releases in any order, against a plain list of all addresses in their order."""

    @initialize(ranges=ring())
    def begin(self, ranges: list[Range]) -> None:
        """Begin with nothing in use."""
        self.ranges = ranges
        self.order = members(ranges)
        self.used: set[Address] = set()
        self.last: Address | None = None
        self.clock = 0
        self.given = dict.fromkeys(self.order, 0)  # when last
        self.released = dict.fromkeys(self.order, 0)

    @rule()
    def give(self) -> None:
        """Give the first free one behind the last in the plain list, which goes round."""
        start = self.order.index(self.last) + 1 if self.last is not None else 0
        turned = self.order[start:] + self.order[:start]
        found = next_free(self.ranges, self.last, in_use(self.used))
        assert found == next((each for each in turned if each not in self.used), None)
        if found is None:
            return
        self.used.add(found)
        passed_over = [each for each in self.order if each not in self.used]
        if self.given[found]:  # a second time: all that were free ever since must have had their turn in between
            assert all(max(self.given[each], self.released[each]) > self.given[found] for each in passed_over)
        self.last = found
        self.clock += 1
        self.given[found] = self.clock

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Take back any of those in use."""
        address = data.draw(st.sampled_from(sorted(self.used)))
        self.used.remove(address)
        self.clock += 1
        self.released[address] = self.clock


Ring.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestRing = Ring.TestCase

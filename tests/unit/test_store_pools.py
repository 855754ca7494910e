"""The IPAM store's pools: requests, exclusions, several networks, sticky addresses, and who gets what next."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from agent import allotment, statedir
from agent.config import Config
from agent.ranges import Range
from agent.store import (
    AddressNotInRange,
    AddressTaken,
    AttachmentExists,
    Netns,
    Origin,
    Phase,
    Pod,
    RangeExhausted,
    Store,
    Subnet,
)
from tests.unit.stores import NETNS, addresses, attachment, open_store, pool, reserve


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a store goes."""
    return tmp_path / "ipam.db"


@pytest.fixture
def store(path: Path) -> Store:
    """Open a store."""
    return open_store(path)


def imported(name: str, *its: str, network: str = "net") -> Pod:
    """Return an attachment that another plugin has made."""
    it = attachment(name, network)
    given = tuple(ip_address(each) for each in its)
    return Pod(it, f"pl-{it}", "02:00:00:00:00:01", 0, Netns("", ""), given, Phase.IMPORTED, "boot")


def test_all_that_is_known_of_a_pod_is_kept(path: Path) -> None:
    """Pod name, masquerading, and the call that made it are the same after a restart, whatever is in them."""
    origin = Origin({"CNI_ARGS": 'A=ü;B="\\', "CNI_COMMAND": "ADD"}, b'\x00\xff{"a":1}')
    store = open_store(path)
    kept = [
        store.reserve(
            attachment(name),
            device=f"pl{name}",
            mac="02:00:00:00:00:01",
            mtu=1500,
            netns=NETNS,
            pod_name=f"default/{name}",
            masquerade=masquerade,
            origin=origin,
        )
        for name, masquerade in (("a", None), ("b", True), ("c", False))
    ]
    subnets = (Subnet(ip_network("10.0.0.0/24"), ip_address("10.0.0.254")), Subnet(ip_network("fd00::/64")))
    assert store.assign(kept[0].attachment, (), subnets)
    kept[0] = replace(kept[0], subnets=subnets)
    store.close()
    store = open_store(path)
    assert [store.get(attachment(name)) for name in "abc"] == kept
    assert [pod.masquerade for pod in kept] == [None, True, False]
    assert len({*kept, *kept}) == 3  # pods can be in sets


def test_named_gateways(path: Path) -> None:
    """What IPAM called the gateway is kept; a row that was written before it was has none."""
    store, it = open_store(path), attachment("a")
    reserve(store, it)
    subnet = Subnet(ip_network("10.0.0.0/24"), None, named=ip_address("10.0.0.254"))
    assert store.assign(it, (), (subnet,))
    assert [(each, each.named) for pod in store.pods() for each in pod.subnets] == [(subnet, subnet.named)]
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("""UPDATE attachment SET subnets = '[["10.0.0.0/24", "10.0.0.1"]]'""")
    before = Subnet(ip_network("10.0.0.0/24"), ip_address("10.0.0.1"))
    assert [(each, each.named) for pod in store.pods() for each in pod.subnets] == [(before, None)]
    store.close()


def test_one_address_of_each_pool_in_their_order(path: Path) -> None:
    """Addresses come in the order of the pools, IPv6 first if it is listed first, also after a restart."""
    pools = [pool("n/0", "fd00::/64"), pool("n/1", "10.0.0.0/24"), pool("n/2", "10.0.1.0/24")]
    store = open_store(path)
    assert addresses(reserve(store, attachment("a"), pools)) == ["fd00::1", "10.0.0.1", "10.0.1.1"]
    assert addresses(reserve(store, attachment("b"), ())) == []
    store.close()
    assert addresses(open_store(path).pods()[0]) == ["fd00::1", "10.0.0.1", "10.0.1.1"]


def test_networks_have_their_own_turns(store: Store) -> None:
    """Each pool gives in its own turn, and what two pools share is given once on the node."""
    one, two = [pool("one/0", "10.0.0.0/29")], [pool("two/0", "10.0.0.0/29")]
    turns = [
        addresses(reserve(store, attachment(number, its[0].name[:3]), its))[0]
        for number, its in enumerate((one, one, two, one, two))
    ]
    assert turns == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"]
    reserve(store, attachment("last"), two)
    with pytest.raises(RangeExhausted, match=r"no IP addresses available in range set: 10\.0\.0\.1-10\.0\.0\.6 "):
        reserve(store, attachment("late"), one)
    store.remove(attachment(2, "two"))
    assert addresses(reserve(store, attachment("late"), one)) == ["10.0.0.3"]


def test_rest_is_by_release(path: Path) -> None:
    """Among addresses that were given before, the one whose release is longest ago comes first, also after restarts."""
    its = [pool("n/0", "10.0.0.0/29")]
    store = open_store(path)
    for number in range(1, 7):
        reserve(store, attachment(number), its)
    for number in (4, 1, 6):
        store.remove(attachment(number))
    store.close()
    store = open_store(path)
    assert addresses(reserve(store, attachment("a"), its)) == ["10.0.0.4"]
    store.remove(attachment("a"))
    assert [addresses(reserve(store, attachment(name), its))[0] for name in "bcd"] == [
        "10.0.0.1",
        "10.0.0.6",
        "10.0.0.4",
    ]


def test_memory_of_releases_is_bounded(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many releases are remembered; what was forgotten has its turn in the ring as if it were new."""
    monkeypatch.setattr(allotment, "_RELEASES", 4)
    its = [pool("n/0", "10.0.0.0/28")]
    for number in range(14):
        reserve(store, attachment(number), its)
        store.remove(attachment(number))
    (count,) = store._db.execute("SELECT count(*) FROM former").fetchone()
    assert count == 4
    assert addresses(reserve(store, attachment("a"), its)) == ["10.0.0.1"]


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        (["10.0.0.2"], r"requested IP address 10.0.0.2 is not available in range set 10.0.0.1-10.0.0.6 .*container-a"),
        (["10.0.0.1"], "failed to allocate for range 0: requested ip 10.0.0.1 is subnet's gateway"),
        (["10.0.0.3"], r"range 0: requested IP address 10.0.0.3 is excluded \(exclude: 10.0.0.3/32\)"),
        (["10.0.9.9", "fd00::9"], r"failed to allocate all requested IPs: 10.0.9.9 \(allowed .* 10.0.0.1-10.0.0.6; fd"),
        (["10.0.0.5", "10.0.0.6"], "failed to allocate all requested IPs: 10.0.0.6 "),
        (["10.0.0.7"], "failed to allocate all requested IPs: 10.0.0.7 "),
    ],
)
def test_requests_that_cannot_be_met(store: Store, requested: list[str], message: str) -> None:
    """A request for what is taken, excluded or of no pool, or one too many, is an error, and nothing is given."""
    its = [pool("n/0", "10.0.0.0/29", gateway="10.0.0.1", exclude=["10.0.0.3"]), pool("n/1", "fd00::/64")]
    before = [reserve(store, attachment("a"), its, pod_name="default/a")]
    with pytest.raises((AddressTaken, AddressNotInRange), match=message):
        reserve(store, attachment("b"), its, *requested)
    assert store.pods() == before
    assert addresses(reserve(store, attachment("c"), its)) == ["10.0.0.4", "fd00::2"]


def test_requests_are_met(store: Store) -> None:
    """Each pool gives what was asked of it, once, and the others give what comes next; the ring goes on from there."""
    its = [pool("n/0", "10.0.0.0/28", reserved=["10.0.0.8/30"]), pool("n/1", "10.0.1.0/28")]
    assert addresses(reserve(store, attachment(1), its, "10.0.1.9", "10.0.1.9")) == ["10.0.0.1", "10.0.1.9"]
    assert addresses(reserve(store, attachment(2), its)) == ["10.0.0.2", "10.0.1.10"]
    assert addresses(reserve(store, attachment(3), its, "10.0.1.1", "10.0.0.9")) == ["10.0.0.9", "10.0.1.1"]
    assert addresses(reserve(store, attachment(4), its)) == ["10.0.0.12", "10.0.1.2"]


def test_reserved_addresses_are_for_those_who_ask(store: Store) -> None:
    """Neither the turn nor a sticky name leads to a reserved address, but a request does."""
    its = [pool("n/0", "10.0.0.0/29", reserved=["10.0.0.0/30"], exclude=["10.0.0.6"])]
    assert addresses(reserve(store, attachment("a"), its, "10.0.0.2", pod_name="d/a")) == ["10.0.0.2"]
    store.remove(attachment("a"))
    given = [addresses(reserve(store, attachment(n), its, pod_name="d/a", sticky=True))[0] for n in "bc"]
    assert given == ["10.0.0.4", "10.0.0.5"]
    with pytest.raises(RangeExhausted):
        reserve(store, attachment("d"), its)
    assert store.exhausted(its).startswith("no IP addresses available in range set: 10.0.0.1-10.0.0.6 (all that may")
    assert (store.exhausted(), store.exhausted([pool("n/0", "10.0.0.0/28")])) == ("", "")


def test_sticky(path: Path) -> None:
    """A pod gets the addresses back that the last one of its name had, if sticky is asked for and nobody has them."""
    its = [pool("n/0", "10.0.0.0/29"), pool("n/1", "fd00::/64")]
    store = open_store(path)
    first = addresses(reserve(store, attachment("a"), its, pod_name="d/web-0"))
    store.remove(attachment("a"))
    store.close()
    store = open_store(path)
    assert addresses(reserve(store, attachment("b"), its, pod_name="d/web-1", sticky=True)) == ["10.0.0.2", "fd00::2"]
    assert addresses(reserve(store, attachment("c"), its, pod_name="d/web-0")) == ["10.0.0.3", "fd00::3"]
    assert addresses(reserve(store, attachment("d"), its, pod_name="d/web-0", sticky=True)) == first
    # While it has them, another one of that name gets others, and what it had last is what counts.
    assert addresses(reserve(store, attachment("e"), its, pod_name="d/web-0", sticky=True)) == ["10.0.0.4", "fd00::4"]
    store.remove(attachment("d"))
    store.remove(attachment("e"))
    assert addresses(reserve(store, attachment("f"), its, pod_name="d/web-0", sticky=True)) == ["10.0.0.4", "fd00::4"]
    assert addresses(reserve(store, attachment("g"), its, "10.0.0.6", pod_name="d/web-0", sticky=True)) == [
        "10.0.0.6",
        first[1],
    ]


def test_sticky_knows_interfaces_and_networks(store: Store) -> None:
    """What a pod had on another interface or network is not what it had on this one, and no name is no pod."""
    its = [pool("n/0", "10.0.0.0/28")]
    here = attachment("a")
    others = [replace(here, network="other"), replace(here, ifname="net1")]
    for number, it in enumerate([here, *others]):
        reserve(store, it, its, pod_name="d/web-0")
        store.remove(it)
        assert store.get(it) is None, number
    again = [addresses(reserve(store, it, its, pod_name="d/web-0", sticky=True))[0] for it in (others[1], here)]
    assert again == ["10.0.0.3", "10.0.0.1"]
    reserve(store, attachment("x"), its)
    store.remove(attachment("x"))
    assert addresses(reserve(store, attachment("y"), its, sticky=True)) == ["10.0.0.5"]


def test_own_ranges_with_exclusions(tmp_path: Path) -> None:
    """The agent's own ranges have excluded, reserved and sticky addresses as well, as its configuration says."""
    config = {
        "ranges": [{"subnet": "10.0.0.0/29"}, {"subnet": "fd00::/125"}],
        "exclude": ["10.0.0.1", "fd00::/127"],
        "reserved": ["10.0.0.2/31"],
        "sticky": True,
        "paths": {"state": tmp_path},
    }
    store = statedir.open_store(Config.model_validate(config))
    assert addresses(reserve(store, attachment("a"), pod_name="d/a")) == ["10.0.0.4", "fd00::2"]
    store.remove(attachment("a"))
    assert addresses(reserve(store, attachment("b"))) == ["10.0.0.5", "fd00::3"]
    assert addresses(reserve(store, attachment("c"), None, "10.0.0.3", pod_name="d/a")) == ["10.0.0.3", "fd00::2"]
    with pytest.raises(AddressNotInRange, match=r"fd00::1 is excluded \(exclude: fd00::/127\)"):
        reserve(store, attachment("d"), None, "fd00::1")


def test_addresses_that_somebody_else_chose(store: Store) -> None:
    """What a delegate gave follows the pod's own addresses; if another pod has one of them, all are refused."""
    a, b = attachment("a"), attachment("b", "other")
    reserve(store, a, (), pod_name="default/a")
    reserve(store, b)
    chosen = [ip_address(each) for each in ("192.0.2.9", "fd99::1")]
    assert store.assign(a, chosen)
    assert store.assign(b, [ip_address("192.0.2.7")])
    assert [addresses(pod) for pod in store.pods()] == [
        ["192.0.2.9", "fd99::1"],
        ["10.0.0.1", "fd00::1", "192.0.2.7"],
    ]
    before = store.pods()
    with pytest.raises(AddressTaken, match=r"192.0.2.9 is in use by net/container-a/eth0 \(pod default/a\)"):
        store.assign(b, [ip_address("192.0.2.8"), ip_address("192.0.2.9")])
    assert store.pods() == before
    assert not store.assign(attachment("unknown"), chosen)
    store.activate(a)
    assert not store.assign(a, [ip_address("192.0.2.1")])
    store.remove(a)
    assert store.assign(b, chosen)


def test_imported_attachments(store: Store) -> None:
    """What another plugin made is kept as it is, given to nobody, and released as any other attachment."""
    pods = [imported("a", "10.0.0.1", "fd00::1"), imported("b", "10.0.0.3")]
    assert store.adopt(pods, {"net/0": ip_address("10.0.0.4")}) == pods
    assert store.pods() == pods
    with pytest.raises(AttachmentExists):
        reserve(store, attachment("a"))
    assert not store.activate(attachment("a"))
    its = [pool("net/0", "10.0.0.0/29")]
    assert [addresses(reserve(store, attachment(n), its))[0] for n in "cde"] == ["10.0.0.5", "10.0.0.6", "10.0.0.2"]
    assert store.begin_release(attachment("b"))
    store.remove(attachment("b"))
    assert addresses(reserve(store, attachment("f"), its)) == ["10.0.0.4"]
    assert addresses(reserve(store, attachment("g"), its)) == ["10.0.0.3"]


def test_adopting_again(store: Store) -> None:
    """A second time takes over what is new; what was released since, and rings that go on, stay as they are."""
    pods = [imported("a", "10.0.0.1"), imported("b", "10.0.0.3")]
    store.adopt(pods, {"net/0": ip_address("10.0.0.3")})
    its = [pool("net/0", "10.0.0.0/29")]
    assert addresses(reserve(store, attachment("c"), its)) == ["10.0.0.4"]
    store.remove(attachment("b"))
    grown = imported("a", "10.0.0.1", "fd00::7")
    new = imported("d", "10.0.0.5")
    assert store.adopt([grown, pods[1], new], {"net/0": ip_address("10.0.0.3")}) == [grown, new]
    assert {pod.attachment.container_id[-1]: addresses(pod) for pod in store.pods()} == {
        "a": ["10.0.0.1", "fd00::7"],
        "c": ["10.0.0.4"],
        "d": ["10.0.0.5"],
    }
    assert store.adopt([grown, pods[1], new], {}) == []
    assert addresses(reserve(store, attachment("e"), its)) == ["10.0.0.6"]


def test_adopting_what_is_not_free(store: Store) -> None:
    """An address that another attachment has, or an attachment of podlane's own with others, refuses the whole."""
    before = [reserve(store, attachment("own"))]
    good = imported("a", "10.0.0.3")
    with pytest.raises(AddressTaken, match=r"10\.0\.0\.1 is in use by net/container-own/eth0"):
        store.adopt([good, imported("b", "10.0.0.1")], {"net/0": ip_address("10.0.0.3")})
    with pytest.raises(AttachmentExists, match=r"net/container-own/eth0 .* 10.0.0.9"):
        store.adopt([good, imported("own", "10.0.0.1", "10.0.0.9")], {})
    assert store.pods() == before
    assert store.adopt([imported("own", "10.0.0.1")], {}) == []
    assert addresses(reserve(store, attachment("c"), [pool("net/0", "10.0.0.0/29")])) == ["10.0.0.2"]


def test_large_pools_cost_nothing(store: Store) -> None:
    """What is free and what is next in a /8 and a /64, with large exclusions, takes a few statements to know."""
    its = [pool("n/0", "10.0.0.0/8", exclude=["10.0.0.0/9"]), pool("n/1", "fd00::/64", exclude=["fd00::/65"])]
    for number in range(20):
        reserve(store, attachment(number), its)
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    assert store.exhausted(its) == ""
    assert len(statements) == 4
    assert addresses(reserve(store, attachment("a"), its)) == ["10.128.0.20", "fd00::8000:0:0:14"]
    assert len(statements) < 24


def test_ranges_change_while_the_store_is_in_use(store: Store) -> None:
    """New pods get addresses of the new ranges, pods keep what they have; without ranges there is nothing to give."""
    old = reserve(store, attachment("old"))
    store.set_ranges([Range.of(ip_network("10.9.0.0/24"))])
    assert store.subnets == (ip_network("10.9.0.0/24"),)
    assert addresses(reserve(store, attachment("new"))) == ["10.9.0.1"]
    assert old in store.pods()
    assert [(str(each.subnet), count) for each, count in store.usage()] == [("10.9.0.0/24", 1)]
    store.set_ranges([])
    with pytest.raises(RangeExhausted):
        reserve(store, attachment("none"))
    assert len(store.pods()) == 2


@pytest.mark.parametrize(
    ("ranges", "is_right"),
    [
        (("10.0.0.0/24", "fd00::/64"), True),  # grown: what was given is of it
        (("10.9.0.0/24", "fd00::/126"), False),
        (("10.0.0.0/29", "fd99::/64"), False),
        (("10.0.0.0/29",), False),
        ((), False),
    ],
)
def test_ranges_change_during_an_add(store: Store, ranges: Sequence[str], is_right: bool) -> None:
    """Only who has one address of each of the ranges that there are now becomes active; for others nothing changes."""
    pod = reserve(store, attachment("a"))
    store.set_ranges([Range.of(ip_network(each)) for each in ranges])
    if is_right:
        assert store.activate(pod.attachment, own=pod.addresses)
    else:
        with pytest.raises(AddressNotInRange, match=re.escape("10.0.0.1, fd00::1 (allowed is by now one of each")):
            store.activate(pod.attachment, own=pod.addresses)
    assert [each.phase for each in store.pods()] == [Phase.ACTIVE if is_right else Phase.RESERVED]

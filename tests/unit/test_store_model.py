"""The IPAM store against a model: any sequence of operations, and many threads at once."""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.ranges import AddressNotInRange, Pool
from agent.state import Address
from agent.store import AddressTaken, AttachmentExists, Netns, Phase, Pod, RangeExhausted, Store
from cni.call import Attachment
from tests.unit.stores import attachment, open_store, pool, reserve

# Two networks share addresses; the second pool of the first one is small. Ten addresses of either family.
POOLS = {
    "one": [
        pool("one/0", "10.0.0.0/29", exclude=["10.0.0.3"], reserved=["10.0.0.5"], gateway="10.0.0.1"),
        pool("one/1", "fd00::/126"),
    ],
    "two": [pool("two/0", "10.0.0.8/30", "10.0.0.0/29")],
}
KEYS = [Attachment(network, f"c{number}", ifname) for network in POOLS for number in "12" for ifname in ("eth0", "n1")]
ADDRESSES = [*(f"10.0.0.{last}" for last in range(12)), *(f"fd00::{last}" for last in range(4))]
NAMES = st.sampled_from(["", "d/a", "d/b"])
REQUESTS: st.SearchStrategy[list[str]] = st.just([]) | st.lists(st.sampled_from(ADDRESSES), max_size=3)


def order(of: Pool) -> list[Address]:
    """Return a pool's addresses one by one."""
    return [each.first + offset for each in of.ranges for offset in range(each.size)]


def may_give(of: Pool) -> list[Address]:
    """Return those that a pool gives by itself."""
    withheld = [each for network in (*of.excluded, *of.reserved) for each in network]
    return [each for each in order(of) if each not in withheld and each not in of.gateways]


class Model(RuleBasedStateMachine):
    """Any sequence of operations, restarts, crashes and reboots, against plain lists."""

    keys = st.sampled_from(KEYS)

    @initialize()
    def create(self) -> None:
        """Make an empty store."""
        self.directory = Path(tempfile.mkdtemp(prefix="podlane-store-"))
        self.boot_id = "boot-0"
        self.store = open_store(self.directory / "ipam.db", boot_id=self.boot_id)
        self.crashed: list[Store] = []
        self.pods: dict[Attachment, Pod] = {}
        self.former: list[tuple[Address, Pod]] = []  # with the pod that had it; the last release is the last
        self.last_given: dict[str, Address] = {}

    @property
    def used(self) -> set[Address]:
        """All addresses that pods have."""
        return {address for pod in self.pods.values() for address in pod.addresses}

    @rule(key=keys, requested=REQUESTS, name=NAMES, sticky=st.booleans())
    def reserve(self, key: Attachment, requested: list[str], name: str, sticky: bool) -> None:
        """Reserve: gives exactly what the model says, or refuses for a reason that the model knows."""
        pools = POOLS[key.network]
        expected, rings = self.expect(key, [ip_address(each) for each in requested], name if sticky else "")
        if isinstance(expected, type):
            with pytest.raises(expected):
                reserve(self.store, key, pools, *requested, pod_name=name, sticky=sticky)
            return
        pod = reserve(self.store, key, pools, *requested, pod_name=name, sticky=sticky)
        assert list(pod.addresses) == expected
        assert (pod.attachment, pod.phase, pod.boot_id) == (key, Phase.RESERVED, self.boot_id)
        self.last_given |= rings
        self.hold(pod)

    @rule(key=keys, name=NAMES, sticky=st.booleans())
    def renew(self, key: Attachment, name: str, sticky: bool) -> None:
        """Remove what is there, and reserve again: what most of a node's life consists of."""
        self.remove(key)
        self.reserve(key, [], name, sticky)

    def expect(
        self, key: Attachment, requested: list[Address], name: str
    ) -> tuple[list[Address] | type[Exception], dict[str, Address]]:
        """Return the addresses that an attachment should get, or the error, and where the rings are then."""
        pending = list(dict.fromkeys(requested))
        matches = []
        for its in POOLS[key.network]:
            match = next((each for each in pending if each in order(its)), None)
            pending = [each for each in pending if each != match]
            matches.append(match)
        allowed = [*(each for its in POOLS[key.network] for each in may_give(its)), ip_address("10.0.0.5")]
        if pending or any(match not in allowed for match in matches if match is not None):
            return AddressNotInRange, {}
        if key in self.pods:
            return AttachmentExists, {}
        given: list[Address] = []
        rings: dict[str, Address] = {}
        for its, match in zip(POOLS[key.network], matches, strict=True):
            address = match or self.former_of(key, name, its) or self.next_of(its)
            if address is None:
                return RangeExhausted, {}
            if address in self.used:
                return AddressTaken, {}
            if match or address != self.former_of(key, name, its):
                rings[its.name] = address
            given.append(address)
        return given, rings

    def former_of(self, key: Attachment, name: str, its: Pool) -> Address | None:
        """Return what a pod of this name had last, on this network and interface."""
        for address, pod in reversed(self.former):
            here = (pod.pod_name, pod.attachment.network, pod.attachment.ifname) == (name, key.network, key.ifname)
            if name and here and address in may_give(its):
                return address
        return None

    def next_of(self, its: Pool) -> Address | None:
        """Return the first one behind the last given that nobody has had, else the one released longest ago."""
        everything, last = order(its), self.last_given.get(its.name)
        start = everything.index(last) + 1 if last else 0
        remembered = [address for address, _ in self.former]
        turned = everything[start:] + everything[:start]
        fresh = [each for each in turned if each in may_give(its) and each not in self.used]
        return next(
            (each for each in fresh if each not in remembered),
            next((each for each in remembered if each in fresh), None),
        )

    def hold(self, pod: Pod) -> None:
        """Note that a pod has its addresses."""
        self.pods[pod.attachment] = pod
        self.former = [each for each in self.former if each[0] not in pod.addresses]

    @rule(key=keys, chosen=st.lists(st.sampled_from(ADDRESSES), max_size=3, unique=True))
    def assign(self, key: Attachment, chosen: list[str]) -> None:
        """Assign what somebody else chose: only to what is reserved, and only what nobody has."""
        addresses = tuple(ip_address(each) for each in chosen)
        known = self.pods.get(key)
        reserved = known is not None and known.phase is Phase.RESERVED
        try:
            assert self.store.assign(key, addresses) is reserved
        except AddressTaken:
            assert reserved
            assert self.used & set(addresses)
            return
        assert not reserved or not self.used & set(addresses)
        if known is not None and reserved:
            self.hold(replace(known, addresses=known.addresses + addresses))

    @rule(key=keys, address=st.sampled_from(ADDRESSES))
    def adopt(self, key: Attachment, address: str) -> None:
        """Take over what another plugin made: only what is neither known, nor released since, nor in use."""
        it = ip_address(address)
        stranger = Pod(key, f"pl-{key}", "", 0, Netns("", ""), (it,), Phase.IMPORTED, self.boot_id)
        known = self.pods.get(key)
        own = known is not None and known.phase is not Phase.IMPORTED
        released = known is None and any(pod.attachment == key for _, pod in self.former)
        if released or (known is not None and it in known.addresses):
            assert self.store.adopt([stranger], {}) == []
            return
        if own or it in self.used:
            with pytest.raises(AttachmentExists if own else AddressTaken):
                self.store.adopt([stranger], {})
            return
        assert self.store.adopt([stranger], {}) == [stranger]
        self.hold(replace(known, addresses=(*known.addresses, it)) if known else stranger)

    @rule(key=keys)
    def activate(self, key: Attachment) -> None:
        """Activate: only what is reserved."""
        known = self.pods.get(key)
        expected = known is not None and known.phase is Phase.RESERVED
        assert self.store.activate(key) is expected
        if known is not None and expected:
            self.pods[key] = replace(known, phase=Phase.ACTIVE)

    @rule(key=keys)
    def begin_release(self, key: Attachment) -> None:
        """Begin to release: whatever exists."""
        known = self.pods.get(key)
        assert self.store.begin_release(key) is (known is not None)
        if known is not None:
            self.pods[key] = replace(known, phase=Phase.RELEASING)

    @rule(key=keys)
    def remove(self, key: Attachment) -> None:
        """Remove: whether it exists or not."""
        self.store.remove(key)
        pod = self.pods.pop(key, None)
        self.former += [(address, pod) for address in pod.addresses] if pod else []

    @rule(how=st.sampled_from(["restart", "crash", "reboot"]))
    def reopen(self, how: str) -> None:
        """Restart the agent, orderly or not, or the machine."""
        if how == "crash":
            self.crashed.append(self.store)
        else:
            self.store.close()
        if how == "reboot":
            self.boot_id += "'"
        self.store = open_store(self.directory / "ipam.db", boot_id=self.boot_id)

    @invariant()
    def store_is_the_model(self) -> None:
        """Compare all that the store says with the model."""
        if not hasattr(self, "store"):
            return
        pods = self.store.pods()
        assert {pod.attachment: pod for pod in pods} == self.pods
        assert len(pods) == len(self.pods)
        assert {key: self.store.get(key) for key in KEYS} == {key: self.pods.get(key) for key in KEYS}
        assert len(self.used) == sum(len(pod.addresses) for pod in pods)
        for pools in POOLS.values():
            assert bool(self.store.exhausted(pools)) is any(set(may_give(its)) <= self.used for its in pools)

    def teardown(self) -> None:
        """Remove the store."""
        if hasattr(self, "store"):
            for store in (self.store, *self.crashed):
                store.close()
            shutil.rmtree(self.directory)


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase


def test_threads(tmp_path: Path) -> None:
    """Eight threads that reserve, activate and release at once never share an address, and lose none."""
    store = open_store(tmp_path / "ipam.db", ("10.0.0.0/24", "fd00::/64"))

    def work(thread: int) -> list[Pod]:
        kept = []
        for number in range(30):
            it = attachment(f"{thread}-{number}")
            pod = reserve(store, it)
            assert store.activate(it)
            if number % 3 == 0:
                assert store.begin_release(it)
                store.remove(it)
            else:
                kept.append(replace(pod, phase=Phase.ACTIVE))
        return kept

    with ThreadPoolExecutor(8) as threads:
        kept = [pod for pods in threads.map(work, range(8)) for pod in pods]
    given = [address for pod in kept for address in pod.addresses]
    assert len(set(given)) == len(given) == 2 * 8 * 20
    assert sorted(store.pods(), key=lambda pod: pod.device) == sorted(kept, key=lambda pod: pod.device)


def test_threads_with_one_attachment(tmp_path: Path) -> None:
    """Of many simultaneous ADDs of one attachment exactly one gets addresses."""
    store = open_store(tmp_path / "ipam.db")

    def work(_: int) -> Pod | None:
        try:
            return reserve(store, attachment("a"))
        except AttachmentExists:
            return None

    with ThreadPoolExecutor(8) as threads:
        winners = [pod for pod in threads.map(work, range(64)) if pod is not None]
    assert store.pods() == winners
    assert [count for _, count in store.usage()] == [1, 1]

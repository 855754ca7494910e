"""The IPAM store against a model: any sequence of operations, and many threads at once."""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.store import AttachmentExists, Phase, Pod, RangeExhausted
from cni.call import Attachment
from tests.unit.stores import SUBNETS, attachment, open_store, reserve

KEYS = [Attachment("n", container, ifname) for container in ("c1", "c2", "c3", "c4") for ifname in ("eth0", "net1")]


class Model(RuleBasedStateMachine):
    """Any sequence of operations, restarts and reboots, against a dictionary."""

    keys = st.sampled_from(KEYS)

    @initialize()
    def create(self) -> None:
        """Make an empty store."""
        self.directory = Path(tempfile.mkdtemp(prefix="podlane-store-"))
        self.boot_id = "boot-0"
        self.store = open_store(self.directory / "ipam.db", boot_id=self.boot_id)
        self.pods: dict[Attachment, Pod] = {}

    @rule(key=keys)
    def reserve(self, key: Attachment) -> None:
        """Reserve: refused for what exists, and for want of addresses; else with addresses that nobody has."""
        used = {address for pod in self.pods.values() for address in pod.addresses}
        try:
            pod = reserve(self.store, key)
        except AttachmentExists:
            assert key in self.pods
        except RangeExhausted:
            assert key not in self.pods
            assert len(self.pods) == 3  # the smaller range
        else:
            assert key not in self.pods
            assert [address.version for address in pod.addresses] == [4, 6]
            assert not used & set(pod.addresses)
            assert all(address in ip_network(SUBNETS[address.version == 6]) for address in pod.addresses)
            assert (pod.attachment, pod.phase, pod.boot_id) == (key, Phase.RESERVED, self.boot_id)
            self.pods[key] = pod

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
        self.pods.pop(key, None)

    @rule(reboot=st.booleans())
    def reopen(self, reboot: bool) -> None:
        """Restart the agent, or the machine."""
        self.store.close()
        if reboot:
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
        assert [count for _, count in self.store.usage()] == [len(self.pods)] * 2

    def teardown(self) -> None:
        """Remove the store."""
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.directory)


Model.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
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

    with ThreadPoolExecutor(8) as pool:
        kept = [pod for pods in pool.map(work, range(8)) for pod in pods]
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

    with ThreadPoolExecutor(8) as pool:
        winners = [pod for pod in pool.map(work, range(64)) if pod is not None]
    assert store.pods() == winners
    assert [count for _, count in store.usage()] == [1, 1]

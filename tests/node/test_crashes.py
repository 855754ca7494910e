"""The agent is killed with SIGKILL between any two steps of each command: no address is given twice, none is lost."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path

import pytest

from tests.node.forked import start_doomed
from tests.node.machine import Machine, Netns, Outcome, TestPod, machine
from tests.node.programs import wait_settled
from tests.node.steps import labels

SEED = 20
DELETES_AT_ONCE, DELETES_LATER, NEVER_DELETES = RUNTIMES = ("at-once", "later", "never")
ROUNDS, WORKERS = 8, 8  # of the kills at random times
PLUGINS = "/usr/lib/cni"  # of Debian's containernetworking-plugins


@dataclass(frozen=True)
class Network:
    """A network, by its configuration beside name and type."""

    name: str
    ipam: Mapping[str, object] = field(default_factory=dict)

    def config(self, data: Path, **changes: object) -> dict[str, object]:
        """Return the configuration; `data` is where host-local keeps its addresses."""
        ipam = {**self.ipam, "dataDir": str(data)} if self.ipam else None
        return {"cniVersion": "1.0.0", "name": self.name, "ipam": ipam, **changes}


EVERYWHERE = {"routes": [{"dst": "0.0.0.0/0"}]}
PLAIN = Network("podlane")
OWN = Network("own", {"type": "podlane", "subnet": "10.77.0.0/24", **EVERYWHERE})
DELEGATED = Network("delegated", {"type": "host-local", "subnet": "10.79.0.0/24", **EVERYWHERE})


@dataclass(frozen=True)
class Steps:
    """Which steps of a command to die before: from the first that is `since` to the first after it that is `until`.

    Those that are left out are as in another scenario.
    """

    since: str = ""
    until: str = "reply"

    def choose(self, labels: Sequence[str]) -> list[int]:
        """Return their numbers. Of a transaction only begin and commit: whatever dies in between is rolled back."""
        first = next(number for number, label in enumerate(labels) if self.since in label)
        last = next(number for number, label in enumerate(labels) if number > first and self.until in label)
        within = range(first + 1, last + 2)
        if os.environ.get("PODLANE_CRASH_POINTS") == "all":
            return list(range(1, len(labels) + 1))
        return [each for each in within if not re.match(r"Connection.execute in (?!.*_transaction)", labels[each - 1])]


ALL = Steps()


class Crashes:
    """A node with two pods that live through everything, and a namespace for those that come and go."""

    def __init__(self, node: Machine, scratch: Netns) -> None:
        self.node = node
        self.scratch = scratch
        self.data = node.directory / "data"
        self.witnesses = (node.make_pod("a"), node.make_pod("b"))
        wait_settled(node, *self.witnesses)
        self.baseline = node.traces()

    def cni(self, command: str, container: str, network: Network = PLAIN, **changes: object) -> Outcome:
        """Call the launcher for a container in the scratch namespace; without a name, for no container."""
        return self.node.cni(
            command,
            container_id=container,
            netns=str(self.scratch.path) if container else "",
            ifname="eth0" if container else "",
            config=network.config(self.data, **changes),
            env={"CNI_PATH": f"{self.node.directory}/bin:{PLUGINS}"},
        )

    def add(self, container: str, network: Network = PLAIN) -> TestPod:
        """ADD a container that must succeed."""
        outcome = self.cni("ADD", container, network)
        assert outcome.exit_code == 0, f"{outcome.stdout}\n{self.node.log_tail()}"
        return TestPod(self.scratch, container, outcome.json())

    def delete(self, container: str, network: Network = PLAIN) -> None:
        """DEL a container; that succeeds, agent or not."""
        outcome = self.cni("DEL", container, network)
        assert outcome.exit_code == 0, f"{outcome.stdout}\n{self.node.log_tail()}"

    def check(self, pod: TestPod, network: Network) -> Outcome:
        """CHECK a container."""
        return self.cni("CHECK", pod.container_id, network, prevResult=pod.result)

    def collect(self, network: Network, *valid: str) -> Outcome:
        """GC a network, with these valid containers; host-local itself has no GC, hence without `ipam`."""
        listed = [{"containerID": each, "ifname": "eth0"} for each in valid]
        return self.cni("GC", "", Network(network.name), cniVersion="1.1.0", **{"cni.dev/valid-attachments": listed})

    def status(self, network: Network) -> Outcome:
        """Ask for STATUS of a network."""
        return self.cni("STATUS", "", network, cniVersion="1.1.0")

    def start_agent(self, command: str, container: str, step: int) -> None:
        """Start an agent that dies just before a step of the given call; before step 0 nobody dies."""
        start_doomed(self.node, command, container, step)

    def steps(self, command: str, network: Network = PLAIN, which: Steps = ALL) -> list[int]:
        """Return the steps of a command to die before, learned from one that nobody dies of."""
        self.node.kill_agent()
        self.start_agent(command, "" if command in ("GC", "STATUS") else "counted", 0)
        start = self.node.log.stat().st_size
        pod = self.add("counted", network)
        if command == "CHECK":
            assert self.check(pod, network).exit_code == 0
        if command == "GC":
            assert self.collect(network).exit_code == 0
        if command == "STATUS":
            assert self.status(network).exit_code == 0
        self.delete("counted", network)
        log = self.node.log.read_text()[start:]
        self.node.kill_agent()
        chosen = which.choose(labels(log))
        print(f"{command} on {network.name}: {len(chosen)} of {len(labels(log))} steps")
        return chosen

    def finish_off(self) -> None:
        """See the agent dead. One that got by with fewer steps than were counted is killed after the call."""
        assert self.node.agent is not None
        self.node.agent.kill()
        assert self.node.agent.wait() == -signal.SIGKILL, self.node.log_tail()
        self.node.agent = None

    def held(self, container: str) -> set[str]:
        """Return the addresses that the store holds for a container, whether or not an agent runs."""
        with sqlite3.connect(f"file:{self.node.directory}/state/ipam.db?mode=ro", uri=True) as db:
            query = "SELECT address FROM attachment JOIN address USING (device) WHERE container_id = ?"
            found = [IPv6Address(packed) for (packed,) in db.execute(query, (container,))]
        return {str(address.ipv4_mapped or address) for address in found}

    def is_active(self, container: str) -> bool:
        """Say whether the store has it as a whole pod."""
        with sqlite3.connect(f"file:{self.node.directory}/state/ipam.db?mode=ro", uri=True) as db:
            query = "SELECT 1 FROM attachment WHERE container_id = ? AND phase = 'active'"
            return db.execute(query, (container,)).fetchone() is not None

    def leased(self) -> list[str]:
        """Return the addresses that host-local holds."""
        return sorted(path.name for path in self.data.glob("*/*.*.*.*"))

    def witnesses_talk(self) -> bool:
        """Say whether the two pods that were there before still reach each other."""
        a, b = self.witnesses
        return all(self.node.pings(a, address, count=1) for address in b.addresses)

    def check_clean(self, past: set[str], network: Network = PLAIN) -> None:
        """Assert that nothing is left, the witnesses talk, and the next pod works, with addresses not of the `past`."""
        # The self-GC has what a delegate must take back.
        self.node.wait_for(lambda: not self.leased() and self.node.traces() == self.baseline, "all traces to go")
        assert self.witnesses_talk()
        pod = self.add("next", network)
        taken = past.union(*(each.addresses for each in self.witnesses))
        assert taken.isdisjoint(pod.addresses)
        assert all(
            self.node.pings(pod, address, count=1) for address in self.witnesses[0].addresses[: len(pod.addresses)]
        )
        self.delete("next", network)


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Crashes]:
    """Make a node for all crashes: what one of them leaves behind, the next one meets. The parameter is for `hooks`."""
    with machine(tmp_path_factory.mktemp("node"), hooks=request.param, gc_grace_seconds=0.0) as node:
        node.add_uplink()
        node.start_agent()
        scratch = Netns("scratch")
        try:
            yield Crashes(node, scratch)
        finally:
            scratch.delete()


def plans(steps: Sequence[int]) -> list[tuple[int, str]]:
    """Return the steps to die before, each with what the runtime does about the failed ADD."""
    if os.environ.get("PODLANE_CRASH_POINTS") == "all":
        return list(itertools.product(steps, RUNTIMES))
    return [(step, RUNTIMES[number % len(RUNTIMES)]) for number, step in enumerate(steps)]


ADDS = [(PLAIN, ALL), (OWN, Steps(until="socket.send")), (DELEGATED, Steps(until="socket.send"))]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crashes", ["auto"], indirect=True)
@pytest.mark.parametrize(("network", "which"), ADDS, ids=[network.name for network, _ in ADDS])
def test_killed_during_add(crashes: Crashes, network: Network, which: Steps) -> None:
    """An agent killed before any step of ADD leaves nothing once it is back, whether or not the runtime calls DEL."""
    steps = crashes.steps("ADD", network, which)
    doomed = [(f"add-{network.name}-{step}-{runtime}", step, runtime) for step, runtime in plans(steps)]
    followers = [*doomed[1:], ("nobody", 0, "")]
    crashes.start_agent("ADD", *doomed[0][:2])
    for (container, _, runtime), follower in zip(doomed, followers, strict=True):
        outcome = crashes.cni("ADD", container, network)
        crashes.finish_off()
        assert outcome.exit_code == 0 or outcome.json()["code"] == 11
        past = crashes.held(container)
        assert crashes.witnesses_talk()
        if runtime == DELETES_AT_ONCE:
            crashes.delete(container, network)
        crashes.start_agent("ADD", *follower[:2])
        if runtime == DELETES_LATER:
            crashes.delete(container, network)
        if crashes.is_active(
            container
        ):  # died after the commit: a whole pod, and nobody knows that the runtime gave it up
            assert outcome.exit_code == 0 or runtime == NEVER_DELETES
            assert all(crashes.node.pings(crashes.witnesses[0], address, count=1) for address in past)
            crashes.delete(container, network)
        crashes.check_clean(past, network)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crashes", ["auto", "tcx"], indirect=True)  # a pod's first hooks, and what they settle to
def test_killed_during_del(crashes: Crashes) -> None:
    """A DEL succeeds whenever the agent dies of it, and once the agent is back, it is done."""
    die_deleting(crashes, PLAIN, ALL)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crashes", ["auto"], indirect=True)
def test_killed_during_del_by_a_delegate(crashes: Crashes) -> None:
    """So it does if a delegate has to take back what it gave."""
    die_deleting(crashes, DELEGATED, Steps(since="fork_exec"))


def die_deleting(crashes: Crashes, network: Network, which: Steps) -> None:
    """Have an agent die before each of these steps of DEL."""
    steps = crashes.steps("DEL", network, which)
    crashes.start_agent("DEL", f"del-{steps[0]}", steps[0])
    for step, following in zip(steps, [*steps[1:], 0], strict=True):
        pod = crashes.add(f"del-{step}", network)
        crashes.delete(pod.container_id, network)
        crashes.finish_off()
        assert crashes.witnesses_talk()
        crashes.start_agent("DEL", f"del-{following}", following)
        crashes.check_clean(set(pod.addresses), network)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crashes", ["auto"], indirect=True)
def test_killed_during_check(crashes: Crashes) -> None:
    """An agent that dies of CHECK has changed nothing: the next one finds the pod as it was."""
    steps = crashes.steps("CHECK", DELEGATED)
    crashes.start_agent("CHECK", "checked", steps[0])
    pod = crashes.add("checked", DELEGATED)
    for following in [*steps[1:], 0]:
        outcome = crashes.check(pod, DELEGATED)
        crashes.finish_off()
        assert (outcome.exit_code, outcome.stdout) == (0, "") or outcome.json()["code"] == 11
        crashes.start_agent("CHECK", "checked", following)
        assert crashes.held("checked") == set(pod.addresses) == set(crashes.leased())
        assert crashes.node.pings(crashes.witnesses[0], pod.addresses[0], count=1)
    assert crashes.check(pod, DELEGATED).exit_code == 0
    crashes.delete("checked", DELEGATED)
    crashes.check_clean(set(pod.addresses), DELEGATED)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crashes", ["auto"], indirect=True)
def test_killed_during_status(crashes: Crashes) -> None:
    """An agent that dies of STATUS cannot serve ADD (50); the next one can, and has all pods as they were."""
    steps = crashes.steps("STATUS", OWN)
    crashes.start_agent("STATUS", "", steps[0])
    pod = crashes.add("asked", OWN)
    for following in [*steps[1:], 0]:
        outcome = crashes.status(OWN)
        crashes.finish_off()
        assert (outcome.exit_code, outcome.stdout) == (0, "") or outcome.json()["code"] == 50
        crashes.start_agent("STATUS", "", following)
        assert crashes.held("asked") == set(pod.addresses)
        assert crashes.node.pings(crashes.witnesses[0], pod.addresses[0], count=1)
    assert crashes.status(OWN).exit_code == 0
    crashes.delete("asked", OWN)
    crashes.check_clean(set(pod.addresses), OWN)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crashes", ["auto"], indirect=True)
def test_killed_during_gc(crashes: Crashes) -> None:
    """What a GC was releasing when the agent died is released once it is back, whatever a delegate held of it."""
    steps = crashes.steps("GC", DELEGATED, Steps(since="fork_exec"))
    crashes.start_agent("GC", "", steps[0])
    for step, following in zip(steps, [*steps[1:], 0], strict=True):
        pod = crashes.add(f"gc-{step}", DELEGATED)
        outcome = crashes.collect(DELEGATED)
        crashes.finish_off()
        assert outcome.exit_code == 0 or outcome.json()["code"] == 11
        crashes.start_agent("GC", "", following)
        if crashes.held(pod.container_id):  # died before it had begun with this one
            crashes.delete(pod.container_id, DELEGATED)
        crashes.check_clean(set(pod.addresses), DELEGATED)


def test_killed_while_settling(node: Machine) -> None:
    """An agent killed at any step of moving programs to their links leaves the pods talking, and its heir finishes."""
    pods = [node.make_pod("settling") for _ in range(6)]
    node.kill_agent()
    for step in range(1, 7):  # a hook takes five
        start_doomed(node, "SETTLE", "any", step, wait=False)
        assert node.agent is not None
        assert node.agent.wait(timeout=30) == -signal.SIGKILL, node.log_tail()
        assert all(node.pings(pods[0], address, count=1) for pod in pods[1:] for address in pod.addresses)
    node.start_agent()
    wait_settled(node, *pods)
    assert node.repairs() == {}
    for pod in pods:
        node.delete_pod(pod)
    assert not any(node.traces().values())


class Runtime:
    """Starts and stops containers in one namespace, as container runtimes do: a failed ADD is followed by its DEL."""

    def __init__(self, node: Machine, name: str) -> None:
        self.netns = Netns(name)
        self.pod: TestPod | None = None
        self._node = node
        self._numbers = itertools.count()

    def turn(self) -> None:
        """Start a container if there is none, else stop the one there is. ADD may fail, DEL may not."""
        if self.pod:
            self._delete(self.pod.container_id)
            self.pod = None
            return
        container = f"{self.netns.name}-{next(self._numbers)}"
        outcome = self._node.cni("ADD", container_id=container, netns=str(self.netns.path))
        if outcome.exit_code == 0:
            self.pod = TestPod(self.netns, container, outcome.json())
        else:
            assert outcome.json()["code"] == 11, outcome.stdout
            self._delete(container)

    def _delete(self, container: str) -> None:
        outcome = self._node.cni("DEL", container_id=container, netns=str(self.netns.path))
        assert outcome.exit_code == 0, outcome.stdout


def work_until(stop: threading.Event, runtime: Runtime) -> None:
    """Take turns until told to stop."""
    while not stop.is_set():
        runtime.turn()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("crashes", ["auto"], indirect=True)
def test_killed_under_load(crashes: Crashes) -> None:
    """An agent killed at any moment of eight runtimes' work forgets no pod that ADD promised, and keeps no other."""
    node, clock = crashes.node, random.Random(SEED)
    node.kill_agent()
    node.start_agent()
    with ExitStack() as stack:
        runtimes = [Runtime(node, f"runtime{number}") for number in range(WORKERS)]
        for each in runtimes:
            stack.callback(each.netns.delete)
        workers = stack.enter_context(ThreadPoolExecutor(WORKERS))
        for _ in range(ROUNDS):
            stop = threading.Event()
            stack.callback(stop.set)
            futures = [workers.submit(work_until, stop, each) for each in runtimes]
            time.sleep(clock.uniform(0.1, 0.6))
            node.kill_agent()
            stop.set()
            for future in futures:
                future.result()
            node.start_agent()
            check_promises(crashes, [each.pod for each in runtimes if each.pod])
        for each in runtimes:
            if each.pod:
                each.turn()
    crashes.check_clean(set())


def check_promises(crashes: Crashes, promised: Sequence[TestPod]) -> None:
    """Assert that the store has the pods that ADD promised, and the witnesses, no address twice, and that all talk."""
    everyone = [*promised, *crashes.witnesses]
    addresses = [address for pod in everyone for address in pod.addresses]
    assert len(set(addresses)) == len(addresses)
    assert {address for pod in everyone for address in crashes.held(pod.container_id)} == set(addresses)
    assert len(crashes.node.traces()["rows"]) == len(everyone) + len(addresses)
    assert len(crashes.node.traces()["devices"]) == len(everyone)
    assert crashes.witnesses_talk()
    for pod in promised:
        assert crashes.node.pings(crashes.witnesses[0], pod.addresses[0], count=1)

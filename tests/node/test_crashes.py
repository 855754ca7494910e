"""The agent is killed with SIGKILL between any two steps of ADD and of DEL: no address is given twice, none is lost."""

from __future__ import annotations

import itertools
import os
import random
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from ipaddress import IPv6Address

import pytest

from tests.node.machine import Machine, Netns, Outcome, TestPod, machine
from tests.node.programs import wait_settled

DIE_AT = (sys.executable, "-m", "tests.node.die_at")
SEED = 20
MOST_POINTS = 60  # of a command; if it has more steps, a random choice of them. PODLANE_CRASH_POINTS=all tries all
DELETES_AT_ONCE, DELETES_LATER, NEVER_DELETES = RUNTIMES = ("at-once", "later", "never")
ROUNDS, WORKERS = 10, 8  # of the kills at random times


class Crashes:
    """A node with two pods that live through everything, and a namespace for those that come and go."""

    def __init__(self, node: Machine, scratch: Netns) -> None:
        self.node = node
        self.scratch = scratch
        self.witnesses = (node.make_pod("a"), node.make_pod("b"))
        wait_settled(node, *self.witnesses)
        self.baseline = node.traces()

    def cni(self, command: str, container: str) -> Outcome:
        """Call the launcher for a container in the scratch namespace."""
        return self.node.cni(command, container_id=container, netns=str(self.scratch.path))

    def add(self, container: str) -> TestPod:
        """ADD a container that must succeed."""
        outcome = self.cni("ADD", container)
        assert outcome.exit_code == 0, f"{outcome.stdout}\n{self.node.log_tail()}"
        return TestPod(self.scratch, container, outcome.json())

    def delete(self, container: str) -> None:
        """DEL a container; that succeeds, agent or not."""
        outcome = self.cni("DEL", container)
        assert outcome.exit_code == 0, f"{outcome.stdout}\n{self.node.log_tail()}"

    def start_agent(self, command: str, container: str, step: int) -> None:
        """Start an agent that dies just before a step of the given call; before step 0 nobody dies."""
        self.node.agent_command = (*DIE_AT, command, container, str(step))
        self.node.start_agent()

    def count_steps(self, command: str) -> int:
        """Return how many steps a command has, by one that nobody dies of."""
        self.node.kill_agent()
        self.start_agent(command, "counted", 0)
        self.add("counted")
        self.delete("counted")
        found = re.findall(r"^die_at: steps=(\d+)$", self.node.log.read_text(), re.MULTILINE)
        self.node.kill_agent()
        return int(found[-1])

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

    def witnesses_talk(self) -> bool:
        """Say whether the two pods that were there before still reach each other."""
        a, b = self.witnesses
        return all(self.node.pings(a, address, count=1) for address in b.addresses)

    def check(self, past: set[str]) -> None:
        """Assert that nothing is left, the witnesses talk, and the next pod works, with addresses not of the `past`."""
        assert self.node.traces() == self.baseline
        assert self.witnesses_talk()
        pod = self.add("next")
        taken = past.union(*(each.addresses for each in self.witnesses))
        assert taken.isdisjoint(pod.addresses)
        assert all(self.node.pings(pod, address, count=1) for address in self.witnesses[0].addresses)
        self.delete("next")


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Crashes]:
    """Make a node for all crashes: what one of them leaves behind, the next one meets. The parameter is for `hooks`."""
    with machine(tmp_path_factory.mktemp("node"), hooks=request.param) as node:
        node.add_uplink()
        node.start_agent()
        scratch = Netns("scratch")
        try:
            yield Crashes(node, scratch)
        finally:
            scratch.delete()


def plans(steps: int) -> list[tuple[int, str]]:
    """Return the steps to die before, each with what the runtime does about the failed ADD."""
    every = range(1, steps + 1)
    if os.environ.get("PODLANE_CRASH_POINTS") == "all":
        return list(itertools.product(every, RUNTIMES))
    chosen = sorted(random.Random(SEED).sample(every, min(steps, MOST_POINTS)))
    print(f"{len(chosen)} of {steps} steps, seed {SEED}")
    return [(step, RUNTIMES[step % len(RUNTIMES)]) for step in chosen]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crashes", ["auto"], indirect=True)
def test_killed_during_add(crashes: Crashes) -> None:
    """An agent killed before any step of ADD leaves nothing once it is back, whether or not the runtime calls DEL."""
    doomed = [(f"add-{step}-{runtime}", step, runtime) for step, runtime in plans(crashes.count_steps("ADD"))]
    followers = [*doomed[1:], ("nobody", 0, "")]
    crashes.start_agent("ADD", *doomed[0][:2])
    for (container, _, runtime), follower in zip(doomed, followers, strict=True):
        outcome = crashes.cni("ADD", container)
        crashes.finish_off()
        assert outcome.exit_code == 0 or outcome.json()["code"] == 11
        past = crashes.held(container)
        assert crashes.witnesses_talk()
        if runtime == DELETES_AT_ONCE:
            crashes.delete(container)
        crashes.start_agent("ADD", *follower[:2])
        if runtime == DELETES_LATER:
            crashes.delete(container)
        if crashes.held(container):  # died after the commit: a whole pod, and nobody knows that the runtime gave it up
            assert outcome.exit_code == 0 or runtime == NEVER_DELETES
            assert all(crashes.node.pings(crashes.witnesses[0], address, count=1) for address in past)
            crashes.delete(container)
        crashes.check(past)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("crashes", ["auto", "tcx"], indirect=True)  # a pod's first hooks, and what they settle to
def test_killed_during_del(crashes: Crashes) -> None:
    """A DEL succeeds whenever the agent dies of it, and once the agent is back, it is done."""
    steps = list(range(1, crashes.count_steps("DEL") + 1))
    crashes.start_agent("DEL", "del-1", 1)
    for step, following in zip(steps, [*steps[1:], 0], strict=True):
        pod = crashes.add(f"del-{step}")
        crashes.delete(pod.container_id)
        crashes.finish_off()
        assert crashes.witnesses_talk()
        crashes.start_agent("DEL", f"del-{following}", following)
        crashes.check(set(pod.addresses))


def test_killed_while_settling(node: Machine) -> None:
    """An agent killed at any step of moving programs to their links leaves the pods talking, and its heir finishes."""
    pods = [node.make_pod("settling") for _ in range(6)]
    plain = node.agent_command
    node.kill_agent()
    for step in range(1, 11):  # a hook takes five
        node.agent_command = (*DIE_AT, "SETTLE", "any", str(step))
        node.start_agent(wait=False)
        assert node.agent is not None
        assert node.agent.wait(timeout=30) == -signal.SIGKILL, node.log_tail()
        assert all(node.pings(pods[0], address, count=1) for pod in pods[1:] for address in pod.addresses)
    node.agent_command = plain
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
    node.agent_command = (sys.executable, "-m", "agent")
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
    crashes.check(set())


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

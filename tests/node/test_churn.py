"""Many pods come and go: nothing is given twice, nothing stays behind, and the agent does not grow."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from tests.node.machine import Machine, Netns, Outcome, TestPod, machine

T = TypeVar("T")
R = TypeVar("R")

CROWD = 300
WARM_UP, ROUNDS, AT_ONCE = 40, 200, 4  # of ADD and DEL
TURNS = 4  # of as many rounds
GROWTH_KB = 512  # what resident memory may grow by over the rounds: the allocator's breath, and not 3 kB for each pod
SEED = 7


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Make a node with addresses for a crowd."""
    ranges = [{"subnet": "10.244.0.0/22"}, {"subnet": "fd00:10:244::/64"}]
    with machine(tmp_path_factory.mktemp("node"), ranges=ranges) as it:
        it.add_uplink()
        it.start_agent()
        yield it


@pytest.fixture
def crowd() -> Iterator[list[Netns]]:
    """Network namespaces for a crowd of pods."""
    made: list[Netns] = []
    try:
        at_once(lambda _: made.append(Netns("crowd")), range(CROWD), threads=4)
        yield made
    finally:
        at_once(Netns.delete, made, threads=4)


def at_once(work: Callable[[T], R], items: Iterable[T], threads: int = CROWD) -> list[R]:
    """Do the work for all items, in as many threads."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, items))


def call(node: Machine, command: str, netns: Netns, container: str = "") -> Outcome:
    """Call the launcher for a namespace."""
    return node.cni(command, container_id=container or netns.name, netns=str(netns.path))


def test_a_crowd_comes_and_goes(node: Machine, crowd: list[Netns]) -> None:
    """300 concurrent ADDs succeed with distinct addresses, pods of theirs talk; 300 concurrent DELs leave nothing."""
    outcomes = at_once(lambda netns: call(node, "ADD", netns), crowd)
    assert [each.stdout for each in outcomes if each.exit_code != 0] == []
    pods = [TestPod(netns, netns.name, each.json()) for netns, each in zip(crowd, outcomes, strict=True)]
    addresses = [address for pod in pods for address in pod.addresses]
    assert len(set(addresses)) == 2 * CROWD
    assert len(node.traces()["endpoints"]) == 3 * CROWD
    chance = random.Random(SEED)
    for _ in range(20):
        one, other = chance.sample(pods, 2)
        assert all(node.pings(one, address, count=1) for address in other.addresses)
    outcomes = at_once(lambda netns: call(node, "DEL", netns), crowd)
    assert [each.stdout for each in outcomes if each.exit_code != 0] == []
    # On a slow machine the last ones in the line are spooled after ten seconds, which is a success all the same.
    node.wait_for(lambda: not any(node.traces().values()), "nothing to be left")


def test_one_of_many_wins(node: Machine) -> None:
    """Of ADDs for the same interface of the same container at the same time, one succeeds; the others touch nothing."""
    netns = Netns("contended")
    try:
        outcomes = at_once(lambda _: call(node, "ADD", netns), range(8))
        (winner,) = [each for each in outcomes if each.exit_code == 0]
        losers = [each.json() for each in outcomes if each.exit_code != 0]
        assert {(each["code"], each["msg"]) for each in losers} == {
            (100, "the container has this interface already; DEL it first")
        }
        pod = TestPod(netns, netns.name, winner.json())
        assert all(node.pings(pod, gateway) for gateway in ("192.0.2.10", "2001:db8::10"))
        rows = node.traces()["rows"]
        assert len(rows) == 1 + len(pod.addresses)
        node.delete_pod(pod)
        assert not any(node.traces().values())
    finally:
        netns.delete()


@dataclass(frozen=True)
class Footprint:
    """What an agent holds of the machine."""

    descriptors: int
    threads: int
    resident_kb: int


def footprint(node: Machine) -> Footprint:
    """Look at the agent's process."""
    assert node.agent is not None
    process = Path("/proc") / str(node.agent.pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    return Footprint(
        descriptors=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
        resident_kb=int(status["VmRSS"].split()[0]),
    )


def footprint_at_rest(node: Machine) -> Footprint:
    """Look at it once the threads of the last calls have ended."""
    seen: list[Footprint] = []

    def rests() -> bool:
        time.sleep(0.2)
        seen.append(footprint(node))
        return len({(each.descriptors, each.threads) for each in seen[-3:]}) == 1 and len(seen) >= 3

    node.wait_for(rests, "the agent to come to rest")
    return seen[-1]


def test_the_agent_does_not_grow(node: Machine) -> None:
    """After two hundred rounds of ADD and DEL the agent has the descriptors, threads and memory that it had before.

    Its memory, once it has met as many calls at a time as there ever are: what leaks does so in each of some turns.
    """
    namespaces = [Netns("churn") for _ in range(AT_ONCE)]

    def churn(rounds: int) -> None:
        def come_and_go(netns: Netns) -> None:
            for number in range(rounds // AT_ONCE):
                for command in ("ADD", "DEL"):
                    outcome = call(node, command, netns, f"{netns.name}-{number}")
                    assert outcome.exit_code == 0, outcome.stdout

        at_once(come_and_go, namespaces)

    try:
        churn(WARM_UP)
        prints = [footprint_at_rest(node)]
        growth = GROWTH_KB
        while growth >= GROWTH_KB and len(prints) <= TURNS:
            churn(ROUNDS)
            prints.append(footprint_at_rest(node))
            growth = prints[-1].resident_kb - prints[-2].resident_kb
    finally:
        at_once(Netns.delete, namespaces)
    print(f"after {WARM_UP} rounds, and every {ROUNDS} more: {prints}")
    assert len({(each.descriptors, each.threads) for each in prints}) == 1
    assert growth < GROWTH_KB
    assert not any(node.traces().values())

"""The node gets another pod CIDR while an ADD is under way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import pytest

from tests.node.api.node import Node, api_node
from tests.node.forked import start_held
from tests.node.machine import Netns, TestPod
from tests.node.steps import labels
from tests.node.verbs import add, assert_refused, delete

COMMIT = "Connection.execute in Store.activate"
"""The step from which on the node's pod CIDRs make no difference to an ADD."""
PREFIXES = (("10.77.0.", "fd00:77::"), ("10.78.0.", "fd00:78::"))
"""Of addresses in the pod CIDRs that the node has in turn."""


@pytest.mark.timeout(300)
def test_the_pod_cidr_changes_during_add(tmp_path: Path) -> None:
    """Until an ADD is committed, it fails and leaves no trace, so that the next try gets addresses that are reached."""
    with api_node(tmp_path) as node, ThreadPoolExecutor() as runtime:
        register(node, PREFIXES[0])
        netns = node.add_netns("held")
        hold = start_held(node, "ADD", netns.name, COMMIT)
        old = node.make_pod("old")
        before = node.traces()
        seen = set()
        for step, prefixes in zip(firsts(steps_of_add(node, netns)), cycle(reversed(PREFIXES)), strict=False):
            hold.arrange(step)
            call = runtime.submit(add, node, netns)
            hold.wait_held()
            is_committed = hold.is_marked
            seen.add(is_committed)
            change(node, prefixes)
            hold.let_go()
            outcome = call.result()
            if not is_committed:
                assert_refused(outcome, 11, "the node's pod CIDRs have changed")
                assert node.traces() == before
                outcome = add(node, netns)
            assert outcome.exit_code == 0, outcome.stdout
            pod = TestPod(netns, netns.name, outcome.json())
            of_now = [each.startswith(prefix) for each, prefix in zip(pod.addresses, prefixes, strict=True)]
            assert of_now == [not is_committed] * 2
            assert all(node.pings(old, each, count=1) for each in pod.addresses)
            delete(node, netns)
            assert node.traces() == before
        assert seen == {False, True}


def steps_of_add(node: Node, netns: Netns) -> list[str]:
    """Return what they are, learned from one that nobody holds."""
    assert add(node, netns).exit_code == 0
    delete(node, netns)
    return labels(node.log.read_text())


def firsts(steps: Sequence[str]) -> list[int]:
    """Return the numbers of the steps that are of another kind than those before them."""
    return [number for number, step in enumerate(steps, start=1) if number == 1 or step != steps[number - 2]]


def register(node: Node, prefixes: Sequence[str]) -> None:
    """Give the node pod CIDRs."""
    node.register(f"{prefixes[0]}0/24", f"{prefixes[1]}/64")


def change(node: Node, prefixes: Sequence[str]) -> None:
    """Give the node other pod CIDRs, and wait until its agent has them."""
    said = f"ranges={prefixes[0]}0/24"
    before = node.log.read_text().count(said)
    register(node, prefixes)
    node.wait_for(lambda: node.log.read_text().count(said) > before, "the other pod CIDRs")
